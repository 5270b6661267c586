"""May a region be lowered? A table of checks; each refusal has a code, a reason and a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch._guards import TracingContext
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.attention.sharding import is_dtensor, shards_attention
from monarch_compile.attention.signature import RULES, Rule, Signature
from monarch_compile.config import MonarchConfig
from monarch_compile.passes.attention.masks import LOWERED_KINDS, MaskFact, classify_all
from monarch_compile.passes.attention.region import AttentionRegion, Operand, frame_of
from monarch_compile.passes.attention.sizes import leading_sizes, separate_symbols
from monarch_compile.passes.graph import dtype_of, shape_of
from monarch_compile.passes.safety import Footprint, Order, mode_switch, strided_read, write_between
from monarch_compile.passes.weights import is_computed
from monarch_compile.refusal import Refusal

AUTOCAST = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""What autocast casts to one dtype, where it is in force."""


@dataclass(frozen=True)
class Context:
    """What checks may look at beside the region."""

    config: MonarchConfig
    order: Order
    facts: tuple[MaskFact, ...]
    trains: bool = False

    @staticmethod
    def of(region: AttentionRegion, config: MonarchConfig, *, trains: bool = False) -> Context:
        facts = classify_all(region.masks, _keys_ahead(region))
        return Context(config, Order.of(region.output.graph), facts, trains)


class Check(NamedTuple):
    """`refuse` returns None, or the reason (and the culprit, else the region's output)."""

    code: str
    refuse: Callable[[AttentionRegion, Context], str | tuple[str, Node] | None]


def first_refusal(region: AttentionRegion, context: Context) -> Refusal | None:
    """The first check that refuses the region."""
    site = replace(signature_of(region), trains=context.trains)
    for check in CHECKS:
        found = check.refuse(site, context.config) if isinstance(check, Rule) else check.refuse(region, context)
        if found is not None:
            reason, node = found if isinstance(found, tuple) else (found, region.output)
            return Refusal(check.code, reason, node)
    for fact in context.facts:
        is_edge = region.is_causal and fact.is_triangle and fact.kind == "causal"
        if fact.kind not in LOWERED_KINDS and region.length is None and not is_edge:
            return Refusal(f"mask_{fact.kind}", _reason(fact, context.config), fact.node)
    effects = [fact.kind for fact in context.facts if fact.kind != "none" and (not fact.is_triangle or fact.hides_keys)]
    if "key_bias" in effects and len(effects) > 1:
        return Refusal("mask_key_bias", "a bias of the keys is added beside another mask", region.output)
    if any(str(frame_of(m.lead)) != str(region.lead) for m in region.masks):
        why = "masks are applied both before and after the heads are merged into the batch"
        return Refusal("mask_frame", why, region.output)
    return None


def _reason(fact: MaskFact, config: MonarchConfig) -> str:
    if fact.kind == "packed" and fact.is_triangle and not config.causal:
        return f"packed causal sequences of {fact.length} tokens, and option causal is False"
    if fact.kind != "causal":
        return fact.reason
    return (
        f"{fact.reason} with another edge than the diagonal"
        if config.causal
        else "a causal mask, and option causal is False"
    )


def under_triangle(region: AttentionRegion, facts: Sequence[MaskFact]) -> bool:
    """Whether a query sees no later key, by the operator's own flag or by a mask that hides all of them."""
    return region.is_causal or any(fact.is_triangle for fact in facts)


def follows_cache(region: AttentionRegion, facts: Sequence[MaskFact]) -> bool:
    """Whether fewer queries than keys are the last of their sequence, and see no later key, by a mask that says so.

    The flag of scaled_dot_product_attention puts the first query at the first key instead.
    """
    if not region.is_cross or region.is_causal or not any(fact.is_triangle for fact in facts):
        return False
    rows, keys = region.q_shape[2], region.k_shape[2]
    if TracingContext.try_get() is None:  # an exported program takes no guards
        return bool(statically_known_true(rows < keys))
    return bool(rows < keys)


