"""Calls of scaled_dot_product_attention in eager code: which are lowered, in which form, with which strides.

Sizes, dtypes, devices and options are judged by the rules of `signature`, once for all calls that agree in them; a
mask by its values, at every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from monarch_compile.attention.form import ACROSS, Form
from monarch_compile.attention.grids import grid_by_hand
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.attention.lengths import chosen_form, cost_refusal
from monarch_compile.attention.signature import Signature, first_broken
from monarch_compile.calls import EAGER, Calls, active_transform
from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import installed
from monarch_compile.refusal import Refusal, kernel_refusal

T = TypeVar("T")
Triple = tuple[T, T, T]

Masks = dict[str, Any]
"""Those for its mask, tensors, if it has one."""

NAMES = {1: "head", 2: "query"}
"""Dimensions of a mask that must not matter."""

# ---- is the call one of plain tensors, which runs now? ---------------------------------------------------------------

PLAIN = frozenset({Tensor, torch.nn.Parameter})

NOT_FOUR_DIMS = Refusal("rank", "queries, keys and values must be (batch, num_heads, seq_len, dim) of one batch")
TRACED = Refusal("traced", "the call is traced, not run: what its tensors hold is not known")
CAPTURED = Refusal("traced", "the mask's values cannot be read while a CUDA graph is captured")
TRANSFORMS = {
    "torch.func": Refusal("transformed", "the call is transformed by torch.func (vmap, grad, jacrev, jvp, ...)"),
    "forward_ad": Refusal("transformed", "the call runs under forward-mode differentiation, which the operator lacks"),
}


def not_plain(tensors: Sequence[Any]) -> Refusal | None:
    """Why these are not the numbers of one call that runs now: traced, transformed or held by a subclass."""
    for x in tensors:
        if type(x) not in PLAIN:
            if isinstance(x, FakeTensor) or not isinstance(x, Tensor):  # such as a Proxy of torch.fx
                return TRACED
            kind = type(x).__name__
            return NOT_FOUR_DIMS if x.is_nested else Refusal("tensor_subclass", f"a tensor is of the subclass {kind}")
        if x.is_nested:
            return NOT_FOUR_DIMS
        if x.layout is not torch.strided:
            return Refusal("layout", f"a tensor has the layout {x.layout}")
    return TRANSFORMS.get(active_transform()) or (TRACED if _traces() else None)


def _traces() -> bool:
    """Whether torch.jit.trace, make_fx or a mode such as FakeTensorMode watches this thread's calls."""
    if torch._C._get_tracing_state() is not None:
        return True
    ops: Any = torch._ops
    if not torch._C._len_torch_dispatch_stack() and not ops.mode_stack_state_for_pre_dispatch().count():
        return False
    return get_proxy_mode() is not None or any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


# ---- may calls of such sizes and options be lowered? -----------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What decides about a call, except for its mask's values; of query, key and value in turn."""

    shapes: Triple[torch.Size]
    dtypes: Triple[torch.dtype]
    devices: Triple[torch.device]
    mask_rank: int | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    trains: bool = False
    follows_cache: bool = False

    @property
    def signature(self) -> Signature:
        """What the rules of all attention are asked about."""
        shapes = (tuple(self.shapes[0]), tuple(self.shapes[1]), tuple(self.shapes[2]))
        scale = 1 / math.sqrt(shapes[0][3] or 1) if self.scale is None else self.scale
        kinds = frozenset(device.type for device in self.devices)
        return Signature(
            shapes,
            frozenset(self.dtypes),
            kinds,
            scale,
            is_causal=self.is_causal,
            follows_cache=self.follows_cache,
            dropout_p=self.dropout_p,
            trains=self.trains,
        )


