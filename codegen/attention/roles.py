"""The kernels that attention is made of, and which of them one attention needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from monarch_compile.attention.ir import SHARED_PREFIX, MonarchAttention
from monarch_compile.codegen.attention.schedule import Schedule, can_fuse
from monarch_compile.codegen.tiling import padded

LEAST_SHARED_BLOCK, MOST_SHARED_WIDTH = 32, 128
"""With blocks up to this, computing the rows of a prefix in stage 1 takes longer than in a kernel of their own; with
wider heads it takes too many registers."""


@dataclass(frozen=True)
class Role:
    """What one kernel is to its IR.

    tiling: the field of the schedule that tiles it.
    reads, writes: names of its tensors (see `buffers_of`), without those that masks and exact groups add.
    values: whether it also carries values.
    near: whether it computes the exact groups.
    far: whether it weighs the far field against the exact groups.
    choosing: whether it weighs the far field apart from the exact groups, to choose blocks of it or to be merged later.
    """

    name: str
    template: str
    tiling: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    values: bool = False
    near: bool = False
    far: bool = False
    choosing: bool = False

    @property
    def summarizes(self) -> bool:
        """Whether it is a kernel of stage 1."""
        return self.template == "summarize"

    @property
    def reads_keys(self) -> bool:
        """Whether it reads keys of the sequence, which a mask may hide."""
        return "k" in self.reads


_QKV, _SUMMARIES, _GROUPS = ("q", "k", "v"), ("a", "y", "c"), ("near", "z")
PREFIX_SHARES = ("prefix_sum", "prefix_total", "prefix_top")
"""Of each row of a prefix over each block of keys: weighted sum of values, sum of weights, largest score."""

MEAN = Role("monarch_mean_query", "mean_query", "represent", ("q",), ("qhat",))
ONLY = Role("monarch_summarize", "summarize", "summarize", _QKV, _SUMMARIES, values=True)
FUSED = Role("monarch_summarize_near", "summarize", "summarize", _QKV, (*_SUMMARIES, *_GROUPS), values=True, near=True)
FIRST = Role("monarch_summarize_first", "summarize", "summarize", ("q", "k"), ("a", "c"))
NEXT = Role("monarch_summarize_next", "summarize", "summarize", ("qhat", "k"), ("a", "c"))
LAST = Role("monarch_summarize_last", "summarize", "summarize", ("qhat", "k", "v"), _SUMMARIES, values=True)
EXACT = Role("monarch_exact", "exact", "near", _QKV, _GROUPS, values=True, near=True)
WEIGH = Role("monarch_weigh", "attend", "attend", ("q", "a", "c"), ("neg_lse",), far=True)
REPRESENT = Role("monarch_represent", "represent", "represent", ("q", "a", "neg_lse"), ("qhat",))
EXCHANGE = Role("monarch_exchange", "exchange", "represent", ("q", "a", "c"), ("qhat",), far=True)
ATTEND = Role("monarch_attend", "attend", "attend", ("q", "a", "y", "c"), ("z",), values=True, far=True)
TOTALS = Role("monarch_totals", "attend", "attend", ("q", "a", "c"), ("neg_lse",), far=True, choosing=True)
MASSES = Role("monarch_masses", "masses", "represent", ("q", "a", "c", "neg_lse"), ("masses",), choosing=True)
CHOOSE = Role("monarch_choose", "choose", "represent", ("masses",), ("taken", "left"))
FAR = Role("monarch_attend_far", "attend", "attend", ("q", "a", "y", "c"), ("z", "lse"), values=True, choosing=True)
ATTEND_WITH_LSE = replace(ATTEND, writes=("z", "lse"))


def roles(ir: MonarchAttention, schedule: Schedule) -> tuple[Role, ...]:
    """The kernels of one attention, in the order in which they are launched (a role may repeat)."""
    if ir.lists_exact_keys:
        return (ONLY, *((TOTALS, MASSES, CHOOSE) if ir.form.chosen else ()), EXACT, ATTEND)
    near, identity = ir.form.has_exact_keys, ir.form.init == "identity"
    fused = near and schedule.fused and can_fuse(ir)
    sequence = [EXACT] if near and not fused else []
    if not identity:
        sequence.append(MEAN)
    for step in range(ir.form.num_iters - 1):
        sequence.append(FIRST if identity and step == 0 else NEXT)
        sequence += [EXCHANGE] if schedule.exchange else [WEIGH, REPRESENT]
    last = FUSED if fused else ONLY if identity and ir.form.num_iters == 1 else LAST
    return (*sequence, last, ATTEND)


def shares_prefix(ir: MonarchAttention, schedule: Schedule) -> bool:
    """Whether stage 1 computes the exact rows of a prefix, block by block, and stage 2 joins them."""
    block, width = ir.form.block_size, max(padded(ir.head_dim), padded(ir.value_dim))
    fused = schedule.fused and can_fuse(ir) and LEAST_SHARED_BLOCK < block <= schedule.summarize.step
    return fused and 0 < ir.form.prefix <= SHARED_PREFIX and width <= MOST_SHARED_WIDTH
