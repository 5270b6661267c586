"""The emitted text of long convolutions, and what it compiles to with no GPU at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from monarch_compile.codegen.convolution.emitter import EMITTER
from monarch_compile.codegen.convolution.schedule import choose_schedule, read_schedule
from monarch_compile.codegen.render import sources
from monarch_compile.convolution import work
from monarch_compile.convolution.ir import FilterGradient, LongConvolution
from monarch_compile.errors import CodegenError, IRError
from tests.support.compiled import reports_of

COMPILED = """
import dataclasses, json, sys
import torch
from monarch_compile.codegen.convolution.emitter import EMITTER
from monarch_compile.codegen.convolution.kernels import Specialization
from monarch_compile.codegen.tuning.compiler_report import compile_report
from monarch_compile.convolution.ir import FilterGradient, LongConvolution
from monarch_compile.convolution.work import MOST_GRADIENT_POINTS
reports = []
for batch, points in json.loads(sys.stdin.read()):
    sizes = (batch, 768, points, points, points, points, 0)
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16)
    convolution = LongConvolution(*sizes, *dtypes, skip=True, pre_gate=True, post_gate=True)
    twice = dataclasses.replace(convolution, second_gate=True)
    gradient = (FilterGradient(convolution),) if points <= MOST_GRADIENT_POINTS else ()
    for ir in map(EMITTER.bucketed, (twice, *gradient)):
        for kernel in EMITTER.program_of(ir, EMITTER.choose_schedule(ir, (9, 0)), Specialization()).kernels:
            reports.append({**dataclasses.asdict(compile_report(kernel)), "points": points, "ptx": ""})
print(json.dumps(reports))
"""
SHARED_LIMIT = 227 * 1024


def ir_of(points: int, **changes: object) -> LongConvolution:
    sizes = {"batch": 16, "channels": 8, "seq_len": points, "filter_len": points, "transform_len": 2 * points}
    dtypes = {"dtype": torch.bfloat16, "filter_dtype": torch.float32, "out_dtype": torch.bfloat16}
    return LongConvolution(**{**sizes, **dtypes, "out_len": points, "lag": 0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("causal", {"skip": True}), ("circular", {"transform_len": 1000, "lag": 3, "pre_gate": True, "post_gate": True})],
)
def test_golden_sources(name: str, changes: dict[str, object], check_golden: Callable[[str, str], None]) -> None:
    ir = EMITTER.bucketed(ir_of(1000, **changes))
    schedule = choose_schedule(ir)
    for source in sources(EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule))):
        check_golden(f"convolution_{name}_{source.name}.py.txt", source.text)


def test_golden_sources_of_three_factors(check_golden: Callable[[str, str], None]) -> None:
    """All of a causal convolution; of a circular one, what its filter is read by."""
    causal, circular = ir_of(30000, skip=True), ir_of(30000, transform_len=30000, lag=3)
    for name, ir in (("causal", EMITTER.bucketed(causal)), ("circular", EMITTER.bucketed(circular))):
        schedule = choose_schedule(ir)
        for source in sources(EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule))):
            if name == "causal" or "filter" in source.name:
                check_golden(f"convolution_{name}_{source.name}.py.txt", source.text)


@pytest.mark.parametrize(
    ("name", "changes"), [("causal", {}), ("circular", {"transform_len": 1000, "pre_gate": True, "post_gate": True})]
)
def test_golden_sources_of_gradients(
    name: str, changes: dict[str, object], check_golden: Callable[[str, str], None]
) -> None:
    ir = EMITTER.bucketed(FilterGradient(ir_of(1000, **changes)))
    schedule = EMITTER.choose_schedule(ir, None)
    for source in sources(EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule))):
        check_golden(f"convolution_gradient_{name}_{source.name}.py.txt", source.text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "problems",
    [
        [(64, 256), (4, 1 << 15)],
        pytest.param([(16, 8192)], marks=pytest.mark.nightly),
        pytest.param([(1, 1 << 17), (1, 1 << 20)], marks=pytest.mark.nightly),
    ],
    ids=["some", "on chip", "long"],
)
def test_kernels_compile_within_the_limits_of_the_device(problems: list[tuple[int, int]], tmp_path: Path) -> None:
    for report in reports_of(COMPILED, problems, tmp_path):
        assert report["shared_bytes"] <= SHARED_LIMIT, report
        allowed = 1024 if report["points"] > 1024 else 512
        if "again" in report["name"] or "marked" in report["name"]:  # the second run, which mostly has nothing to do
            allowed = 2048
        assert report["local_bytes"] <= allowed, f"spills: {report}"
        if "tables" not in report["name"] and "noise" not in report["name"]:
            assert report["has_wgmma"] or report["has_mma"], report


def test_a_longer_gradient_of_a_filter_has_no_kernels() -> None:
    longer = EMITTER.bucketed(FilterGradient(ir_of(30000)))
    with pytest.raises(CodegenError, match="gradient of a filter"):
        EMITTER.check(longer)
    with pytest.raises(CodegenError, match="gradient of a filter"):
        EMITTER.choose_schedule(longer, None)


@pytest.mark.parametrize("points", [1000, 30000])
def test_a_schedule_survives_a_file(points: int) -> None:
    schedule = choose_schedule(EMITTER.bucketed(ir_of(points)))
    assert read_schedule(json.loads(json.dumps(asdict(schedule)))) == schedule


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"batch": 0}, "at least 1"),
        ({"lag": -1}, "lag"),
        ({"out_len": 200, "transform_len": 100}, "no more is put out"),
        ({"out_len": 50, "skip": True}, "skip"),
        ({"dtype": torch.int32}, "dtypes"),
        ({"scale": float("nan")}, "finite"),
    ],
)
def test_rules_of_the_ir(changes: dict[str, object], wording: str) -> None:
    with pytest.raises(IRError, match=wording):
        ir_of(100, **changes)


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, True),
        ({"filter_dtype": torch.float64}, False),
        ({"out_dtype": torch.float32}, False),
        ({"out_dtype": torch.float16}, True),
        ({"out_dtype": torch.float16, "seq_len": 8193}, False),
        ({"seq_len": 1 << 20}, True),
        ({"seq_len": (1 << 20) + 1}, False),
        ({"out_len": (1 << 20) + 1}, False),
    ],
)
def test_what_runs_on_kernels(changes: dict[str, object], runs: bool) -> None:
    given = {"device": "cuda", "dtype": torch.bfloat16, "filter_dtype": torch.float32, "out_dtype": torch.bfloat16}
    assert work.runs_kernels(**{**given, "seq_len": 8192, "out_len": 1, **changes}) is runs  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "points"), [(1, 256), (256, 256), (257, 512), (8192, 8192), (8193, 16384)])
def test_points(size: int, points: int) -> None:
    assert work.points_of(size, 1) == work.points_of(1, size) == points
    assert work.factors(points)[0] * work.factors(points)[1] == points