@lru_cache(maxsize=16)
def decider(config: MonarchConfig) -> Callable[..., Form | Refusal]:
    """Decides on calls, under `config`: a decision is made once for all calls with the same facts."""

    @lru_cache(maxsize=4096)
    def decide(
        shapes: Triple[torch.Size],
        dtypes: Triple[torch.dtype],
        devices: Triple[torch.device],
        mask_rank: int | None,
        options: tuple[float, bool, float | None, bool, bool, bool],
    ) -> Form | Refusal:
        return judge(Facts(shapes, dtypes, devices, mask_rank, *options), config)

    return decide


def judge(facts: Facts, config: MonarchConfig) -> Form | Refusal:
    """The form in which such calls are lowered, or why they are not; a mask is taken to hide keys alone."""
    refusal = _call_refusal(facts)
    if refusal is not None:
        return refusal
    site, place = facts.signature, facts.devices[0]
    refusal = first_broken(site, config)
    if refusal is not None:
        return refusal
    missing = kernel_refusal(place)
    if missing is not None:
        return Refusal("no_kernels", missing)
    masked = MaskKind.NONE if facts.mask_rank is None else MaskKind.KEY_PADDING  # no form depends on which mask it is
    return _form(_problem(site, masked), place, config, Calls(EAGER, facts.trains))


def _call_refusal(facts: Facts) -> Refusal | None:
    """What is allowed in a call and never leads to a region of a graph."""
    q, k, v = facts.shapes
    if any(len(shape) != 4 for shape in facts.shapes) or len({q[0], k[0], v[0]}) > 1:
        return NOT_FOUR_DIMS
    grouped = facts.enable_gqa and k[1] > 0 and q[1] % k[1] == 0
    if k[1] != v[1] or (q[1] != k[1] and not grouped):
        return Refusal("gqa", f"{q[1]} query heads, {k[1]} of keys and {v[1]} of values")
    if len({*facts.devices}) > 1:
        return Refusal("device", f"q, k and v are on different devices: {', '.join(map(str, facts.devices))}")
    if facts.mask_rank is not None and facts.mask_rank > 4:
        return Refusal("rank", f"a mask of {facts.mask_rank} dims")
    return None


def _problem(site: Signature, mask: MaskKind) -> MonarchAttention:
    """What is computed, in blocks of one key until a form is chosen."""
    (q, k, v), (dtype,) = site.shapes, site.dtypes
    return MonarchAttention(q[0], q[1], k[1], q[2], k[2], q[3], v[3], dtype, Form(1), site.scale, mask, site.is_causal)


def _form(problem: MonarchAttention, place: torch.device, config: MonarchConfig, calls: Calls) -> Form | Refusal:
    """The options' form, chosen as the backend chooses it, or why exact attention is wanted."""
    device, seq_len, queries = installed(place), int(problem.seq_len_k), None
    if problem.is_cross:
        config, queries = replace(config, **ACROSS), problem.seq_len_q
    elif problem.follows_cache:
        queries = problem.seq_len_q
    if config.policy == "never":
        return Refusal("policy_never", "policy is 'never'")
    grid = None if problem.is_cross or problem.is_causal else grid_by_hand(config, seq_len)
    form = chosen_form(config, device.kind, seq_len, grid)
    if config.policy == "auto":
        sizes = {"auto": config.block_size == "auto", "batch": problem.batch, "seq_len": seq_len, "queries": queries}
        site = replace(problem, form=form, grid=None if grid is None else grid.sizes)
        refused = cost_refusal(site, device, {}, f"found {seq_len}", calls=calls, **sizes)
        if refused is not None:
            return refused
    return form


# ---- the mask --------------------------------------------------------------------------------------------------------