def _keys_ahead(region: AttentionRegion) -> Any:
    """How many more keys than queries there are, of equal symbols where sizes are symbolic."""
    if not region.is_cross:
        return 0
    rows, keys = (
        size.node.expr if isinstance(size, torch.SymInt) else size for size in (region.q_shape[2], region.k_shape[2])
    )
    return keys - rows


def packed_length(region: AttentionRegion, facts: Sequence[MaskFact], *, causal: bool) -> int | None:
    """The length of sequences that fill the region's one, if they are packed and no other mask is there.

    causal: whether they may be under a triangle.
    """
    packed = [fact for fact in facts if fact.length is not None]
    others = [fact for fact in facts if fact.kind != "none" and fact not in packed]
    rows = region.q_shape[2], region.k_shape[2], region.v_shape[2]
    if len(packed) != 1 or not all(map(_is_static, (*region.lead, *rows))):
        return None
    if any(fact.kind != "causal" or not fact.is_triangle or fact.hides_keys for fact in others):
        return None
    if not causal and (others or packed[0].is_triangle):
        return None
    return packed[0].length if len(set(rows)) == 1 and rows[0] % packed[0].length == 0 else None


def _operands(region: AttentionRegion) -> tuple[Operand, Operand, Operand]:
    return region.q, region.k, region.v


def _is_static(size: Any) -> bool:
    return isinstance(size, int)


def _check_subclass(region: AttentionRegion, context: Context) -> tuple[str, Node] | None:
    """A subclass means what it likes by an op; of DTensor alone it is known: shards of batches or heads stand alone."""
    nodes = [*(x.node for x in _operands(region)), *(m.node for m in region.masks), *(f.node for f in region.factors)]
    wrapped = [node for node in nodes if is_traceable_wrapper_subclass(node.meta["val"])]
    if not wrapped:
        return None
    kind = type(wrapped[0].meta["val"]).__name__
    if not all(is_dtensor(node.meta["val"]) for node in nodes):
        return f"the attention is of {kind}s, a tensor subclass whose kernels are its own", wrapped[0]
    if context.trains:
        return f"the attention is of {kind}s, and is differentiated", wrapped[0]
    return None if shards_attention() else (f"this torch cannot be told how {kind}s are sharded", wrapped[0])


def _check_lead(region: AttentionRegion, context: Context) -> str | None:
    for own, whole in leading_sizes(region):
        if not (str(own) == str(whole) or (_is_static(own) and own == 1)):
            return f"batch and head sizes do not fit together: {own} beside {whole}"
    leads = (region.qk_lead, region.pv_lead)
    if any(len(lead) > 2 and not all(map(_is_static, lead)) for lead in leads):
        return "attention over more than (batch, heads) leading dims, one of them symbolic, is not lowered yet"
    return None


def _check_factors(region: AttentionRegion, context: Context) -> tuple[str, Node] | None:
    """A scale known at run time moves to the queries: a number can, one per head where heads are a dim.

    Float16 queries overflow where scores of another dtype do not: their products with a large scale.
    """
    for factor in region.factors:
        shape, leads = factor.node.meta["val"].shape, (shape_of(factor.scores)[:-2], region.lead)
        if len(shape) and (len(region.qk_lead) != 2 or any(str(lead) != str(region.qk_lead) for lead in leads)):
            return "the scores are multiplied by a tensor, and their leading dims are merged", factor.node
        if len(shape) and dtype_of(factor.node) != dtype_of(region.q.node):
            return "the scores are multiplied by a tensor of another dtype than the queries", factor.node
        if dtype_of(region.q.node) == torch.float16 != dtype_of(factor.scores):
            return "the scores are multiplied in another dtype than float16, that of the queries", factor.node
    return None


def _check_separate_symbols(region: AttentionRegion, context: Context) -> str | None:
    for one, other in separate_symbols(region):  # elsewhere than in an exported program, they are guarded on by now
        return f"sizes {one} and {other} may differ, and an exported program takes no guards"
    return None


