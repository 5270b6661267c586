"""What would make an exact site lower: one sentence for every code."""

from __future__ import annotations

NOT_YET = "nothing in the model: this is not lowered yet"
NEVER = "nothing: a Monarch matrix cannot hold it"

REMEDIES: dict[str, str] = {
    "as_strided": "read the result by views and slices instead of as_strided",
    "attention_kernel": "scaled_dot_product_attention, which picks a kernel by itself, instead of a kernel's own op",
    "backward_exact_wins": "longer sequences, torch.no_grad() where no gradient is wanted, or policy='always'",
    "context": "switch grad mode or autocast before the queries are scaled or after the values are mixed",
    "cost_exact_wins": "longer sequences, or policy='always'",
    "cross_attention": "cross_attention=True, where a measurement shows that the approximation is good enough",
    "custom_op": "scaled_dot_product_attention instead of an operator of one's own",
    "data_dependent": "a batch and a length that follow from the shapes of the inputs",
    "device": "put queries, keys and values on one device that has kernels",
    "dropout_active": "model.eval(), or an attention dropout of 0",
    "dtype": "give queries, keys and values one dtype that has kernels",
    "dynamic_seq_len": "a number for block_size, one torch.export.Dim for equal lengths, and an example of more than "
    "one block; or a static length",
    "empty": "nothing: there is nothing to compute",
    "flex_attention": NEVER + "; scaled_dot_product_attention is looked at, FlexAttention is the user's choice",
    "fused_layer": "torch.backends.mha.set_fastpath_enabled(False), or need_weights=False",
    "gqa": "tensors of (batch, num_heads, seq_len, dim), with one static number of heads for keys and values",
    "head_dim": "queries and keys of one width",
    "heads_mixed": NEVER,
    "host_exact_wins": "mode='reduce-overhead', whose CUDA graphs spare the host, larger batches, or policy='always'",
    "in_body": "move the attention out of the body; into those of cond, scan and while_loop (where none writes to its "
    "inputs, outside of training) and of checkpoints without context_fn is looked",
    "layout": "dense tensors",
    "learned_keys": "scaled_dot_product_attention, where it is attention; nothing, where it is a layer over classes or "
    "codes",
    "mask_bias": NEVER,
    "mask_causal": NOT_YET,
    "mask_fill": "fill hidden scores with -inf (or at most -1e4), or pass the mask to scaled_dot_product_attention",
    "mask_frame": "apply every mask at one place: before, or after, heads are merged into the batch",
    "mask_general": "a mask on the keys alone, of shape (batch, 1, 1, seq_len)",
    "mask_key_bias": "one mask: the bias itself, -inf where a key is hidden",
    "mask_multiplied": "hide keys before softmax, with a bool mask",
    "mask_opaque": "a bool mask, if it hides keys and no more; a bias of its own for each query is not lowered",
    "mask_packed": "sequences in the batch; FlexAttention or a varlen kernel computes packed ones exactly and fast",
    "mask_prefix_causal": NOT_YET,
    "mask_scaled": "scale the scores before they are masked",
    "mask_sliding_window": NEVER + "; FlexAttention computes a narrow window exactly and fast",
    "mask_split_bias": "a bias that is the same for every head and every query; others are not lowered yet",
    "min_seq_len": "a smaller min_seq_len",
    "mutation": "no in-place op on what the attention reads or its mask is made of: torch.where, masked_fill or cat "
    "instead",
    "no_kernels": "a device of compute capability 8.0 or later, and triton",
    "normalisation": "softmax over the keys: every weight divided by the sum of its own row, and by no more",
    "plan_exact": "another plan: this one keeps the site exact",
    "policy_never": "policy='auto' or 'always'",
    "probs_op": "nothing but casts, views and inactive dropout between softmax and the product with the values",
    "probs_reused": "no output_attentions or need_weights, no second normalisation: the probabilities must serve the "
    "product alone",
    "rank": "queries, keys and values of one rank and batch, with static leading dims beyond (batch, heads)",
    "row_shift": "mask the scores before they are shifted, or leave the shift out: softmax ignores all but rounding",
    "scale": "a finite scale that is not 0",
    "scale_not_constant": "a number, a 0-d tensor or one number a head for the scale",
    "scores_layout": "the product of queries and keys as matmul, bmm, baddbmm or einsum over one shared dim",
    "scores_op": "nothing but scales, masks, casts and views between the product and softmax",
    "scores_reused": "the scores must serve softmax alone: masked_fill instead of an assignment to a part of them",
    "scores_view": "keep queries and keys as the last two dims of the scores",
    "sdpa_raises": "arguments that scaled_dot_product_attention takes",
    "single_query": "nothing: any form reads every key once, as exact attention of one query does",
    "softcap": NEVER,
    "softmax_dim": "softmax over the keys, in one of the last two dims",
    "symbolic_dims": "static num_heads and head_dim",
    "tensor_subclass": "plain queries, keys and values; DTensors, in compiled graphs and outside of training",
    "traced": "torch.compile with backend='monarch', or lower_exported: they read masks off the graph",
    "transformed": "attention outside of torch.func's transforms and of forward-mode differentiation",
    "values_layout": "the product with the values as probabilities @ values",
    "wide_heads": "heads of at most 256 features, or a CPU",
}
"""Code -> what the user can do."""


def remedy_for(code: str) -> str:
    """What would make a site of this code lower; '' for codes that are no refusal."""
    return REMEDIES.get(code, "")
