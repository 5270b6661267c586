"""Calibration: what it promises of its plan, and what it refuses."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import monarch_compile
from monarch_compile.attention import candidates
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.calibration.instrument import with_attention
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.calibration.plan import Plan
from monarch_compile.errors import InputError, PlanError
from monarch_compile.report.explainer import explain

SEQ_LEN, DIM, HEADS = 400, 16, 2
BUDGET = 0.06


class Layer(nn.Module):
    """Self-attention whose scores are near each other ("flat") or follow a few keys far away ("sharp")."""

    def __init__(self, sharpness):
        super().__init__()
        self.qkv, self.sharpness = nn.Linear(DIM, 3 * DIM), sharpness

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q * self.sharpness, k, v)
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(0.3), Layer(30.0), Layer(0.3)])
        self.causal = Layer(1.0)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        q = x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def shrink(patch):
    """At test sizes no form is predicted to pay on a CPU: here time goes by the keys that a row scores."""

    def seconds(occurrence, device, form):
        keys = form.block_size * (1 + 2 * (form.window or 0)) + SEQ_LEN // form.block_size
        return float(SEQ_LEN), float(form.num_iters * keys)

    patch.setattr(candidates.Occurrence, "seconds", seconds)
    patch.setitem(candidates.SEARCH, "block_size", (1, 2))
    patch.setitem(candidates.SEARCH, "prefix", (0,))


@pytest.fixture(autouse=True)
def small_search(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, SEQ_LEN, DIM, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def plan(samples):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return calibrate(samples, BUDGET)


def calibrate(samples, budget, **more):
    return monarch_compile.calibrate(Model().eval(), samples, budget=budget, progress=False, **more)


def run_plan(plan, x):
    options = {"plan": plan, "policy": "always"}
    with torch.no_grad():
        return with_attention(Model().eval(), lambda call: call.monarch(), options)(x)


def test_a_plan_keeps_its_budget_and_what_it_measured(plan, samples):
    worst = max(relative_error(Model().eval()(x), run_plan(plan, x)) for x in samples)
    assert worst == pytest.approx(plan.metric, rel=1e-3)
    assert 0 < plan.metric <= BUDGET
    forms = [site.form for site in plan.sites]
    assert forms[0] is not None
    assert forms[2] is not None
    assert forms[1] is None
    assert forms[3] is None
    assert "causal" in plan.sites[3].reason
    assert plan.num_passes <= 3 + 3 + 6
    assert "2 of 4 sites lowered" in str(plan)


def test_budget_0_keeps_everything_exact_and_a_large_one_lowers_everything_at_once(samples):
    assert calibrate(samples, 0.0).num_lowered == 0
    plan = calibrate(samples, 1e9)
    assert plan.num_lowered == 3
    assert plan.num_passes == 2


def test_the_same_inputs_give_the_same_plan(plan, samples):
    assert calibrate(samples, BUDGET) == plan


def test_options_that_are_given_are_kept(samples):
    plan = calibrate(samples, 1e9, options={"block_size": 25, "window": 2, "num_iters": 1})
    assert {(s.form.block_size, s.form.window, s.form.num_iters) for s in plan.sites if s.form} == {(25, 2, 1)}


def test_only_forms_that_are_predicted_to_pay_are_taken(samples, monkeypatch):
    monkeypatch.setattr(candidates, "MARGIN", 1e9)
    assert calibrate(samples, 1e9).num_lowered == 0


def test_a_metric_of_ones_own_bounds_the_worst_call(samples):
    seen = []

    def metric(reference, output):
        seen.append(float((reference - output).abs().max()))
        return seen[-1]

    plan = calibrate(samples, 0.05, metric=metric)
    assert plan.metric <= 0.05
    assert len(seen) == plan.num_passes * len(samples)


BAD_CALLS = {
    "budget must be at least 0": {"budget": -1.0},
    "budget must be at least 0; found nan": {"budget": float("nan")},
    "at least one call": {"samples": []},
    "must be a tensor, a tuple or a dict": {"samples": [3]},
    "must be a distance": {"metric": lambda a, b: 1.0},
    "number of at least 0": {"metric": lambda a, b: float("nan")},
    "cannot have one already": {"options": {"plan": Plan((), (), 0.0, 0.0, 1, 1, "cpu")}},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_named(message, samples):
    with pytest.raises(InputError, match=message):
        calibrate(**{"samples": samples[:1], "budget": 0.1, **BAD_CALLS[message]})


@pytest.mark.parametrize("spell", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: ((x,), {})])
def test_ways_to_write_a_call(spell, samples):
    assert calibrate(spell(samples[0]), 1e9).num_samples == 1


def test_explain_applies_and_shows_a_plan(plan, samples):
    report = explain(Model().eval(), samples[0], options={"plan": plan, "policy": "always"}, measure=True)
    assert [site.code for site in report.sites] == ["lowered", "plan_exact", "lowered", "mask_causal"]
    assert report.sites[0].ir.form.window == plan.sites[0].form.window
    assert report.sites[0].error == pytest.approx(plan.sites[0].error, rel=1e-3)
    assert report.output_error <= plan.metric * (1 + 1e-3)


def test_the_backend_applies_a_plan_from_a_file(plan, samples, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm.forward)
    options = {"plan": str(plan.save(tmp_path / "plan.json")), "policy": "always"}
    with torch.no_grad():
        output = torch.compile(Model().eval(), backend="monarch", options=options)(samples[0])
    torch.testing.assert_close(output, run_plan(plan, samples[0]))


class Other(Model):
    def forward(self, x):
        return self.layers[0](x)


class Wide(Model):
    def __init__(self):
        super().__init__()
        self.heads = 4

    def forward(self, x):
        q = x.view(*x.shape[:2], 4, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("model", [Other, Wide])
def test_a_plan_for_another_model_is_refused(model, plan, samples):
    with pytest.raises(PlanError, match="does not fit this model"):
        explain(model().eval(), samples[0], options={"plan": plan})
    with pytest.raises(Exception, match="does not fit this model"):
        torch.compile(model().eval(), backend="monarch", options={"plan": plan})(samples[0])


def test_controls_replace_what_would_be_lowered(samples):
    seen: list[AttentionCall] = []

    def uniform(call):
        seen.append(call)
        return call.v.mean(2, keepdim=True).expand(*call.q.shape[:3], -1)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model = Model().eval()
        output = with_attention(model, uniform, {"policy": "always"})(samples[0])
        assert [call.site.split()[0] for call in seen] == ["layers.0", "layers.1", "layers.2"]
        assert relative_error(model(samples[0]), output) > 0.1
        exact = with_attention(model, AttentionCall.exact, {"policy": "always"})(samples[0])
        assert relative_error(model(samples[0]), exact) < 1e-5
