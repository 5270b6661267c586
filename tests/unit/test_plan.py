"""Plans: kept as JSON without loss, and refused where they are broken."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monarch_compile.attention.form import Form
from monarch_compile.calibration.plan import Plan, SitePlan
from monarch_compile.config import parse_options
from monarch_compile.errors import ConfigError, PlanError

forms = st.builds(
    Form,
    block_size=st.integers(1, 512),
    num_iters=st.integers(1, 3),
    init=st.sampled_from(["identity", "mean"]),
    pad=st.sampled_from(["post", "pre"]),
    window=st.none() | st.integers(0, 3),
    prefix=st.integers(0, 8),
)
seconds = st.none() | st.floats(1e-6, 1.0)
sites = st.builds(
    SitePlan,
    name=st.text(min_size=1),
    shape=st.just(()) | st.tuples(*[st.integers(1, 128)] * 3),
    form=st.none() | forms,
    reason=st.text(),
    error=st.floats(0.0, 1.0),
    exact_s=seconds,
    monarch_s=seconds,
)
plans = st.builds(
    lambda entries, **more: Plan(sites=tuple(entries), graphs=(tuple(e.name for e in entries),), **more),
    st.lists(sites, max_size=4, unique_by=lambda site: site.name),
    budget=st.floats(0.0, 1.0),
    metric=st.floats(0.0, 1.0),
    num_samples=st.integers(1, 9),
    num_passes=st.integers(1, 30),
    device=st.sampled_from(["cpu", "h200"]),
)
PLAN = Plan(
    sites=(
        SitePlan("layers.0 (m.py:3)", (8, 64, 64), Form(50), "", 0.125, 2e-3, 1e-3),
        SitePlan("layers.1 (m.py:3)", (8, 64, 64), None, "causal"),
    ),
    graphs=(("layers.0 (m.py:3)", "layers.1 (m.py:3)"),),
    budget=0.01,
    metric=0.0075,
    num_samples=3,
    num_passes=12,
    device="cpu",
)


@given(plans)
def test_saved_and_loaded_is_the_same(tmp_path_factory, plan):
    path = plan.save(tmp_path_factory.mktemp("plans") / "plan.json")
    assert Plan.load(path) == plan
    assert hash(Plan.load(path)) == hash(plan)


def test_a_plan_prints_as_a_table(check_golden):
    check_golden("plan.txt", f"{PLAN}\n")


def test_the_fingerprint_is_the_models_and_not_the_choices():
    other = Plan(**{**vars_of(PLAN), "budget": 9.0, "metric": 8.0})
    assert other.fingerprint == PLAN.fingerprint
    renamed = Plan(**{**vars_of(PLAN), "graphs": ()})
    assert renamed.fingerprint != PLAN.fingerprint


def vars_of(plan):
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def with_form(content, **options):
    site, *others = content["sites"]
    return content | {"sites": [site | {"form": site["form"] | options}, *others]}


BROKEN = {
    "version 7": lambda content: content | {"version": 7},
    "version None": lambda content: [],
    "fingerprint": lambda content: content | {"graphs": [["other"]]},
    "is not a plan": lambda content: content | {"sites": [{"name": "x"}]},
    "is not a plan: 'nobody'": lambda content: with_form(content, family="nobody"),
    "is not a plan: 'num_iters' must be": lambda content: with_form(content, num_iters=0),
    "is not a plan: Form": lambda content: with_form(content, surprise=1),
    "is not a plan: Plan": lambda content: content | {"surprise": 1},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_refused(message, tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    path.write_text(json.dumps(BROKEN[message](json.loads(path.read_text()))))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("text", [None, "{"])
def test_an_unreadable_file_is_refused(text, tmp_path):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match="cannot read a plan"):
        parse_options({"plan": path})


def test_a_plan_and_what_it_settles_are_not_given_together():
    with pytest.raises(ConfigError, match=r"the plan settles .* found block_size, window beside it"):
        parse_options({"plan": PLAN, "window": 1, "block_size": 5})
    assert parse_options({"plan": PLAN, "policy": "always"})[0].plan == PLAN


def test_sites_are_found_by_name_and_shape():
    assert PLAN.site("layers.0 (m.py:3)", (8, 64, 64)).form == Form(50)
    with pytest.raises(PlanError, match=r"has no site 'layers\.9'; it has layers\.0"):
        PLAN.site("layers.9", (8, 64, 64))
    with pytest.raises(PlanError, match=r"\(4, 64, 64\), the plan's has \(8, 64, 64\)"):
        PLAN.site("layers.0 (m.py:3)", (4, 64, 64))
    PLAN.check_graph(PLAN.graphs[0])
    PLAN.check_graph(())
    with pytest.raises(PlanError, match=r"a captured graph has the sites layers.0 \(m.py:3\),"):
        PLAN.check_graph(PLAN.graphs[0][:1])
