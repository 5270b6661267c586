"""The emitted text of block linears, and what it compiles to with no GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from monarch_compile.codegen.linear.emitter import EMITTER
from monarch_compile.codegen.linear.schedule import choose_schedule, read_schedule
from monarch_compile.codegen.render import sources
from monarch_compile.codegen.tiling import shared_limit
from monarch_compile.linear.ir import (
    BLAST,
    FUSED,
    INTERLEAVED,
    MONARCH,
    SPLIT,
    STAGED,
    BlockLinear,
    FormedLinear,
    LinearGradients,
)
from tests.support.kernels import check_text

LAYER = BlockLinear(MONARCH, 8192, 4096, 4096, 16, 16, 64, torch.float16)
BLAST_LAYER = {"kind": BLAST, "rank": 1024}
ODD: dict[str, Any] = {
    "tokens": "s0",
    "in_features": 36,
    "out_features": 60,
    "in_blocks": 2,
    "out_blocks": 3,
    "rank": 5,
    "dtype": torch.float32,
    "bias": True,
    "output_order": INTERLEAVED,
    "activation": "gelu",
}
GOLDENS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": (FUSED, {}),
    "one_token": (SPLIT, {"tokens": 1, "dtype": torch.bfloat16, "activation": "relu"}),
    "staged": (STAGED, {}),
    "odd": (FUSED, ODD),
    "odd_staged": (STAGED, ODD),
    "blast": (STAGED, BLAST_LAYER),
}
"""Form, and what differs from `LAYER`."""
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "quarter": (FUSED, {"rank": 32}),
    "few": (STAGED, {"tokens": 1}),
    "gradients": ("gradients", {}),
}
"""What is compiled beside the goldens."""
COMPILED = """
import dataclasses, json
import torch
from monarch_compile.codegen.linear.emitter import EMITTER
from monarch_compile.codegen.tuning.compiler_report import compile_report
from tests.linear.unit.test_codegen import GOLDENS, MORE, ir_of
for name in GOLDENS | MORE:
    ir = EMITTER.bucketed(ir_of(name))
    schedule = EMITTER.choose_schedule(ir, (9, 0))
    for kernel in EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule)).kernels:
        print(json.dumps({**dataclasses.asdict(compile_report(kernel)), "ptx": "", "of": name}))
"""


def ir_of(name: str) -> FormedLinear | LinearGradients:
    form, changes = (GOLDENS | MORE)[name]
    of = replace(LAYER, **changes)
    return LinearGradients(of) if form == "gradients" else FormedLinear(of, form)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_sources(name: str, check_golden: Callable[[str, str], None]) -> None:
    ir = ir_of(name)
    schedule = choose_schedule(EMITTER.bucketed(ir))
    for source in sources(EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule))):
        check_text(source)
        check_golden(f"linear_{name}_{source.name}.py.txt", source.text)


@pytest.mark.slow
def test_it_compiles_for_hopper_without_spills() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True, env=env)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {report["of"] for report in reports} == set(GOLDENS | MORE)
    for report in reports:
        assert report["local_bytes"] <= 8, report
        assert report["shared_bytes"] <= shared_limit((9, 0)), report
        on_tensor_cores = report["has_wgmma"] or report["has_mma"]
        adds = report["name"] in ("blast_linear_couple", "monarch_linear_add")
        assert on_tensor_cores == (not adds and not report["of"].startswith("odd")), report


@pytest.mark.parametrize("name", ["layer", "one_token", "staged", "gradients"])
def test_a_schedule_is_read_back(name: str) -> None:
    schedule = choose_schedule(ir_of(name))
    assert read_schedule(json.loads(json.dumps(asdict(schedule)))) == schedule


def test_a_description_names_all_that_a_schedule_depends_on() -> None:
    shape = "f16 4096->4096 blocks 16x16 rank 64 | tokens 8192"
    assert EMITTER.describe(ir_of("layer")) == f"linear monarch fused {shape}"
    assert EMITTER.describe(ir_of("gradients")) == f"linear monarch gradients {shape}"
    assert not EMITTER.tuning.applies(LAYER)
    assert EMITTER.tuning.applies(ir_of("layer"))


def test_without_a_form_it_is_that_of_the_number_of_tokens() -> None:
    few, many = (EMITTER.bucketed(replace(LAYER, tokens=tokens)) for tokens in (1, 8192))
    assert (few.form, many.form) == (STAGED, STAGED)
    assert EMITTER.bucketed(replace(LAYER, **BLAST_LAYER)).form == STAGED
