"""The benchmark of whole models: its models, which exact kernel is the baseline, rows that fail, resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.models import __main__ as driver
from benchmarks.models import measure
from benchmarks.models.found import SiteGroup, in_words
from benchmarks.models.measure import Bench, Prepared, Subject
from benchmarks.models.present import markdown, share
from benchmarks.models.problems import FORMS, PRESETS, TINY_DIT, TINY_VIT, Preset, Problem
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.calibration.instrument import with_attention
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.cost.devices import DEVICES
from monarch_compile.report.explainer import explain
from monarch_compile.tools import cli
from monarch_compile.tools.timing import Timing

VIT = Problem(TINY_VIT, 1, 48, "float32")
TINY = Preset("cpu", (VIT, Problem(TINY_DIT, 1, 48, "float32")), policy="always")
NAMES = ["exact sdpa", "monarch window=1", "monarch window=None"]


def ticking() -> Iterator[Timing]:
    ms = 1.0
    while True:
        yield Timing(ms, ms, ms, 1)
        ms += 1.0


def bench(**changes) -> Bench:
    """Nothing is timed; attention alone always takes the same."""
    times = ticking()
    made = Bench("cpu", DEVICES["cpu"], {"eager": lambda call: next(times)}, lambda call: Timing(2.0, 2.0, 2.0, 1))
    return replace(made, **changes)


@pytest.fixture
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline runs as it is, the Monarch forms through the passes alone."""
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("benchmarks.speed.subjects.compiled_attention", lambda options, causal: attend)

    def compiled(model: Prepared, subject: Subject) -> measure.Call:
        torch._dynamo.reset()
        run = model.model if subject.exact else with_attention(model.model, AttentionCall.monarch, subject.options)
        return lambda: run(*model.inputs)

    monkeypatch.setattr(measure, "_compiled", compiled)


def test_the_h200_preset_is_what_the_readme_shows() -> None:
    preset = PRESETS["h200"]
    assert [str(p) for p in preset.problems] == [
        *("vit-l 1x4096", "vit-l 4x4096", "vit-l 1x16384", "dit-xl 1x4096", "dit-xl 1x16384")
    ]
    assert preset.policy == "auto"
    sizes = {(a.depth, a.width, a.num_heads, a.head_dim) for a in (p.architecture for p in preset.problems)}
    assert sizes == {(24, 1024, 16, 64), (28, 1152, 16, 72)}
    assert {p.dtype for p in preset.problems} == {"bfloat16"}


@pytest.mark.parametrize("architecture", [TINY_VIT, TINY_DIT])
def test_every_block_has_one_site_that_can_be_lowered(architecture) -> None:
    torch._dynamo.reset()
    inputs = architecture.inputs(1, 48, "cpu", torch.float32)
    with torch.no_grad():
        report = explain(architecture.model("cpu", torch.float32), *inputs, options={"policy": "always"})
    assert [site.status for site in report.sites] == ["lowered"] * architecture.depth


@pytest.mark.parametrize("architecture", [TINY_VIT, TINY_DIT])
def test_an_attention_that_is_broken_shows_in_the_error(architecture) -> None:
    prepared = Prepared.of(Problem(architecture, 1, 96, "float32"), "cpu")

    def error(attention) -> float:
        torch._dynamo.reset()
        with torch.no_grad():
            found = with_attention(prepared.model, attention, {"policy": "always"})(*prepared.inputs)
        return relative_error(prepared.reference, found)

    assert error(lambda call: call.exact()) < 1e-5
    assert 1e-5 < error(lambda call: call.monarch()) < 0.3
    assert error(lambda call: torch.zeros_like(call.exact())) > 0.5


@pytest.mark.usefixtures("_not_compiled")
def test_rows_say_what_was_lowered_and_how_wrong_it_is() -> None:
    rows = list(measure.rows(bench(), VIT, TINY, NAMES))
    assert [row.form for row in rows] == NAMES
    assert [row.failures for row in rows] == [{}, {}, {}]
    assert [row.times["eager"].p50 for row in rows] == [1.0, 2.0, 3.0]
    assert rows[0].error < 1e-5 < min(rows[1].error, rows[2].error)
    assert [row.peak_mib for row in rows] == [None] * 3