def key_mask(mask: Tensor, key: torch.Size) -> Masks | Refusal:
    """The mask, (batch, seq_len), by the name it has for monarch_attention: it must be one for every head and query.

    One that is to get a gradient must be so by its strides: equal values may be parameters of their own.
    """
    learned = mask.requires_grad and torch.is_grad_enabled()
    mask = mask[(None,) * (4 - mask.ndim)]
    for dim in (1, 2):
        by_strides = mask.shape[dim] == 1 or mask.stride(dim) == 0
        if by_strides:
            continue
        if learned:
            return Refusal("mask_general", f"the mask may differ by {NAMES[dim]}")
        if _is_captured(mask):
            return CAPTURED
        if not torch.equal(mask, mask.narrow(dim, 0, 1).expand_as(mask)):
            return Refusal("mask_general", f"the mask differs by {NAMES[dim]}")
    row = mask[:, 0, 0].expand(key[0], key[2])
    if mask.dtype == torch.bool:
        return {"key_padding_mask": ~row}
    if learned:
        return {"key_bias": row}
    if _is_captured(mask):
        return CAPTURED
    hidden = row <= torch.finfo(mask.dtype).min
    hides_only = bool((hidden | (row == 0)).all())
    return {"key_padding_mask": hidden} if hides_only else {"key_bias": row}


def keys_under_triangle(mask: Tensor, queries: int) -> Tensor | None:
    """What a bool mask (.., N_q, N_k) hides of every query, (.., 1, N_k), where it hides later keys beside; else None.

    Its last query is at the last key. A mask that is the same for all queries is none of these.
    """
    if mask.dtype != torch.bool or mask.ndim < 2 or not 1 < mask.shape[-2] == queries <= mask.shape[-1]:
        return None
    last = mask[..., -1:, :]
    if _is_captured(mask) or torch.equal(mask[..., :1, :], last):
        return None
    triangle = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril(mask.shape[-1] - queries)
    return last if torch.equal(mask, last & triangle) else None


def _is_captured(mask: Tensor) -> bool:
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- strides of the result -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Sizes, strides, dtype and device of a tensor, and whether it needs a gradient: SDPA chooses its kernel by these,
    and so the strides of its result."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trained: bool

    @staticmethod
    def of(x: Tensor, dtype: torch.dtype) -> Layout:
        return Layout(x.shape, x.stride(), dtype, x.device, x.requires_grad and torch.is_grad_enabled())

    def fake(self) -> Tensor:
        """Such a tensor, without memory where a fake mode is on."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.requires_grad_(self.trained)


Order = tuple[int, ...]
"""The dims of a tensor from the largest stride to the smallest."""


def eager_order(tensors: Sequence[Layout], scale: float | None, enable_gqa: bool) -> Order | Refusal:
    """That of SDPA's own result for query, key, value and, if there is one, mask; a refusal where it would raise."""
    return _eager_order(tuple(tensors), scale, enable_gqa, _kernels_allowed())


@lru_cache(maxsize=4096)
def _eager_order(
    tensors: tuple[Layout, ...], scale: float | None, enable_gqa: bool, allowed: tuple[bool, ...]
) -> Order | Refusal:
    scores = (*tensors[0].shape[:3], tensors[1].shape[2])
    try:
        for mask in tensors[3:]:
            _broadcast(mask.shape, scores)  # fake tensors would log the error
        with _fake_mode(), torch.enable_grad():
            q, k, v, *masks = (x.fake() for x in tensors)
            attn_mask = masks[0] if masks else None
            found = scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=enable_gqa)
    except Exception as error:
        return Refusal("sdpa_raises", f"scaled_dot_product_attention refuses it: {str(error).partition(chr(10))[0]}")
    strides = found.stride()
    return tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))


_broadcast: Any = torch.broadcast_shapes


@cache
def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode()


def _kernels_allowed() -> tuple[bool, ...]:
    """What else SDPA chooses its kernel by (torch.nn.attention.sdpa_kernel sets it)."""
    on: Any = torch.backends.cuda
    return on.flash_sdp_enabled(), on.mem_efficient_sdp_enabled(), on.math_sdp_enabled(), on.cudnn_sdp_enabled()


def in_order(x: Tensor, order: Order) -> Tensor:
    """`x` with the memory order `order`: a copy, unless it has that order already."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)
