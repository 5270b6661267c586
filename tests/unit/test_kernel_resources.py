"""What kernels take of a GPU, in the report: those of the forward pass, and those of gradients of sites that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.work import backward_cost, monarch_cost
from monarch_compile.codegen.emitters import emitter, launched
from monarch_compile.codegen.program import Kernel, Program
from monarch_compile.codegen.tuning import resources
from monarch_compile.codegen.tuning.compiler_report import CompileReport
from monarch_compile.codegen.tuning.resources import resources_of
from monarch_compile.errors import CodegenError
from monarch_compile.report import kernels as reported
from monarch_compile.report.explainer import explain
from monarch_compile.report.report import Report
from monarch_compile.tools import cli
from tests.support.compiled import reports_of

OPTIONS = {"policy": "always", "block_size": 16, "window": 1, "grid": None}
BASE = MonarchAttention(2, 4, 4, 4096, 4096, 64, 64, torch.bfloat16, Form(64), 0.125)
SM_90 = (9, 0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """The compiler is a stand-in; what it was asked for."""
    asked: list[tuple[str, tuple[int, int]]] = []

    def made_up(kernel: Kernel, capability: tuple[int, int]) -> CompileReport:
        asked.append((kernel.name, capability))
        spilled = 48 if "keys" in kernel.name else 0
        return CompileReport(kernel.name, 4, 168, 34816, spilled, True, False, "")

    monkeypatch.setattr(resources, "_compiled", made_up)
    return asked


def explained(*, trains: bool, resources: bool = True, **options: Any) -> Report:
    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v) + scaled_dot_product_attention(q, v, k)

    inputs = (torch.randn(1, 2, 64, 16, requires_grad=trains) for _ in range(3))
    return explain(attend, *inputs, options=OPTIONS | options, resources=resources)


def test_a_site_that_trains_has_kernels_of_gradients(compiled: list[Any]) -> None:
    report = explained(trains=True)
    site = report.sites[0]
    names = [kernel.resources.name for kernel in site.backward_kernels if kernel.resources]
    assert names[0] == "monarch_summarize"
    assert names[-1] == "monarch_summarize_keys_backward"
    assert site.backward_note == ""
    assert {capability for _, capability in compiled} == {reported.capability_here()}
    lines = str(report).splitlines()
    place = lines.index("kernels of 2 sites:")
    assert lines[place + 1].startswith(
        "    forward monarch_summarize_near: 168 registers x 128 threads, 0 B spilled, 34.0"
    )
    assert sum(line.startswith("    backward ") for line in lines) == len(site.backward_kernels)
    assert any("monarch_summarize_keys_backward" in line and "48 B spilled" in line for line in lines)


def test_json_and_page_have_them(compiled: list[Any], tmp_path: Path) -> None:
    report = explained(trains=True)
    site = json.loads(json.dumps(report.to_dict()))["sites"][0]
    found = [kernel["resources"] for kernel in (*site["kernels"], *site["backward_kernels"])]
    assert all(x["registers"] == 168 and x["shared_bytes"] == 34816 and x["moved_bytes"] > 0 for x in found)
    page = report.save(tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<td>backward</td>") == 2 * len(site["backward_kernels"])
    assert f"Kernel of gradients <code>{site['backward_kernels'][-1]['file_name']}" in page
    assert '<td class="num">48 B</td>' in page


@pytest.mark.parametrize("trains", [False, True])
def test_nothing_is_compiled_unless_it_is_asked_for(compiled: list[Any], trains: bool) -> None:
    report = explained(trains=trains, resources=False)
    assert compiled == []
    assert bool(report.sites[0].backward_kernels) == trains
    assert all(kernel.resources is None for kernel in report.sites[0].kernels)
    assert "registers" not in str(report)


def test_a_site_that_does_not_train_has_none(compiled: list[Any]) -> None:
    site = explained(trains=False).sites[0]
    assert site.backward_kernels == ()
    assert site.backward_note == ""
    assert all(kernel.resources for kernel in site.kernels)


def test_gradients_without_kernels_are_told(compiled: list[Any]) -> None:
    site = explained(trains=True, num_iters=2).sites[0]
    assert site.backward_kernels == ()
    assert site.backward_note.startswith("Gradients have no kernels of their own")


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(kernel: Kernel, capability: tuple[int, int]) -> CompileReport:
        raise CodegenError("triton is missing\nand more")

    monkeypatch.setattr(resources, "_compiled", failing)
    site = explained(trains=True).sites[0]
    assert site.kernel_note.endswith("What kernels take is not known: triton is missing.")
    assert site.backward_kernels
    assert all(kernel.resources is None for kernel in (*site.kernels, *site.backward_kernels))


def test_the_command_asks_for_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    monkeypatch.setattr(cli, "_load", lambda target: lambda: (lambda x: x, (torch.zeros(1),)))
    monkeypatch.setattr("monarch_compile.report.explainer.capability_here", lambda: asked.append(1) or SM_90)
    assert cli.main(["explain", "some:thing"]) == 0
    assert not asked
    assert cli.main(["explain", "some:thing", "--resources"]) == 0
    assert asked


def moved(ir: MonarchAttention) -> int:
    """Bytes of all kernels of `ir` or its gradients."""
    own = emitter(ir.family)
    schedule = own.choose_schedule(ir, SM_90)
    program: Program = own.program_of(ir, schedule, own.expected(ir, schedule))
    found = resources_of(program, ir, {}, SM_90)
    assert len(found) == len(program.kernels)
    return sum(x.moved_bytes or 0 for x in found)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("window", [None, 1])
def test_bytes_are_those_of_the_cost_model(window: int | None) -> None:
    ir, gradients = launched(BASE.changed(window=window), trains=True)
    assert moved(ir) == monarch_cost(ir).bytes
    assert moved(gradients) == pytest.approx(backward_cost(ir).bytes, rel=0.05)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("hints", "are_known"), [({"n": 4096}, True), ({}, False)])
def test_symbolic_sizes_take_their_hints(hints: dict[str, int], are_known: bool) -> None:
    ir = BASE.changed(seq_len_q="n", seq_len_k="n")
    own = emitter(ir.family)
    schedule = own.choose_schedule(ir, SM_90)
    program = own.program_of(ir, schedule, own.expected(ir, schedule))
    found = resources_of(program, ir, hints, SM_90)
    total = sum(x.moved_bytes or 0 for x in found)
    assert total == (monarch_cost(BASE).bytes if are_known else 0)
    assert ("MiB moved" in str(found[0])) == are_known


COMPILED = """
import json, sys
import torch
from monarch_compile.report.explainer import explain
from torch.nn.functional import scaled_dot_product_attention
q, k, v = (torch.randn(1, 2, 256, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
options = {"policy": "always", "block_size": 64, "window": None}
site = explain(scaled_dot_product_attention, q, k, v, options=options, resources=True).to_dict()["sites"][0]
print(json.dumps([kernel["resources"] for kernel in site["kernels"] + site["backward_kernels"]]))
"""


@pytest.mark.slow
def test_real_kernels_are_compiled(tmp_path: Path) -> None:
    found = reports_of(COMPILED, None, tmp_path)
    assert [x["name"] for x in found][-1] == "monarch_summarize_keys_backward"
    assert len(found) == 5
    for kernel in found:
        assert kernel["capability"] == "sm_90" or torch.cuda.is_available()
        assert 32 < kernel["registers"] <= 255
        assert 0 < kernel["shared_bytes"] <= 227 * 1024
        assert kernel["moved_bytes"] > 0
