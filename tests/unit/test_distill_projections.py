"""What leads to queries and keys is found in every spelling, and a weight that does more is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.distilled import (
    DIM,
    HEAD_DIM,
    AddMM,
    Interleaved,
    Joint,
    Multihead,
    Normed,
    Packed,
    Rotary,
    Separate,
    Transformer,
    attend,
    batches,
    changed,
    heads,
    quick,
    state_of,
)
from torch import nn

from monarch_compile import distill

LEARNED = quick(steps=60, lr=0.03)
ONE_LAYER = "layers.0.attention."
ROWS = torch.arange(3 * DIM)


@pytest.fixture(scope="module")
def calls():
    return batches(8)


def grouped():
    return Separate(kv_heads=1)


PACKED = ROWS < 2 * DIM
INTERLEAVED = ROWS % (3 * HEAD_DIM) < 2 * HEAD_DIM
SPELLINGS = {
    "packed": (Packed, {"qkv.weight": PACKED[:, None], "qkv.bias": PACKED}),
    "packed without bias": (lambda: Packed(bias=False), {"qkv.weight": PACKED[:, None]}),
    "separate": (Separate, {"q.weight": True, "q.bias": True, "k.weight": True}),
    "grouped heads": (grouped, {"q.weight": True, "q.bias": True, "k.weight": True}),
    "rotary": (Rotary, {"q.weight": True, "q.bias": True, "k.weight": True}),
    "norms of heads": (Normed, {"q.weight": True, "q.bias": True, "k.weight": True}),
    "addmm": (AddMM, {"weight": PACKED[None], "bias": PACKED}),
    "interleaved": (Interleaved, {"weight": INTERLEAVED[:, None]}),
    "joint": (
        Joint,
        {f"{name}.weight": PACKED[:, None] for name in ("first", "second")}
        | {f"{name}.bias": PACKED for name in ("first", "second")},
    ),
    "nn.MultiheadAttention": (
        Multihead,
        {"attention.in_proj_weight": PACKED[:, None], "attention.in_proj_bias": PACKED},
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_queries_and_keys_learn_and_nothing_else(spelling, calls):
    make, expected = SPELLINGS[spelling]
    model = Transformer(make, layers=1).eval()
    report = distill(model, calls, **LEARNED)
    (site,) = report.sites
    assert (site.code, site.reason) == ("distilled", "")
    assert site.calls.after < site.calls.before
    differs = changed(state_of(model), report.model)
    assert {*differs} == {ONE_LAYER + name for name in expected}
    for name, learns in expected.items():
        may = torch.as_tensor(learns).expand_as(differs[ONE_LAYER + name])
        assert not (differs[ONE_LAYER + name] & ~may).any()
        assert (differs[ONE_LAYER + name] & may).sum() > 0.9 * may.sum()


class Shared(Separate):
    """Values that are the keys."""

    def forward(self, x):
        q, k, _ = self.qkv(x)
        return attend(q, k, k)


class Adapted(Separate):
    """A low-rank adapter beside the projection of the queries."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)

    def forward(self, x):
        _, k, v = self.qkv(x)
        return attend(heads(self.q(x) + 0.5 * self.up(self.down(x))), k, v)


class LowRank(Separate):
    """Queries by way of a narrow layer, as the only way."""

    def __init__(self):
        super().__init__()
        self.down, self.q = nn.Linear(DIM, 4), nn.Linear(4, DIM)

    def forward(self, x):
        return attend(heads(self.q(self.down(x))), heads(self.k(x)), heads(self.v(x)))


class Bare(Separate):
    """Queries and keys that no layer makes."""

    def forward(self, x):
        return attend(heads(x), heads(x), heads(self.v(x)))


class Convolved(Separate):
    """Queries of a convolution."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(DIM, DIM, 3, padding=1)

    def forward(self, x):
        _, k, v = self.qkv(x)
        return attend(heads(self.mix(x.mT).mT), k, v)


class Computed(Separate):
    """A weight that is made of two parameters."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(DIM, 1))

    def forward(self, x):
        _, k, v = self.qkv(x)
        return attend(heads(F.linear(x, self.q.weight * self.gain)), k, v)


class Reused(Separate):
    """The weight of the queries serves the output, too."""

    def forward(self, x):
        return super().forward(x) @ self.q.weight


class Returned(Separate):
    """Keys that decide more than attention."""

    def forward(self, x):
        return super().forward(x) + self.k(x).mean(1, keepdim=True)


