"""The context in which scaled_dot_product_attention is attention over a sequence that lies on several ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from monarch_compile import autocast
from monarch_compile.agreement import require_equal
from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.attention.parallel.attend import Shared
from monarch_compile.attention.parallel.costs import METHODS
from monarch_compile.attention.parallel.exchange import Ranks, from_all
from monarch_compile.attention.parallel.op import attend_in_graphs
from monarch_compile.attention.parallel.spread import Spread, even_block_size
from monarch_compile.errors import ConfigError, InputError, IRError
from monarch_compile.version import __version__

OPTIONS = (*FORM_OPTIONS, "grid")
ATTENTION = ("scaled_dot_product", "multi_head_attention", "transformer_encoder_layer", "flex_attention")
"""Parts of the names of PyTorch's functions and operators that compute attention."""


class SequenceParallel(TorchFunctionMode):
    """The context of `sequence_parallel`, and the cut of tensors into the ranks' pieces."""

    def __init__(self, mesh: Any, seq_len: int | None, method: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        if mesh.ndim != 1:
            raise ConfigError(f"sequence_parallel takes a mesh of one dim, such as mesh['sequence']; found {mesh}")
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown or method not in ("auto", *METHODS):
            found = f"found {', '.join(unknown)}" if unknown else f"found method {method!r}"
            raise ConfigError(f"options are {', '.join(OPTIONS)}, methods auto, {', '.join(METHODS)}; {found}")
        self._ranks = Ranks.of(mesh.get_group())
        self._kind = str(mesh.device_type)
        self._seq_len, self._method = seq_len, method
        self._grid = None if options.get("grid") is None else tuple(options["grid"])
        self._options = {"window": 1, **{name: options[name] for name in options if name != "grid"}}
        self._auto = self._options.get("block_size", "auto") == "auto" and self._options.get("tile") is None
        if self._auto or self._options.get("tile") is not None:
            self._options["block_size"] = 1 if self._auto else math.prod(self._options["tile"])
        try:
            self._form = Form(**self._options)
        except IRError as error:
            raise ConfigError(f"option {error}") from None
        versions = {"monarch_compile": __version__, "torch": torch.__version__}
        given = {"seq_len": seq_len, "method": method, "block size 'auto'": self._auto, "grid": self._grid}
        require_equal("sequence_parallel", {**versions, **given, **asdict(self._form)}, self._ranks.group)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's piece of a tensor that all ranks have whole, with the sequence along `dim`: a view.

        Raises:
            InputError: the tensor has another length than `seq_len`.
        """
        spread = self._spread_of(x.shape[dim], whole=True)
        if x.shape[dim] != spread.seq_len:
            raise InputError(f"the sequence has {spread.seq_len} tokens; found {x.shape[dim]} along dim {dim}")
        rank = self._ranks.rank
        return x.narrow(dim, spread.start_of(rank), spread.tokens_of(rank))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole tensor, on all ranks, of which each has its piece along `dim`. Differentiable: gradients of all
        ranks are added."""
        spread = self._spread_of(x.shape[dim])
        spread.require_piece(self._ranks.rank, x.shape[dim])
        return from_all(x, dim % x.ndim, [spread.tokens_of(rank) for rank in range(self._ranks.size)], self._ranks)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any function but attention as it is.

        Raises:
            InputError: it computes attention inside, which would be that of a rank's own tokens.
        """
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        # Dynamo knows functions by identity, and not all of them by name.
        if func is multi_head_attention_forward or (not torch.compiler.is_compiling() and _attends(func)):
            raise InputError(
                f"{func.__name__} computes attention of a rank's own tokens alone; attention over several ranks takes "
                "calls of torch.nn.functional.scaled_dot_product_attention"
            )
        if func is Tensor.unflatten or func is torch.unflatten:
            func = torch.ops.aten.unflatten.int  # Dynamo does not trace these, inside of a mode
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise InputError(f"attention over several ranks has no dropout; found dropout_p={dropout_p}")
        if query.ndim != 4 or key.ndim != 4:
            shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
            raise InputError(f"attention over several ranks takes (batch, num_heads, tokens, dim); found {shapes}")
        target = autocast.target_of(query.device.type)
        q, k, v = (x.to(autocast.cast(x.dtype, target)) for x in (query, key, value))
        factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        spread = self._spread_of(int(q.shape[2]))
        form = self._form if not self._auto else Form(**{**self._options, "block_size": spread.block_size})
        shared = Shared(spread, form, factor, self._grid, is_causal, self._method)
        return attend_in_graphs(q, k, v, _key_mask(attn_mask, k), shared, self._ranks)

    def _spread_of(self, tokens: int, *, whole: bool = False) -> Spread:
        """How the sequence lies on the ranks, where a rank's piece, or with `whole` all of it, is so long."""
        ranks, form = self._ranks.size, self._form
        seq_len = self._seq_len
        if seq_len is None:
            seq_len = tokens if whole else tokens * ranks
            if form.prefix:
                raise InputError("with a prefix, pieces differ in length: give seq_len")
            if seq_len % ranks:
                raise InputError(f"{seq_len} tokens are not as many for each of {ranks} ranks: give seq_len")
        block_size = form.block_size
        if self._auto:
            block_size = auto_block_size(seq_len, self._kind, form.window, form.prefix)
            if self._seq_len is None:
                block_size = even_block_size(seq_len // ranks, block_size)
        return Spread(seq_len, ranks, block_size, form.prefix, form.prefix_at_end)


def _attends(func: Any) -> bool:
    """Whether a function computes attention, by its name."""
    name = getattr(func, "__name__", "")
    return any(part in name for part in ATTENTION)


def _key_mask(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The mask of the rank's own keys, (E, n).

    Raises:
        InputError: it may differ by head or query.
    """
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    if any(mask.shape[dim] != 1 and mask.stride(dim) != 0 for dim in (1, 2)):
        raise InputError(
            f"attention over several ranks takes masks of keys, (batch, 1, 1, tokens); found {tuple(mask.shape)}"
        )
    return mask[:, 0, 0].expand(k.shape[0], k.shape[2])


def sequence_parallel(
    mesh: Any, *, seq_len: int | None = None, method: str = "auto", **options: Any
) -> SequenceParallel:
    """A context in which scaled_dot_product_attention is Monarch attention over the sequence that a mesh's ranks hold.

    Each rank holds a piece of the tokens, in their order. A piece is as many whole blocks as all others, the last
    pieces shorter where tokens run out, and the tokens of a prefix are on the first rank beside its piece (on the last
    with prefix_at_end). `shard` of the result cuts so. Inside the context, all calls are such attention; one that
    cannot be raises InputError, since the exact attention of a piece alone would be wrong. Compiled functions may be
    called in it. Every rank makes the same calls, in training also the same backward passes.

    Args:
        mesh: a DeviceMesh of one dim, the ranks in the order of their pieces.
        seq_len: tokens of the whole sequence; None: all ranks hold as many, and no prefix.
        method: "heads": an all-to-all gives each rank some heads of the whole sequence (any form; the numbers of heads
            and of key heads must be multiples of the number of ranks). "offsets": ranks keep their tokens in stage 1
            and exchange summaries, whatever the number of heads (forms of one iteration from the identity start, with
            window and prefix). "auto": the faster by the cost model of those that are possible.
        options: those of `monarch_attention`: block_size (default "auto"), window (default 1), prefix, ...

    Returns:
        The context. Its `shard(x, dim)` gives a rank's piece of a tensor, its `gather(x, dim)` the tensor again.

    Raises:
        ConfigError: an option is unknown, has a value that is not allowed, or differs between ranks.
    """
    return SequenceParallel(mesh, seq_len, method, options)
