"""A family that no file of the package names goes from a model to its operator, its report and its plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from monarch_compile import PlanError, calibrate, explain
from monarch_compile.attention.form import Form
from monarch_compile.backend import monarch
from monarch_compile.calibration.plan import Plan, SitePlan
from monarch_compile.family import family
from monarch_compile.passes.frontends import frontends
from monarch_compile.passes.pipeline import pipeline
from monarch_compile.refusal import CODES
from monarch_compile.registry import FAMILIES, Modules
from tests.support.capture import run_passes

TOY = Modules("tests.toy.family", "tests.toy.frontend", "tests.toy.emitter")
RIVAL = Modules("tests.toy.rival", "tests.toy.rival", "tests.toy.emitter")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one line that a family adds."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    yield
    family.cache_clear()


class Model(nn.Module):
    """An attention and a gate."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = (x * torch.sigmoid(x) + y).view(1, 2, -1, 8)
        return nn.functional.scaled_dot_product_attention(q, q, q)


def near_miss(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(y) + y


def written(x: Tensor, y: Tensor) -> Tensor:
    product = x * torch.sigmoid(x)
    x.add_(1)
    return product + y


def halves(x: Tensor, y: Tensor) -> Tensor:
    half = x.half()
    return half * torch.sigmoid(half) + y.half()


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 8), torch.randn(16, 8)


def test_it_is_lowered_beside_attention_and_compiled() -> None:
    model, (x, y) = Model(), given()
    (output,), (result,) = run_passes(lambda *z: [model(*z)], x, y)
    assert [(d.family, d.status) for d in result.decisions] == [("attention", "lowered"), ("toy", "lowered")]
    torch.testing.assert_close(output, model(x, y))
    torch._dynamo.reset()
    options = {"policy": "always", "block_size": 1}
    torch.testing.assert_close(torch.compile(model, backend=monarch, options=options)(x, y), model(x, y))


@pytest.mark.parametrize(("fn", "codes"), [(near_miss, []), (written, ["mutation"]), (halves, ["dtype"])])
def test_what_is_refused(fn: object, codes: list[str]) -> None:
    x, y = given()
    output, results = run_passes(fn, x.clone(), y)
    assert [decision.code for result in results for decision in result.decisions] == codes
    torch.testing.assert_close(output, fn(x.clone(), y))


def test_the_report_shows_it() -> None:
    report = explain(Model(), *given(), options={"policy": "always"})
    (site,) = [site for site in report.sites if site.family == "toy"]
    assert (site.status, site.predicted_speedup) == ("lowered", 2.0)
    assert str(site.ir) == "toy.gate<float32> [16,8]"
    assert "monarch_toy.gate" in str([data["target"] for _, data in report.graph.after.nodes(data=True)])
    (kernel,) = site.kernels
    assert "tl.sigmoid" in kernel.text
    assert "2.00x" in str(report)


def test_what_has_no_forms_is_measured_and_left_out_of_plans() -> None:
    model, inputs = Model(), given()
    report = explain(model, *inputs, options={"policy": "always", "block_size": 1}, measure=True)
    assert [(site.family, site.error is None) for site in report.sites] == [("attention", False), ("toy", True)]
    assert report.output_error == pytest.approx(0.0, abs=1e-6)
    plan = calibrate(model, [inputs], budget=1.0, progress=False)
    (attention, toy) = [site.name for site in report.sites]
    assert ([site.name for site in plan.sites], plan.graphs) == ([attention], ((attention,),))
    (_, (planned,)) = run_passes(lambda *z: [model(*z)], *inputs, plan=plan, block_size="auto")
    assert [(d.name, d.status) for d in planned.decisions][1] == (toy, "lowered"), "a plan says nothing of it"


def test_a_plan_gives_no_form_to_a_family_without(tmp_path: Path) -> None:
    plan = Plan((SitePlan("a", (), Form(4)),), (("a",),), 0.1, 0.0, 1, 1, "cpu")
    path = plan.save(tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"family": "attention"', '"family": "toy"'))
    with pytest.raises(PlanError, match="the family 'toy' has no forms"):
        Plan.load(path)


def test_a_plan_keeps_it_exact() -> None:
    model, (x, y) = Model(), given()
    (_, (result,)) = run_passes(lambda *z: [model(*z)], x, y)
    names = tuple(decision.name for decision in result.decisions)
    plan = Plan(tuple(SitePlan(name, (), None, "chosen") for name in names), (names,), 0.1, 0.0, 1, 1, "cpu")
    (_, (planned,)) = run_passes(lambda *z: [model(*z)], x, y, plan=plan)
    assert [decision.code for decision in planned.decisions] == ["plan_exact", "plan_exact"]


def test_of_two_families_that_claim_a_node_the_one_that_gains_more_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "rival", RIVAL)
    x, y = given()
    (output,), (result,) = run_passes(lambda x, y: [x * torch.sigmoid(x) + y], x, y)
    torch.testing.assert_close(output, x * torch.sigmoid(x) + y)
    assert [(d.family, d.status, d.code) for d in result.decisions] == [
        ("toy", "exact", "claimed"),
        ("rival", "lowered", "lowered"),
    ]
    assert "of family rival, which gains more" in result.decisions[0].reason
    assert CODES["claimed"].is_choice, "strict mode accepts it"


def test_its_passes_are_in_the_pipeline() -> None:
    names = [step.name for step in pipeline(frontends())]
    assert names.index("hoist_scales") < names.index("match") < names.index("arbitrate") < names.index("lower")
