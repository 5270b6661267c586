"""Fixtures for tests that run kernels: buffers that start as NaN, and Triton's interpreter."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that kernels write starts as NaN, so that whatever they fail to write is seen."""
    from monarch_compile.codegen import launcher  # late: it may import triton, which tests/conftest.py must do first

    def allocate(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
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
