"""The text of the kernel of the far field alone, and of programs of one stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention.kernels import canonical
from monarch_compile.codegen.attention.partial import FAR_FIELD, SUMMARIES
from monarch_compile.codegen.attention.schedule import choose_schedule
from monarch_compile.codegen.attention.specialization import expected
from monarch_compile.codegen.render import sources
from tests.support.kernels import check_text

BASE = MonarchAttention(1, 12, 12, 65536, 65536, 64, 64, torch.bfloat16, Form(64, window=1), 1.0)
GOLDENS = {
    "far_window": BASE,
    "far_masked": BASE.changed(window=None, mask=MaskKind.KEY_PADDING, seq_len_q=2048, seq_len_k=2048, block_size=32),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_sources(name: str, check_golden: Callable[[str, str], None]) -> None:
    ir = GOLDENS[name]
    schedule = choose_schedule(ir, (9, 0))
    (source,) = sources(FAR_FIELD.program_of(ir, schedule, expected(ir, schedule)))
    check_text(source)
    check_golden(f"{name}_{source.name}.py.txt", source.text)


@pytest.mark.parametrize("window", [None, 1])
def test_stage_1_gives_all_that_it_writes(window: int | None) -> None:
    ir = BASE.changed(window=window)
    program = SUMMARIES.program(canonical(ir), choose_schedule(ir, (9, 0)), expected(ir, choose_schedule(ir, (9, 0))))
    written = {buffer.name for kernel in program.kernels for buffer in kernel.writes}
    assert set(program.outputs) == written
    assert set(program.outputs) == {"a", "y", "c"} | ({"near", "z"} if window else set())