@pytest.mark.usefixtures("_not_compiled")
def test_only_the_exact_kernel_that_is_fastest_alone_runs_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = measure._kernels(bench())[0]
    slow = replace(kernel, name="slow")
    lost = replace(kernel, name="lost", prepare=lambda x: 1 // 0)
    monkeypatch.setattr(measure, "_kernels", lambda bench: [slow, kernel, lost])
    names = ["exact slow", "exact sdpa", "exact lost"]

    def rows(slack: float) -> dict[str, measure.Row]:
        alone = iter([Timing(9.0, 9.0, 9.0, 1), Timing(2.0, 2.0, 2.0, 1)])
        made = bench(alone=lambda call: next(alone), slack=slack)
        return {row.form: row for row in measure.rows(made, VIT, TINY, names)}

    found = rows(1.0)
    assert [bool(found[name].times) for name in names] == [False, True, False]
    assert found["exact slow"].attention_ms == 9.0
    assert found["exact slow"].failures == {"model": "not the fastest exact attention alone: not compiled"}
    assert found["exact lost"].failures == {"alone": "ZeroDivisionError: integer division or modulo by zero"}
    assert [bool(rows(5.0)[name].times) for name in names] == [True, True, False]


@pytest.mark.usefixtures("_not_compiled")
def test_a_kernel_that_is_not_asked_for_still_decides_which_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = measure._kernels(bench())[0]
    monkeypatch.setattr(measure, "_kernels", lambda bench: [replace(kernel, name="slow"), kernel])
    alone = iter([Timing(9.0, 9.0, 9.0, 1), Timing(2.0, 2.0, 2.0, 1)])
    (row,) = measure.rows(bench(alone=lambda call: next(alone)), VIT, TINY, ["exact slow"])
    assert not row.times


def test_a_form_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(model: Prepared, subject: Subject) -> measure.Call:
        if subject.name == "monarch window=1":
            raise torch.OutOfMemoryError("tried to allocate everything\nand more")
        return lambda: model.model(*model.inputs)

    def broken(call: object) -> Timing:
        raise RuntimeError("capture failed")

    monkeypatch.setattr(measure, "_compiled", compiled)
    monkeypatch.setattr(measure, "_alone", lambda *_: (2.0, {}))
    clocks = {"graph": broken, "eager": lambda call: Timing(1.0, 2.0, 3.0, 9)}
    rows = list(measure.rows(bench(clocks=clocks), VIT, TINY, NAMES))
    assert rows[1].failures == {"model": "OutOfMemoryError: tried to allocate everything"}
    assert [row.failures for row in (rows[0], rows[2])] == [{"graph": "RuntimeError: capture failed"}] * 2
    assert [bool(row.times) for row in rows] == [True, False, True]


@pytest.mark.usefixtures("_not_compiled")
def test_results_are_resumed_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "models.json"
    content = driver.run(bench(), TINY, path, minutes=-1)
    assert [row["form"] for row in content["rows"]] == NAMES[:1]
    assert "the same command goes on from here" in capsys.readouterr().out
    content = driver.run(bench(), TINY, path, only=["dit-tiny 1x48 monarch window=None"])
    assert [row["form"] for row in content["rows"]] == [NAMES[0], NAMES[2]]
    content = driver.run(bench(), TINY, path)
    assert [row["problem"]["architecture"]["name"] for row in content["rows"]] == ["vit-tiny"] * 3 + ["dit-tiny"] * 3
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))
    driver.run(bench(), TINY, path)
    assert capsys.readouterr().out.count("3 rows held") == 2
    assert len(driver.run(bench(), TINY, path, fresh=True, only=["vit"])["rows"]) == 3


def _row(form: str, ms: float, attention_ms: float = 0.25, lowered: int = 0) -> dict:
    times = {clock: {"p20": ms, "p50": ms, "p80": ms, "runs": 1} for clock in ("graph", "eager")}
    row = measure.Row(VIT, form, attention_ms, {}, {}, lowered, 2, 0.01, 100.0, 3.0).to_dict()
    return row | {"times": times}


