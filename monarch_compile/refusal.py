"""Why a site stays exact: one type for it, and one table of its codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from monarch_compile.errors import CodegenError

NOT_YET = "nothing in the model: this is not lowered yet"
NEVER = "nothing: a Monarch matrix cannot hold it"


class Code(NamedTuple):
    """remedy: what the user can do, true for every family that uses the code.

    is_choice: whether the user, a plan or the cost model wants the exact form.

    Strict mode accepts what is a choice.
    """

    remedy: str
    is_choice: bool = False


CODES: dict[str, Code] = {
    "as_strided": Code("read the result by views and slices instead of as_strided"),
    "attention_kernel": Code(
        "scaled_dot_product_attention, which picks a kernel by itself, instead of a kernel's own op"
    ),
    "backward_exact_wins": Code(
        "longer sequences, torch.no_grad() where no gradient is wanted, or policy='always'", is_choice=True
    ),
    "block_order": Code("views and transposes alone between the two products, as a Monarch matrix or BLAST has them"),
    "block_rank": Code("as many numbers from each block of the first factor for each block of the second"),
    "block_reused": Code("what is between the two products must serve the second one alone"),
    "block_step": Code(
        "products of two tensors each, and nothing but views between them: scales, biases and activations behind"
    ),
    "channels_mixed": Code(
        "one filter for each channel: a product that sums over channels is no depthwise convolution"
    ),
    "claimed": Code("nothing: another form of what it shares nodes with gains more", is_choice=True),
    "complex_result": Code("the real part of the inverse transform, or irfft instead of ifft"),
    "complex_signal": Code("transforms of real tensors: a complex one is two convolutions"),
    "context": Code("switch grad mode or autocast before or after all that the site computes, not between"),
    "convolution_layout": Code("a product of transforms of at most 5 dims, batch and channels side by side each"),
    "cost_exact_wins": Code(
        "sizes where a gain is predicted (for attention: longer sequences), or policy='always'", is_choice=True
    ),
    "cpu_fft_wins": Code("a CUDA device, or policy='always'", is_choice=True),
    "cross_attention": Code("cross_attention=True, where a measurement shows that the approximation is good enough"),
    "custom_op": Code("scaled_dot_product_attention instead of an operator of one's own"),
    "data_dependent": Code("a batch and a length that follow from the shapes of the inputs"),
    "device": Code("put all tensors that the site reads on one device that has kernels"),
    "dropout_active": Code("model.eval(), or an attention dropout of 0"),
    "dtype": Code("one dtype that has kernels for all tensors that the site reads, and no float64 between"),
    "dynamic_seq_len": Code(
        "a number for block_size, one torch.export.Dim for equal lengths, and an example of more than "
        "one block; or a static length"
    ),
    "empty": Code("nothing: there is nothing to compute"),
    "filter_per_sequence": Code("a filter that the sequences of a batch share"),
    "flex_attention": Code(NEVER + "; scaled_dot_product_attention is looked at, FlexAttention is the user's choice"),
    "float32_result": Code(
        "an input of 16 bits and a result that is cast to 16 bits right after the convolution, or policy='always'",
        is_choice=True,
    ),
    "fused_layer": Code("torch.backends.mha.set_fastpath_enabled(False), or need_weights=False"),
    "gqa": Code("tensors of (batch, num_heads, seq_len, dim), with one static number of heads for keys and values"),
    "head_dim": Code("queries and keys of one width"),
    "heads_mixed": Code(NEVER),
    "host_exact_wins": Code(
        "mode='reduce-overhead', whose CUDA graphs spare the host, larger batches, or policy='always'", is_choice=True
    ),
    "in_body": Code(
        "move the site out of the body; bodies of cond, scan and while_loop (where none writes to its inputs, outside "
        "of training) and of checkpoints without context_fn are looked into"
    ),
    "layout": Code("dense tensors"),
    "learned_keys": Code(
        "scaled_dot_product_attention, where it is attention; nothing, where it is a layer over classes or codes"
    ),
    "learned_spectrum": Code("a filter in the time domain, transformed in the model: rfft(filter, n)"),
    "mask_bias": Code(NEVER),
    "mask_causal": Code(
        "causal=True, num_iters=1 and init='identity', outside of training, with the last query at the last key, where "
        "a measurement shows that the approximation is good enough"
    ),
    "mask_fill": Code(
        "fill hidden scores with -inf (or at most -1e4), or pass the mask to scaled_dot_product_attention"
    ),
    "mask_frame": Code("apply every mask at one place: before, or after, heads are merged into the batch"),
    "mask_general": Code("a mask on the keys alone, of shape (batch, 1, 1, seq_len)"),
    "mask_key_bias": Code("one mask: the bias itself, -inf where a key is hidden"),
    "mask_multiplied": Code("hide keys before softmax, with a bool mask"),
    "mask_opaque": Code("a bool mask, if it hides keys and no more; a bias of its own for each query is not lowered"),
    "mask_packed": Code(
        "sequences in the batch; FlexAttention or a varlen kernel computes packed ones exactly and fast"
    ),
    "mask_prefix_causal": Code(NOT_YET),
    "mask_scaled": Code("scale the scores before they are masked"),
    "mask_sliding_window": Code(NEVER + "; FlexAttention computes a narrow window exactly and fast"),
    "mask_split_bias": Code("a bias that is the same for every head and every query; others are not lowered yet"),
    "min_seq_len": Code("a smaller min_seq_len", is_choice=True),
    "mutation": Code(
        "no in-place op on what the site reads, what its mask is made of, or what may be a view of its result: "
        "torch.where, masked_fill or cat instead"
    ),
    "no_gain": Code("policy='always', which changes no numbers but rounding", is_choice=True),
    "no_kernels": Code("a device of compute capability 8.0 or later, and triton"),
    "normalisation": Code("softmax over the keys: every weight divided by the sum of its own row, and by no more"),
    "plan_exact": Code("another plan: this one keeps the site exact", is_choice=True),
    "policy_never": Code("policy='auto' or 'always'", is_choice=True),
    "probs_op": Code("nothing but casts, views and inactive dropout between softmax and the product with the values"),
    "probs_reused": Code(
        "no output_attentions or need_weights, no second normalisation: the probabilities must serve the product alone"
    ),
    "rank": Code("queries, keys and values of one rank and batch, with static leading dims beyond (batch, heads)"),
    "row_shift": Code(
        "leave the shift out, or take off each row's largest score: softmax ignores all of a shift but rounding"
    ),
    "scale": Code("a finite scale that is not 0"),
    "scale_not_constant": Code(
        "for attention a number, a 0-d tensor or one number a head; for transforms of a symbolic length a norm other "
        "than 'ortho'"
    ),
    "scores_layout": Code("the product of queries and keys as matmul, bmm, baddbmm or einsum over one shared dim"),
    "scores_op": Code("nothing but scales, masks, casts and views between the product and softmax"),
    "scores_reused": Code(
        "the scores must serve softmax alone: masked_fill instead of an assignment to a part of them"
    ),
    "scores_view": Code("keep queries and keys as the last two dims of the scores"),
    "sdpa_raises": Code("arguments that scaled_dot_product_attention takes"),
    "several_factors": Code("one input and one filter, or a sum of filters, in a product of transforms"),
    "several_inputs": Code("an inverse transform for each input, and the sum after these"),
    "single_query": Code(
        "nothing: any form reads every key once, as exact attention of one query does", is_choice=True
    ),
    "softcap": Code(NEVER),
    "softmax_dim": Code("softmax over the keys, in one of the last two dims"),
    "spectrum_op": Code(
        "nothing but products, sums, scales, conjugates and views between the transforms and the inverse transform"
    ),
    "spectrum_reused": Code(
        "the transform of the input, and its product with the filter's, must serve inverse transforms alone"
    ),
    "symbolic_dims": Code(
        "static sizes: heads and features of attention, or lengths of a convolution and of its transforms"
    ),
    "tensor_subclass": Code("plain tensors; for attention DTensors too, in compiled graphs and outside of training"),
    "traced": Code("torch.compile with backend='monarch', or lower_exported: they read masks off the graph"),
    "transform_dims": Code("transforms along one dim"),
    "transform_points": Code(
        "transforms of the input, of the filter and back along one dim, with the same number of points n"
    ),
    "transformed": Code("a call outside of torch.func's transforms and of forward-mode differentiation"),
    "unmeasured_kernels": Code(
        "policy='always', where a comparison with exact attention on your GPU shows that it is right and faster",
        is_choice=True,
    ),
    "values_layout": Code("the product with the values as probabilities @ values"),
    "wide_heads": Code("heads of at most 256 features, or a CPU"),
}
"""Every code that a site can stay exact with."""


def remedy_for(code: str) -> str:
    """What would make a site of this code lower; '' for codes that are no refusal."""
    return CODES[code].remedy if code in CODES else ""


class Refusal(NamedTuple):
    """Why a site stays exact. node: the FX node that decides it; None for a call of eager code."""

    code: str
    reason: str
    node: Any = None

    @property
    def is_choice(self) -> bool:
        """Whether the exact form is wanted, not only kept for lack of support."""
        return CODES[self.code].is_choice

    def __str__(self) -> str:
        return f"[{self.code}] {self.reason}"


class Refused(Exception):
    """Matching stopped at a refusal."""

    def __init__(self, code: str, reason: str, node: Any) -> None:
        super().__init__(f"{code}: {reason} ({node.name})")
        self.refusal = Refusal(code, reason, node)


def kernel_refusal(device: torch.device) -> str | None:
    """Why no kernel can run on `device`; None where one can, or where the reference runs instead (CPU)."""
    if device.type != "cuda":
        return None
    try:
        import triton  # noqa: F401

        from monarch_compile.codegen.launcher import capability_of

        capability_of(device)
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it to run kernels on {device}"
    except CodegenError as error:
        return str(error)
    return None
