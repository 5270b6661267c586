"""Tuning and the speed benchmark on a CUDA device, small: that they run, and that what they find is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.clocks import cuda_clocks
from benchmarks.speed import __main__ as driver
from benchmarks.speed.measure import Bench
from benchmarks.speed.problems import AutoForm, Preset, Problem, inputs
from benchmarks.speed.subjects import EXACT, peers
from monarch_compile import backend
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.codegen import launcher as launching
from monarch_compile.codegen.tuning.store import is_legal, read
from monarch_compile.cost.devices import installed
from monarch_compile.tools import autotune
from monarch_compile.tools.autotune import Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MONARCH_CACHE_DIR", str(tmp_path / "kernels"))
    torch._dynamo.reset()
    yield
    launching._CHOSEN.clear()
    launching.build.cache_clear()


@pytest.mark.parametrize("window", [None, 1])
def test_what_tuning_finds_is_legal_and_no_slower(window: int | None) -> None:
    machine = Machine.here()
    form = Form(64, window=window)
    ir = MonarchAttention(1, 4, 4, 2048, 2048, 64, 64, torch.float16, form, 0.125)
    result, rejected = autotune.tuned_now(ir, machine, autotune.default_tune(20.0))
    assert result.ms <= result.shipped_ms
    assert result.tried > 3, rejected
    assert is_legal(result.schedule, ir, machine.capability)
    assert read()[autotune.key(ir, machine)].schedule == result.schedule


def test_the_option_compiles_with_tuned_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "LAZY_SECONDS", 5.0)
    q, k, v = (torch.randn(1, 4, 2048, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    options = {"policy": "always", "block_size": 64, "autotune": True, "strict": True}
    compiled = torch.compile(lambda *x: attend(*x), backend=backend.monarch, options=options)
    with torch.no_grad():
        found = compiled(q, k, v).double()
    expected = monarch_attention(q.double(), k.double(), v.double(), block_size=64)
    assert ((found - expected).norm() / expected.norm()).item() < 4e-3
    assert len(read()) == len(launching._CHOSEN) == 1


def test_the_benchmark_measures_every_form(tmp_path: Path) -> None:
    def refuses(q, k, v):
        raise RuntimeError("not on this device")

    problems = (Problem(2, 1024, num_heads=4), Problem(2, 1024, num_heads=4, masked=True))
    preset = Preset("cuda", problems, (AutoForm(1, None), AutoForm(2, 1)))
    bench = Bench("cuda", installed("cuda"), cuda_clocks(5), peers([("refuses", refuses)]))
    content = driver.run(bench, preset, tmp_path / "speed.json")
    assert json.loads((tmp_path / "speed.json").read_text()) == json.loads(json.dumps(content))
    rows = {(row["subject"], row["problem"]["masked"]): row for row in content["rows"]}
    for name in ("flash", "efficient", "flex", "monarch"):
        assert set(rows[name, False]["times"]) == {"graph", "eager"}, rows[name, False]["failures"]
    assert set(rows["flex", True]["times"]) == {"graph", "eager"}, rows["flex", True]["failures"]
    assert rows["refuses", False]["failures"] == {"call": "RuntimeError: not on this device"}
    assert all(verdict["is_right"] is not None for verdict in content["verdicts"])


def test_flex_attention_is_masked_as_sdpa_is() -> None:
    x = inputs(Problem(3, 700, num_heads=2, masked=True), "cuda")
    subjects = {subject.name: subject for subject in EXACT["cuda"]}
    with torch.no_grad():
        found = subjects["flex"].prepare(x)()
        with subjects["efficient"].around():
            expected = subjects["efficient"].prepare(x)()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