def _check_unguarded(region: AttentionRegion, context: Context) -> str | None:
    """An exported program serves every length as it is: a table of the length needs Dynamo, which guards on ranges."""
    if TracingContext.try_get() is not None:
        return None
    n_q, n_k = region.q_shape[2], region.k_shape[2]
    config = context.config
    if isinstance(n_k, torch.SymInt) and config.block_size == "auto":
        return "seq_len is symbolic, block_size is 'auto', and an exported program takes no guards"
    if region.is_cross and not statically_known_true(n_q != n_k):
        return f"seq_len_q {n_q} may become seq_len_k {n_k}, and an exported program takes no guards"
    prefix = config.prefix if isinstance(config.prefix, int) else 0
    block = prefix + config.block_size if isinstance(config.block_size, int) else 0
    if isinstance(n_k, torch.SymInt) and n_k.node.hint <= block and not statically_known_true(n_k <= block):
        return f"seq_len {n_k} was at most one block in the exported call and may be more, and it takes no guards"
    return None


def _check_learned_keys(region: AttentionRegion, context: Context) -> tuple[str, Node] | None:
    """Keys that layers make of weights alone may be a layer's weight themselves, unless queries are made like that."""
    is_one_op = region.interior == (region.output,)
    if is_one_op or is_computed(region.k.node, before=region.anchor):
        return None
    if not is_computed(region.q.node, before=region.anchor):
        return None
    why = "the keys are made of weights alone, so that softmax may run over the classes or codes of a layer"
    return why, region.k.node


def footprint_of(region: AttentionRegion) -> Footprint:
    """What the rewrite of a region touches. Of its masks it is proved what they hide."""
    masks = tuple(m.node for m in region.masks)
    read = (*(x.node for x in _operands(region)), *masks, *(f.node for f in region.factors))
    return Footprint(region.output, (*region.interior, *region.skipped), read, masks)


def _check_mutation(region: AttentionRegion, context: Context) -> tuple[str, Node] | None:
    return write_between(footprint_of(region), context.order)


def _check_context(region: AttentionRegion, context: Context) -> tuple[str, Node] | None:
    return mode_switch(footprint_of(region), context.order)


def _check_strided(region: AttentionRegion, context: Context) -> tuple[str, Node] | None:
    return strided_read(footprint_of(region))


def signature_of(region: AttentionRegion) -> Signature:
    """What the rules of all attention are asked about; dtypes as autocast has them, where it is in force."""
    nodes = [operand.node for operand in _operands(region)]
    dtypes = frozenset(node.meta["val"].dtype for node in nodes)
    if region.gives_scores_dtype and dtypes <= AUTOCAST:
        dtypes = frozenset({region.dtype})
    devices = frozenset(node.meta["val"].device.type for node in nodes)
    shapes = (region.q_shape, region.k_shape, region.v_shape)
    return Signature(shapes, dtypes, devices, region.scale, region.is_causal, region.follows_cache)


def _rules(first: str, last: str) -> tuple[Rule, ...]:
    """A part of the rules of all attention, in their order."""
    codes = [rule.code for rule in RULES]
    return RULES[codes.index(first) : codes.index(last) + 1]


CHECKS: tuple[Check | Rule, ...] = (
    Check("tensor_subclass", _check_subclass),
    *_rules("empty", "single_query"),
    Check("rank", _check_lead),
    Check("dynamic_seq_len", _check_separate_symbols),
    *_rules("values_layout", "data_dependent"),
    Check("dynamic_seq_len", _check_unguarded),
    *_rules("device", "scale"),
    Check("scale_not_constant", _check_factors),
    Check("learned_keys", _check_learned_keys),
    Check("mutation", _check_mutation),
    Check("context", _check_context),
    Check("as_strided", _check_strided),
    *_rules("dropout_active", "min_seq_len"),
)
