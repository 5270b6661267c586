"""Run time of the emitted kernels: a launcher per problem, built once, called inside the body of the operator."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monarch_compile.codegen.emit import (
    MEAN,
    OUTER,
    STRIDES,
    WEIGH,
    Role,
    emit,
    pitch,
    role_tiling,
    steps,
)
from monarch_compile.codegen.facts import Facts, apart_of, facts_of, sees_strides
from monarch_compile.codegen.rows import exact_rows
from monarch_compile.codegen.schedule import ALL, TUNED_ON, Schedule, Tiling, choose_schedule, padded
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.errors import CodegenError
from monarch_compile.form import Form
from monarch_compile.groups import centred
from monarch_compile.ir import Dim, MaskKind, MonarchAttention, count_blocks, is_exact

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)
MAX_BLOCKS_KEY = 1024
"""Schedules look no further than this number of blocks, so that few launchers serve all long sequences."""

MAX_ROWS_KEY = 128
"""Nor further than this number of queries in a block: no tile has more rows. Also what an unknown number is."""


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    *,
    scale: float,
    **options: Any,
) -> Tensor:
    """Monarch attention by the emitted kernels; the meaning and the shapes are those of `reference.reference`.

    options: those of `Form`.

    q, k, v and key_mask are read through their strides; sizes may be symbolic. Works eagerly, under fake tensors and
    inside `torch.library.triton_op`, and on CPU tensors when TRITON_INTERPRET=1.

    Raises:
        CodegenError: no kernel exists for this dtype, head size or device, or triton is not installed.
    """
    group = 1 if q.shape[1] == k.shape[1] else int(q.shape[1] // k.shape[1])
    form = _form(**options)
    if is_exact(q.shape[2], k.shape[2], form.block_size, form.prefix):
        return exact_rows(q, k, v, key_mask, scale).transpose(1, 2).contiguous().transpose(1, 2)
    num_blocks = count_blocks(k.shape[2], form.block_size, form.prefix)
    blocks_key = _blocks_key(num_blocks) if isinstance(num_blocks, int) else None
    rows_key = 0 if q.shape[2] == k.shape[2] else _rows_key(_rows(q, num_blocks))
    masked = key_mask is not None
    biased = key_mask is not None and key_mask.is_floating_point()
    if key_mask is not None and biased:
        key_mask = centred(key_mask)
    problem = Problem(int(q.shape[3]), int(v.shape[3]), q.dtype, form, scale, masked, group, rows_key, biased)
    launcher = build(problem, blocks_key, capability_of(q.device), is_interpreted())
    with _on_device(q):
        return launcher(q, k, v, key_mask, num_blocks)


_form = functools.lru_cache(maxsize=1024)(Form)
"""Checked once: a call of eager code waits for it."""


@dataclass(frozen=True)
class Problem:
    """Everything that the text of the kernels depends on, but for the schedule.

    rows_key: 0 where queries and keys have one length, and blocks of one size; else the bucket of the number of queries
    in a block, whose largest number its schedule is made for. masked, biased: whether there is a key mask, and whether
    it is added to the scores.
    """

    head_dim: int
    value_dim: int
    dtype: torch.dtype
    form: Form
    scale: float
    masked: bool = False
    group: int = 1
    rows_key: int = 0
    biased: bool = False

    @staticmethod
    def of(ir: MonarchAttention) -> Problem:
        """The problem of an IR."""
        masked, biased = ir.mask is not MaskKind.NONE, ir.mask is MaskKind.KEY_BIAS
        rows_key = _rows_key(ir.block_size_q) if ir.is_cross else 0
        return Problem(ir.head_dim, ir.value_dim, ir.dtype, ir.form, ir.scale, masked, ir.group, rows_key, biased)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `launch` and of `reference.reference`."""
        return {"scale": self.scale, **asdict(self.form)}

    def num_blocks(self, seq_len: Any) -> Any:
        """How many blocks hold the keys that follow the prefix."""
        return count_blocks(seq_len, self.form.block_size, self.form.prefix)

    def blocks_key(self, seq_len: int) -> int:
        """The bucket of the number of blocks, whose largest number its schedule is made for."""
        return _blocks_key(max(1, self.num_blocks(seq_len)))

    def largest(self, blocks_key: int) -> MonarchAttention:
        """The IR of the most keys in a bucket, which its schedule is made for."""
        return self.ir(blocks_key * self.form.block_size + self.form.prefix)

    def ir(self, seq_len: Dim) -> MonarchAttention:
        """The IR of this problem at one number of keys, with queries as many, or as their blocks are to hold."""
        mask = MaskKind.KEY_BIAS if self.biased else MaskKind.KEY_PADDING if self.masked else MaskKind.NONE
        seq_len_q = seq_len
        if self.rows_key and isinstance(seq_len, int):
            seq_len_q = self.rows_key * -(-seq_len // self.form.block_size)
            seq_len_q -= seq_len_q == seq_len  # as many as keys would be another problem, whose schedules differ
        elif self.rows_key:
            seq_len_q = f"{seq_len}_q"
        return MonarchAttention(
            batch="B",
            num_heads="H" if self.group == 1 else f"{self.group}*H",
            num_kv_heads="H",
            seq_len_q=seq_len_q,
            seq_len_k=seq_len,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            form=self.form,
            scale=self.scale,
            mask=mask,
        )


@functools.cache
def build(problem: Problem, blocks_key: int | None, capability: tuple[int, int] | None, interpreted: bool) -> Launcher:
    """The launcher of a problem with about `blocks_key` blocks (None: unknown); emits and loads its kernels once.

    `interpreted` says how Triton is running: it only keeps compiled and interpreted launchers apart.
    """
    chosen = _CHOSEN.get((problem, blocks_key, capability)) if blocks_key is not None else None
    ir = problem.ir("N") if blocks_key is None else problem.largest(blocks_key)
    return Launcher(problem, chosen or choose_schedule(ir, capability))


_CHOSEN: dict[tuple[Problem, int, tuple[int, int] | None], Schedule] = {}


def use(problem: Problem, blocks_key: int, capability: tuple[int, int] | None, schedule: Schedule) -> None:
    """From now on, in this process, launch `problem` with `schedule` where it has about `blocks_key` blocks."""
    if _CHOSEN.get((problem, blocks_key, capability)) != schedule:
        _CHOSEN[problem, blocks_key, capability] = schedule
        build.cache_clear()


def schedule_for(ir: MonarchAttention) -> Schedule:
    """What this process launches `ir` with, as far as is known without a device: a tuned schedule, or the shipped one.

    Raises:
        CodegenError: no kernel exists for `ir`.
    """
    if isinstance(ir.seq_len_k, int):
        problem = Problem.of(ir)
        place = problem, problem.blocks_key(ir.seq_len_k)
        for (*found, _), schedule in _CHOSEN.items():
            if tuple(found) == place:
                return schedule
    return choose_schedule(ir)


def plainly(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` with its kernels launched without tracing, as the operator launches them in eager mode."""
    from torch._library.triton import set_wrap_triton_enabled

    def launched() -> Tensor:
        with set_wrap_triton_enabled(False):
            return call()

    return launched


class Step(NamedTuple):
    """One kernel as it is launched: `parameters` are the names of its arguments."""

    role: Role
    kernel: Any
    parameters: tuple[str, ...]
    tiling: Tiling


class Launcher:
    """The loaded kernels of one problem under one schedule, and the order in which they run."""

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self.problem = problem
        self.schedule = schedule
        self._wrap = _wrapper()
        self._steps: dict[Facts, tuple[Step, ...]] = {}

    def steps(self, facts: Facts) -> tuple[Step, ...]:
        """What is launched in turn where `facts` hold; emitted and loaded once."""
        if facts not in self._steps:
            ir, schedule = self.problem.ir("N"), self.schedule
            loaded = {source.name: (source.load(), source.parameters) for source in emit(ir, schedule, facts)}
            order = steps(ir, schedule)
            self._steps[facts] = tuple(Step(r, *loaded[r.name], role_tiling(r, schedule)) for r in order)
        return self._steps[facts]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, num_blocks: Dim) -> Tensor:
        """Run every kernel in turn: q (E, H, N_q, D), k (E, H_kv, N_k, D), v (E, H_kv, N_k, D_v) -> (E, H, N_q, D_v).

        The output is laid out (E, N_q, H, D_v).
        """
        most = self.schedule.most_blocks
        if most is not None and not (isinstance(num_blocks, int) and num_blocks <= most):
            raise CodegenError(f"these kernels are for at most {most} blocks; found {num_blocks}")
        heads = q.shape[0] * q.shape[1]
        values: dict[str, Any] = {
            "num_heads": q.shape[1],
            "num_blocks": num_blocks,
            "block_q": self._rows(q, num_blocks),
        }
        values |= {"seq_len": q.shape[2], "seq_len_q": q.shape[2], "seq_len_k": k.shape[2]}
        rows = self._prefix_rows(q, k, v, key_mask) if self.problem.form.prefix else None
        for name, tensor in (("q", q), ("k", k), ("v", v), ("key_mask", key_mask), ("rows", rows)):
            if tensor is not None:
                values[name] = tensor
                values.update(zip(STRIDES[name], tensor.stride(), strict=True))
        for role, kernel, parameters, tiling in self.steps(self._facts(values)):
            self._allocate_outputs(role, values, heads)
            grid = (heads * _programs_per_head(role, tiling, num_blocks, values["block_q"]),)
            arguments = [values[name] for name in parameters]
            self._wrap(kernel)[grid](*arguments, num_warps=tiling.num_warps, num_stages=tiling.num_stages)
        output: Tensor = values["z"]
        return output.transpose(1, 2)

    def _prefix_rows(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        prefix = self.problem.form.prefix
        first: Tensor = torch.ops.aten.slice.Tensor(q, 2, 0, prefix)  # indexing would ask for a device
        return exact_rows(first, k, v, key_mask, self.problem.scale)

    def _allocate_outputs(self, role: Role, values: dict[str, Any], heads: Any) -> None:
        problem, q, num_blocks, rows = self.problem, values["q"], values["num_blocks"], values["block_q"]
        head_pitch, value_pitch = pitch(problem.head_dim), pitch(problem.value_dim)
        per_block = (heads, rows, num_blocks)
        if role.near:
            values["near"] = _allocate(q, per_block, torch.float32)
        if "z" in role.tensors and "z" not in values:
            values["z"] = _allocate(q, (q.shape[0], q.shape[2], q.shape[1], problem.value_dim), q.dtype)
        if role.template == "summarize":
            values["a"] = _allocate(q, (*per_block, head_pitch), q.dtype)
            values["c"] = _allocate(q, per_block, torch.float32)
            if role.values:
                values["y"] = _allocate(q, (*per_block, value_pitch), q.dtype)
        elif role is WEIGH:
            values["unlog"] = _allocate(q, per_block, torch.float32)
        elif "qhat" in role.tensors:
            representatives = 1 if role is MEAN else num_blocks
            row = representatives * head_pitch
            values["qhat"] = _allocate(q, (heads, rows, representatives, head_pitch), q.dtype)
            strides = (rows * row, 0 if role is MEAN else head_pitch, row)
            values.update(zip(STRIDES["qhat"], strides, strict=True))

    def _facts(self, values: Mapping[str, Any]) -> Facts:
        """What holds of these tensors and sizes; nothing is asked of symbolic ones, lest it be guarded on."""
        num_blocks, rows, problem = values["num_blocks"], values["block_q"], self.problem
        row = max(pitch(problem.head_dim), pitch(problem.value_dim))
        reaches = [rows * num_blocks * row, values["seq_len_q"] * values["num_heads"] * problem.value_dim]
        for name, outer in (("q", 2), ("k", 2), ("v", 2), ("rows", 2), ("key_mask", 1)):  # dims that 64 bits address
            if name in values:
                sides = zip(values[name].shape[outer:], values[name].stride()[outer:], strict=True)
                reaches.append(sum(size * stride for size, stride in sides))
        keys = values["seq_len_k"] - problem.form.prefix, problem.form.block_size
        queries = values["seq_len_q"] - problem.form.prefix, rows
        return facts_of(num_blocks, queries, keys, self.schedule, reaches, self._apart(values))

    def _apart(self, values: Mapping[str, Any]) -> int:
        """`Facts.apart` of what is read by strides that we did not choose."""
        problem = self.problem
        if sees_strides(problem.head_dim, problem.value_dim):
            return 1
        tensors = (values[name] for name in OUTER if name in values)
        strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
        return apart_of(problem.head_dim, problem.value_dim, problem.dtype, strides)

    def _rows(self, q: Tensor, num_blocks: Any) -> Any:
        return _rows(q, num_blocks) if self.problem.rows_key else self.problem.form.block_size


def _programs_per_head(role: Role, tiling: Tiling, num_blocks: Any, rows: Any) -> Any:
    if role.template in ("summarize", "exact"):
        return num_blocks * (1 if tiling.turns == ALL else (rows + tiling.rows - 1) // tiling.rows)
    if role.template in ("mean_query", "exchange") or tiling.turns == ALL:
        return rows
    return rows // tiling.turns * ((num_blocks + tiling.rows - 1) // tiling.rows)


def _rows(q: Tensor, num_blocks: Any) -> Any:
    """Queries in a block, where they are another number than the keys in one."""
    return (q.shape[2] + num_blocks - 1) // num_blocks


def _wrapper() -> Callable[[Any], Any]:
    """What makes a kernel visible to tracing, applied at every call; the interpreter has no tracing."""
    return (lambda kernel: kernel) if is_interpreted() else torch.library.wrap_triton


def _allocate(like: Tensor, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Every buffer that a kernel writes comes from here, uninitialised."""
    return like.new_empty(tuple(shape), dtype=dtype)


def _blocks_key(num_blocks: int) -> int:
    return min(MAX_BLOCKS_KEY, 1 << (num_blocks - 1).bit_length())


def _rows_key(rows: Any) -> int:
    return min(MAX_ROWS_KEY, padded(rows)) if isinstance(rows, int) else MAX_ROWS_KEY


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where there is none to ask (the interpreter, fake tensors)."""
    if device.type == "cpu" and is_interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        raise CodegenError(f"kernels run on NVIDIA devices, or on the CPU under TRITON_INTERPRET=1; found {device}")
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise CodegenError(f"kernels need compute capability {MIN_CAPABILITY} or later; {device} has {capability}")
    name = torch.cuda.get_device_name(device)
    if name not in TUNED_ON:
        logger.info(
            "schedules ship for %s; those for %s come from a heuristic: `monarch-compile tune` or "
            'options={"autotune": True} looks for better ones',
            ", ".join(TUNED_ON),
            name,
        )
    return capability


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    index = tensor.device.index
    if index is None or tensor.device.type != "cuda" or not torch.cuda.is_available():
        return contextlib.nullcontext()
    return contextlib.nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)