class Frozen(Separate):
    """No weight wants a gradient."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class Causal(Separate):
    """The same weights serve attention that stays exact."""

    def forward(self, x):
        q, k, v = self.qkv(x)
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attend(q, k, v) + exact.transpose(1, 2).flatten(2)


NOT_LEARNED = {
    Shared: ("shared_weight", "k.weight"),
    Adapted: ("several_projections", "queries"),
    Bare: ("no_projection", "queries"),
    Convolved: ("no_projection", "conv"),
    Computed: ("no_projection", "linear"),
    Reused: ("shared_weight", "q.weight"),
    Returned: ("shared_weight", "k.weight"),
    Frozen: ("frozen_weight", "q.weight"),
    Causal: ("shared_weight", "q.weight"),
}


@pytest.mark.parametrize("make", NOT_LEARNED, ids=lambda make: make.__name__)
def test_what_cannot_learn_says_why_and_is_left_alone(make, calls):
    code, word = NOT_LEARNED[make]
    model = Transformer(make, layers=1).eval()
    report = distill(model, calls[:1], **quick())
    site = next(site for site in report.sites if site.code != "exact")
    assert site.code == code
    assert word in site.reason
    assert site.remedy in str(report)
    assert not changed(model.state_dict(), report.model)


def test_frozen_weights_change_where_that_is_asked_for(calls):
    model = Transformer(Frozen, layers=1).eval()
    report = distill(model, calls[:2], **quick(train_frozen=True))
    assert {*report.sites[0].weights} == {ONE_LAYER + name for name in ("q.weight", "q.bias", "k.weight")}
    model.layers[0].attention.k.requires_grad_(True)
    report = distill(model, calls[:2], **quick())
    assert {*changed(model.state_dict(), report.model)} == {ONE_LAYER + "k.weight"}


def test_a_narrow_layer_learns_what_follows_it(calls):
    model = Transformer(LowRank, layers=1).eval()
    report = distill(model, calls[:2], **quick())
    assert {*report.sites[0].weights} == {ONE_LAYER + name for name in ("q.weight", "q.bias", "k.weight")}


def test_layers_that_share_their_weights_learn_together(calls):
    model = Transformer(Packed, layers=1).eval()
    twice = nn.Sequential(model.layers[0], model.layers[0])
    report = distill(twice, calls, **LEARNED)
    assert [site.code for site in report.sites] == ["distilled"] * 2
    assert report.sites[0].seconds == report.sites[1].seconds
    differs = changed(state_of(twice), report.model)
    assert {*differs} == {f"{i}.attention.qkv.{what}" for i in (0, 1) for what in ("weight", "bias")}
    after, before = (sum(getattr(site.calls, name) ** 2 for site in report.sites) for name in ("after", "before"))
    assert after < before


def test_a_weight_that_an_exact_layer_shares_stays(calls):
    model = nn.Sequential(*(Transformer(Packed, layers=2).layers))
    model[1].attention.qkv = model[0].attention.qkv
    report = distill(model.eval(), calls[:2], **quick())
    first, second = report.plan.sites
    assert report.num_distilled == 2
    plan = type(report.plan)(**{**vars(report.plan), "sites": (first, type(second)(second.name, second.shape, None))})
    report = distill(model, calls[:2], plan=plan, **quick(options=None))
    assert [site.code for site in report.sites] == ["shared_weight", "exact"]


class Crossed(nn.Module):
    """Two sites that read one tensor of keys; their queries come from slices of one weight."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, 2 * DIM, bias=False), nn.Linear(DIM, 2 * DIM)

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        first, second = self.q.weight.split(DIM)
        k, v = heads(k), heads(v)
        return attend(heads(F.linear(x, first)), k, v) + attend(heads(F.linear(x, second)), k, v)


def test_sites_that_read_the_same_keys_learn_together(calls):
    model = Transformer(Crossed, layers=1).eval()
    report = distill(model, calls[:2], **quick())
    assert [site.code for site in report.sites] == ["distilled"] * 2
    differs = changed(state_of(model), report.model)
    assert {*differs} == {ONE_LAYER + name for name in ("q.weight", "kv.weight", "kv.bias")}
    assert not differs[ONE_LAYER + "kv.weight"][DIM:].any()


def test_autocast_is_no_obstacle(calls):
    with torch.autocast("cpu", torch.bfloat16):
        report = distill(Transformer(Rotary).eval(), calls[:2], **quick())
    assert [site.code for site in report.sites] == ["distilled"] * 2
    assert report.model.layers[0].attention.q.weight.dtype == torch.float32


class Broken(Transformer):
    """Layers in several graphs, of which one may serve all."""

    def forward(self, x):
        first, *others = self.layers
        x = first(x)
        torch._dynamo.graph_break()
        for layer in others:
            x = layer(x)
        return x


class BrokenInALoop(Transformer):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def test_layers_may_be_in_graphs_of_their_own(calls):
    report = distill(Broken(Separate).eval(), calls[:2], **quick())
    assert [site.code for site in report.sites] == ["distilled"] * 2


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_another_graph_reads_is_left_alone(first, calls):
    class Used(Transformer):
        def forward(self, x):
            if first:
                x = x @ self.layers[0].attention.q.weight
                torch._dynamo.graph_break()
                return super().forward(x)
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x @ self.layers[0].attention.q.weight

    report = distill(Used(Separate).eval(), calls[:1], **quick())
    assert [site.code for site in report.sites] == ["shared_weight", "distilled"]


def test_a_graph_that_serves_several_layers_is_left_alone(calls):
    model = BrokenInALoop(Separate).eval()
    report = distill(model, calls[:2], **quick())
    assert [site.code for site in report.sites] == ["several_layers"]
    assert not changed(model.state_dict(), report.model)


def test_attention_in_a_branch_is_left_alone(calls):
    class Branch(Separate):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: attend(*self.qkv(y)), lambda y: self.v(y), (x,))

    report = distill(Transformer(Branch, layers=1).eval(), calls[:1], **quick())
    assert [site.code for site in report.sites] == ["in_body"]