def test_the_table_compares_with_the_best_exact_row() -> None:
    rows = [_row("exact flash", 3.0), _row("exact cudnn", 2.0), _row("monarch window=1", 1.0, lowered=2)]
    failed = measure.Row(VIT, "exact efficient", 5.0, {}, {"model": "not | compiled"}).to_dict()
    text = markdown({"environment": {"gpu": "some GPU"}, "rows": [*rows, failed]})
    assert text.startswith("gpu some GPU")
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| vit-tiny")}
    assert "| 1.00 [1.00, 1.00] | 2.00 |" in lines["monarch window=1"]
    assert "| 0.67 |" in lines["exact flash"]
    assert "| 2 of 2 | 1.00e-02 | 100 | 3.0 |" in lines["monarch window=1"]
    assert "not \\| compiled" in text


def test_attention_has_no_share_where_not_all_of_it_was_lowered() -> None:
    assert share(_row("exact cudnn", 2.0)) == "25%"
    assert share(_row("monarch window=1", 1.0, lowered=2)) == "50%"
    assert share(_row("monarch window=1", 1.0, lowered=0)) == "–"


@pytest.mark.usefixtures("_not_compiled")
def test_a_step_takes_the_gradients_of_all_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs, inputs, *args, **more):
        gradients.append(len(inputs))
        return grad(outputs, inputs, *args, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    content = driver.run(bench(backward=True), replace(TINY, problems=TINY.problems[:1]), tmp_path / "models.json")
    assert content["pass"] == "step"
    assert [row["failures"] for row in content["rows"]] == [{}, {}, {}]
    assert [row["error"] < 0.3 for row in content["rows"]] == [True] * 3
    assert len(list(TINY_VIT.model("cpu", torch.float32).parameters())) in gradients
    assert "a call is a step" in markdown(content)


def test_the_presets_of_training_are_of_steps() -> None:
    preset = PRESETS["training"]
    assert [str(p) for p in preset.problems] == ["vit-l 1x4096", "vit-l 4x4096", "vit-l 1x16384", "vit-l 2x16384"]
    assert (preset.policy, preset.device) == ("auto", "cuda")
    assert [name for name, found in PRESETS.items() if found.trains] == ["training", "tiny-training"]
    assert driver._arguments(["--preset", "training"]).backward
    assert driver._arguments(["--preset", "training"]).output == Path("models_training_step.json")
    assert not driver._arguments(["--preset", "tiny"]).backward


@pytest.mark.usefixtures("_not_compiled")
def test_the_command_of_training_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "_bench", lambda *_: bench())
    assert cli.main(["bench", "models", "--preset", "tiny-training", "--minutes", "-1"]) == 0
    path = tmp_path / "models_tiny-training_step.json"
    assert [row["form"] for row in json.loads(path.read_text())["rows"]] == NAMES[:1]
    assert cli.main(["bench", "models", "--preset", "tiny-training"]) == 0
    assert "1 rows held" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [row["form"] for row in content["rows"]] == NAMES
    assert content["pass"] == "step"
    assert "a call is a step" in path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_command_compiles_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "tiny", "--rep", "1", "--rows", "vit-tiny 2x96 exact", "window=None", "--output", "x.json"]
    assert cli.main(["bench", "models", *arguments]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["form"], row["lowered"], row["sites"]) for row in rows] == [
        *(("exact sdpa", 0, 0), ("monarch window=None", 2, 2), ("monarch window=None", 2, 2))
    ]
    assert all(row["failures"] == {} and row["error"] < 0.3 for row in rows)
    assert "| vit-tiny 2x96 | exact sdpa |" in (tmp_path / "x.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_preset_for_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "models", "--preset", "h200"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_forms_are_the_default_and_the_papers() -> None:
    assert [str(form) for form in FORMS] == ["monarch window=1", "monarch window=None"]
    assert FORMS[0].options("auto") == {"policy": "auto", "num_iters": 1, "window": 1}


@pytest.mark.parametrize(("at_end", "words"), [(True, "grid 9 x 7 before 5"), (False, "grid 9 x 7 after 5")])
def test_tokens_beside_a_grid_are_said_to_be_on_their_side(at_end: bool, words: str) -> None:
    group = SiteGroup("lowered", "lowered", "2x4x68x8", (9, 7), 5, at_end, 16, (4, 4), 1, "plus", "")
    assert f", {words}, tiles 4 x 4" in in_words({"number": 2, **vars(group)})
