"""Distillation: errors fall on unseen inputs, nothing else changes, and what cannot go on is said."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.distilled import DIM, OPTIONS, Block, Packed, Transformer, batches, changed, quick, state_of
from torch import nn

import monarch_compile
from monarch_compile import DistillationError, InputError, PlanError, distill
from monarch_compile.attention import candidates
from monarch_compile.calibration.instrument import with_attention
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.config import MonarchConfig
from monarch_compile.distillation.descent import Schedule
from monarch_compile.distillation.distill import distilled
from monarch_compile.distillation.run import Run, Settings

STEPS, LR = 120, 0.03


@pytest.fixture(scope="module")
def calls():
    return batches(16)


@pytest.fixture(scope="module")
def unseen():
    return batches(4, seed=1)


@pytest.fixture(scope="module")
def teacher():
    return Transformer().eval()


@pytest.fixture(scope="module")
def report(teacher, calls, unseen):
    return distill(teacher, calls, held_out=unseen, options=OPTIONS, steps=STEPS, lr=LR, progress=False)


def lowered_error(teacher, model, inputs, **options):
    """Relative error of the lowered model's outputs against the teacher's."""
    lowered = with_attention(model, lambda call: call.monarch(), options or OPTIONS)
    with torch.no_grad():
        return relative_error([teacher(x) for x in inputs], [lowered(x) for x in inputs])


def test_errors_fall_by_a_third_on_unseen_inputs(report, teacher, unseen):
    assert [site.code for site in report.sites] == ["distilled"] * 2
    for site in report.sites:
        assert site.held_out.after < site.held_out.before * 2 / 3
        assert site.calls.after < site.calls.before * 2 / 3
    assert report.held_out.after < report.held_out.before * 2 / 3
    assert lowered_error(teacher, teacher, unseen) == pytest.approx(report.held_out.before, rel=1e-3)
    assert lowered_error(teacher, report.model, unseen) == pytest.approx(report.held_out.after, rel=1e-3)


def test_only_queries_and_keys_change(report, teacher):
    differs = changed(teacher.state_dict(), report.model)
    assert {*differs} == {f"layers.{i}.attention.qkv.{what}" for i in (0, 1) for what in ("weight", "bias")}
    assert {name for site in report.sites for name in site.weights} == {*differs}
    for elements in differs.values():
        assert not elements[2 * DIM :].any()
        assert elements[:DIM].any()
        assert elements[DIM : 2 * DIM].any()


def test_a_copy_changes_unless_the_model_itself_is_to(teacher, calls):
    model, before = copy.deepcopy(teacher), state_of(teacher)
    other = distill(model, calls[:2], **quick())
    assert other.model is not model
    assert not changed(before, model)
    own = distill(model, calls[:2], **quick(inplace=True))
    assert own.model is model
    assert not changed(other.model.state_dict(), model)
    assert own.sites[0].calls == other.sites[0].calls


def test_the_plan_fits_what_it_was_made_with(report, teacher, unseen):
    names = [site.name for site in report.sites]
    assert [site.name for site in report.plan.sites] == names
    form = report.plan.site(names[0], report.plan.sites[0].shape).form
    assert (form.block_size, form.window) == (8, None)
    error = lowered_error(teacher, report.model, unseen, plan=report.plan, policy="always")
    assert error == pytest.approx(report.held_out.after, rel=1e-3)
    with pytest.raises(PlanError):
        lowered_error(Transformer(layers=3), Transformer(layers=3), unseen, plan=report.plan)


def test_compiled_with_its_plan_it_is_nearer_to_the_teacher(report, teacher, unseen):
    compiled = torch.compile(report.model, backend="monarch", options={"plan": report.plan, "policy": "always"})
    with torch.no_grad():
        error = relative_error([teacher(x) for x in unseen], [compiled(x) for x in unseen])
    assert error < report.held_out.before * 2 / 3


def test_a_plan_says_which_sites_learn(report, teacher, calls):
    first, second = report.plan.sites
    plan = replace(report.plan, sites=(first, replace(second, form=None, reason="costs too much")))
    own = distill(teacher, calls[:2], plan=plan, **quick(options=None))
    assert [site.code for site in own.sites] == ["distilled", "exact"]
    assert "costs too much" in own.sites[1].reason
    assert own.plan is plan
    assert all(name.startswith("layers.0.") for name in changed(teacher.state_dict(), own.model))


def test_what_is_not_lowered_is_left_alone(teacher, calls, caplog):
    own = distill(teacher, calls[0], **quick(options={"policy": "never"}))
    assert own.num_distilled == 0
    assert {site.code for site in own.sites} == {"exact"}
    assert not changed(teacher.state_dict(), own.model)
    assert "nothing to distill" in caplog.text


def test_the_report_reads_as_a_table_and_as_json(report, tmp_path):
    text = str(report)
    assert "2 of 2 sites distilled on 16 calls" in text
    assert f"{report.held_out.before:.4f} -> {report.held_out.after:.4f}" in text
    content = json.loads(report.save(tmp_path / "report.json").read_text())
    assert content["sites"][0]["held_out"]["after"] == report.sites[0].held_out.after
    assert content["steps"] == STEPS
    assert report.site(report.sites[1].name) is report.sites[1]
    with pytest.raises(KeyError):
        report.site("nothing")


def test_mode_buffers_and_random_state_are_put_back():
    torch.manual_seed(3)
    model = nn.Sequential(nn.BatchNorm1d(64), Transformer(dropout=0.5, layers=1)).train()
    before, random = state_of(model), torch.get_rng_state()
    first = distill(model, batches(2), inplace=True, **quick())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all("qkv" in name for name in changed(before, model))
    assert first.num_distilled == 1
    again = distill(model.eval(), batches(2), **quick())
    assert not any(module.training for module in again.model.modules())
    assert again.sites[0].calls.before != first.sites[0].calls.before  # the target is that of the new weights


def test_the_same_arguments_give_the_same_weights(teacher, calls):
    one, other = (distill(teacher, calls[:3], **quick()).model for _ in range(2))
    assert not changed(one.state_dict(), other)
    assert changed(one.state_dict(), distill(teacher, calls[:3], **quick(seed=1)).model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype, calls):
    model = Transformer(layers=1).eval().to(dtype)
    own = distill(model, [x.to(dtype) for x in calls[:8]], **quick(steps=100, lr=LR))
    assert own.model.layers[0].attention.qkv.weight.dtype == dtype
    assert own.sites[0].calls.after < own.sites[0].calls.before


def test_inputs_may_wait_in_the_hosts_memory(teacher, calls):
    one, other = (distill(teacher, calls[:2], **quick(offload=offload)).model for offload in (False, True))
    assert not changed(one.state_dict(), other)


def test_control_weights_that_cannot_move_gain_nothing(teacher, calls, unseen):
    settings = Settings(MonarchConfig(**OPTIONS), Schedule(20, 0.0, 0), progress=False)
    own = distilled(copy.deepcopy(teacher), calls[:4], unseen, settings)
    assert {site.code for site in own.sites} == {"no_gain"}
    assert own.held_out.after == own.held_out.before
    assert not changed(teacher.state_dict(), own.model)


def test_control_random_targets_do_not_bring_it_nearer_to_the_teacher(teacher, calls, unseen):
    def random(call):
        return torch.randn_like(call.exact())

    settings = Settings(MonarchConfig(**OPTIONS), Schedule(STEPS, LR, 0), progress=False, target=random)
    own = distilled(copy.deepcopy(teacher), calls, unseen, settings)
    assert own.held_out.after >= own.held_out.before


def test_a_layer_that_is_not_finite_is_named_and_nothing_changes(teacher, calls):
    model, before = copy.deepcopy(teacher), state_of(teacher)
    with pytest.raises(DistillationError, match=r"layers\.0.*not finite"):
        distill(model, [calls[0], torch.full_like(calls[0], torch.nan)], inplace=True, **quick())
    with pytest.raises(DistillationError, match=r"layers\.0.*step 2"):
        distill(model, calls[0], inplace=True, **quick(lr=1e30))
    assert not changed(before, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an int of at least 1; found 0"),
        ({"lr": -1.0}, "lr must be a positive number; found -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"seed": "x"}, "seed must be an int"),
        ({"plan": "nowhere.json", "options": None}, "cannot read a plan"),
        ({"calls": []}, "at least one call"),
        ({"calls": 3}, "a call must be a tensor"),
        ({"model": torch.sin}, r"model must be a torch\.nn\.Module"),
        ({"options": {"policy": "sometimes"}}, "'policy' must be one of"),
    ],
)
def test_arguments_that_are_wrong_are_named(teacher, calls, arguments, message):
    given = {"model": teacher, "calls": calls[:1], **quick(), **arguments}
    with pytest.raises((InputError, PlanError, monarch_compile.ConfigError), match=message):
        distill(given.pop("model"), given.pop("calls"), **given)


def test_a_model_that_cannot_be_copied_can_be_changed_itself(calls):
    model = Transformer(layers=1).eval()
    model.lock = (i for i in range(3))
    with pytest.raises(InputError, match="inplace=True"):
        distill(model, calls[0], **quick())
    assert distill(model, calls[0], **quick(inplace=True)).num_distilled == 1


def test_calls_of_several_shapes_learn_together(calls):
    model = Transformer(layers=1).eval()
    own = distill(model, [calls[0], calls[1][:2, :48]], **quick())
    assert own.sites[0].code == "distilled"
    assert len(own.sites) == 1


def test_a_site_that_no_call_runs_is_left_alone(calls):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Block(Packed()), Block(Packed())

        def forward(self, x, first):
            return self.one(x) if first else self.other(x)

    own = distill(Either().eval(), [(calls[0], True)], held_out=[(calls[1], False)], **quick())
    assert [site.code for site in own.sites] == ["distilled", "not_run"]


def test_the_snippet_of_the_docs_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/quality.md").read_text(encoding="utf-8")
    (snippet,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "distill(" in text)
    monkeypatch.chdir(tmp_path)
    compiled = []
    monkeypatch.setattr(monarch_compile, "distill", partial(distill, steps=2, progress=False))
    fake = SimpleNamespace(compile=lambda model, **more: compiled.append((model, more)))
    calls = batches(3)
    names = {"model": Transformer(layers=1), "calls": calls[:2], "other_calls": calls[2:], "torch": fake}
    exec(snippet, names | {"monarch_compile": monarch_compile})
    ((model, more),) = compiled
    assert isinstance(model, Transformer)
    assert {*more["options"]} == {"plan", "policy"}
    assert Path("distilled.json").exists()


def test_what_calibrate_chose_is_what_learns(teacher, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(candidates.Occurrence, "seconds", lambda occurrence, device, form: (1.0, 0.1 * form.num_iters))
    fixed = {"block_size": 8, "init": "identity", "window": 0, "prefix": 0}
    plan = monarch_compile.calibrate(teacher, calls[:1], budget=1e9, options=fixed, progress=False)
    report = distill(teacher, calls[:4], plan=plan.save(tmp_path / "plan.json"), **quick(options=None))
    assert report.num_distilled == 2
    assert report.plan == plan
    assert {(site.form.block_size, site.form.window) for site in report.plan.sites} == {(8, 0)}


def test_progress_is_shown_where_it_is_asked_for(teacher, calls, capsys):
    distill(teacher, calls[0], **quick(steps=2, progress=True))
    shown = capsys.readouterr().err
    assert "distill: exact model, call 1 of 1" in shown
    assert "layers.1.attention" in shown
    assert "step 2 of 2" in shown
    assert shown.endswith("\r")
    distill(teacher, calls[0], **quick(steps=2))
    assert capsys.readouterr().err == ""


def test_a_compiled_model_in_inference_mode_with_outputs_of_any_kind(calls):
    class Named(Transformer):
        def forward(self, x, scale=1.0):
            return {"states": super().forward(scale * x), "others": [1, None]}

    model = torch.compile(Named(layers=1).eval())
    with torch.inference_mode():
        report = distill(model, {"x": calls[0], "scale": 2.0}, **quick(inplace=True))
    assert report.model is model
    assert report.num_distilled == 1
    assert report.calls.after < report.calls.before


def test_an_output_without_floating_numbers_has_no_error(calls):
    class Classes(Transformer):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    report = distill(Classes(layers=1).eval(), calls[:2], **quick())
    assert (report.calls.before, report.calls.after) == (None, None)
    assert report.plan.metric == report.sites[0].calls.after


def test_an_interruption_of_the_last_runs_puts_the_old_weights_back(teacher, calls, monkeypatch):
    model, before = copy.deepcopy(teacher), state_of(teacher)
    measured = Run._output_errors

    def interrupted(run, references, what):
        if what == "distilled model":
            assert changed(before, model)
            raise KeyboardInterrupt
        return measured(run, references, what)

    monkeypatch.setattr(Run, "_output_errors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(model, calls[:2], inplace=True, **quick())
    assert not changed(before, model)
