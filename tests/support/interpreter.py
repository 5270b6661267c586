"""Fixtures for tests that run kernels: buffers that start as NaN, and Triton's interpreter."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch


def prefer_interpreter() -> None:
    """Without a CUDA device, let kernels run in Triton's interpreter.

    Triton's own library (tl.max, tl.sum) takes a side when triton is first imported, so that import happens here; our
    kernels take theirs when they are loaded. The variable itself is put back: nothing else should be interpreted.
    """
    if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ or not importlib.util.find_spec("triton"):
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that kernels write starts as NaN, so that whatever they fail to write is seen.

    Not where sizes are symbolic: Inductor merges equal constants and copies those that kernels write, and that of torch
    2.11 cannot trace such a copy.
    """
    from monarch_compile.codegen import launcher  # late: it may import triton, which tests/conftest.py must do first

    def allocate(like: torch.Tensor, shape: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        if any(isinstance(size, torch.SymInt) for size in shape):
            return like.new_empty(tuple(shape), dtype=dtype)
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        return like.new_full(tuple(shape), poison, dtype=dtype)

    monkeypatch.setattr(launcher, "_allocate", allocate)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels loaded in this test run in Triton's interpreter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    if not isinstance(language.max, interpreter.InterpretedFunction):
        pytest.skip("triton was imported to compile; set TRITON_INTERPRET=1 to interpret kernels beside a CUDA device")
    if not _loops_to_run_time_bounds(interpreter):
        pytest.skip("this triton's interpreter does not fit this numpy (it calls int() on a 1-d array)")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    builder = interpreter.InterpreterBuilder
    plain = builder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        """The interpreter keeps bfloat16 as its bits and multiplies those: widen them first."""
        a, b = (_widened(x, interpreter.TensorHandle, language) for x in (a, b))
        return plain(self, a, b, d, input_precision, max_num_imprecise_acc)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    _check_bounds(monkeypatch, interpreter)


def _check_bounds(monkeypatch: pytest.MonkeyPatch, interpreter) -> None:  # type: ignore[no-untyped-def]
    """Every place that a kernel reads or writes lies in a tensor that it was given."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    first = last = np.zeros(0, np.uint64)

    def checked_call(self, *arguments, **options):  # type: ignore[no-untyped-def]
        nonlocal first, last
        storages = [x.untyped_storage() for x in arguments if isinstance(x, torch.Tensor)]
        ranges = sorted((x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages)
        first, last = (np.array(ends, np.uint64) for ends in zip(*ranges, strict=True))
        return call(self, *arguments, **options)

    def check(pointers, mask, size: int) -> None:  # type: ignore[no-untyped-def]
        places = np.asarray(pointers.data).astype(np.uint64)[np.asarray(mask.data).astype(bool)]
        tensor = np.searchsorted(first, places, side="right").astype(np.int64) - 1
        inside = (tensor >= 0) & (places + np.uint64(size) <= last[tensor])
        assert inside.all(), f"a kernel reaches outside of its tensors at {np.count_nonzero(~inside)} places"

    def checked_load(self, pointers, mask, *rest):  # type: ignore[no-untyped-def]
        check(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):  # type: ignore[no-untyped-def]
        check(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "__call__", checked_call)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


def _loops_to_run_time_bounds(interpreter) -> bool:  # type: ignore[no-untyped-def]
    """Whether a tensor can bound a loop: triton 3.6 interprets by int() of a 1-d array, numpy 2.5 refuses."""
    source = inspect.getsource(interpreter)
    if "int(self.handle.data)" not in source:
        return True
    try:
        return int(np.array([3])) == 3
    except TypeError:
        return False


def _widened(handle, tensor_handle, language):  # type: ignore[no-untyped-def]
    if handle.dtype.scalar != language.bfloat16:
        return handle
    return tensor_handle((handle.data.astype(np.uint32) << 16).view(np.float32), language.float32)
