"""The emitted text of Monarch linears, and what it compiles to with no GPU at hand."""

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
from monarch_compile.linear.ir import INTERLEAVED, MONARCH, BlockLinear

LAYER = BlockLinear(MONARCH, 8192, 4096, 4096, 16, 16, 64, torch.float16)
GOLDENS: dict[str, dict[str, Any]] = {
    "layer": {},
    "one_token": {"tokens": 1, "dtype": torch.bfloat16, "activation": "relu"},
    "odd": {
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
    },
}
COMPILED = """
import dataclasses, json
import torch
from monarch_compile.codegen.linear.emitter import EMITTER
from monarch_compile.codegen.tuning.compiler_report import compile_report
from tests.linear.unit.test_codegen import GOLDENS, ir_of
for name in GOLDENS:
    ir = EMITTER.bucketed(ir_of(name))
    schedule = EMITTER.choose_schedule(ir, (9, 0))
    (kernel,) = EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule)).kernels
    print(json.dumps({**dataclasses.asdict(compile_report(kernel)), "ptx": ""}))
"""


def ir_of(name: str) -> BlockLinear:
    return replace(LAYER, **GOLDENS[name])


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_sources(name: str, check_golden: Callable[[str, str], None]) -> None:
    ir = ir_of(name)
    schedule = choose_schedule(EMITTER.bucketed(ir))
    (source,) = sources(EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule)))
    check_golden(f"linear_{name}_{source.name}.py.txt", source.text)


@pytest.mark.slow
def test_it_compiles_for_hopper_without_spills() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True, env=env)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == len(GOLDENS)
    for report in reports:
        assert report["local_bytes"] == 0
        assert report["shared_bytes"] <= shared_limit((9, 0))
    assert [report["has_wgmma"] or report["has_mma"] for report in reports] == [True, True, False]


def test_a_schedule_is_read_back() -> None:
    schedule = choose_schedule(LAYER)
    assert read_schedule(json.loads(json.dumps(asdict(schedule)))) == schedule


def test_a_description_names_all_that_a_schedule_depends_on() -> None:
    assert EMITTER.describe(LAYER) == "linear f16 4096->4096 blocks 16x16 rank 64 | tokens 8192"
    assert not EMITTER.tuning.applies(LAYER)
    assert EMITTER.tuning.sized(replace(LAYER, tokens="s0")).tokens == 1024
