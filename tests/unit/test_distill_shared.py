"""Weights that are shared in ways that no graph shows at once: by memory, and by what one site gives another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.distilled import (
    DIM,
    HEAD_DIM,
    HEADS,
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
from monarch_compile.distillation.memory import sharers


@pytest.fixture(scope="module")
def calls():
    return batches(2)


class ByData(Separate):
    """Values whose parameter is another one, of the same memory."""

    def __init__(self):
        super().__init__()
        self.v.weight = nn.Parameter(self.q.weight.data)


class PartOfAnother(Separate):
    """Queries whose weight is a part of a larger parameter, which the values read."""

    def __init__(self):
        super().__init__()
        self.large = nn.Parameter(0.2 * torch.randn(2 * DIM, DIM))
        self.q.weight = nn.Parameter(self.large.data[:DIM])

    def forward(self, x):
        q, k, _ = self.qkv(x)
        return attend(q, k, heads(F.linear(x, self.large[:DIM])))


class InABuffer(Separate):
    """A buffer of the weight's memory, transposed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("turned", self.q.weight.data.T)

    def forward(self, x):
        return super().forward(x) @ self.turned


class InAnAttribute(Separate):
    """A tensor of the weight's memory, which is not registered."""

    def __init__(self):
        super().__init__()
        self.kept = self.q.weight.data

    def forward(self, x):
        return super().forward(x) @ self.kept


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [ByData, PartOfAnother, InABuffer, InAnAttribute])
def test_a_weight_whose_memory_is_anothers_stays(make, inplace, calls):
    model = Transformer(make, layers=1).eval()
    before = state_of(model)
    report = distill(model, calls, **quick(inplace=inplace))
    (site,) = report.sites
    assert site.code == "shared_weight"
    assert "attention.q.weight shares memory with layers.0.attention." in site.reason
    assert not changed(before, report.model)


def test_parts_of_one_memory_that_do_not_meet_are_apart(calls):
    model = Transformer(Separate, layers=1).eval()
    flat, place = torch.cat([p.detach().flatten() for p in model.parameters()]), 0
    for parameter in model.parameters():
        parameter.data = flat[place : place + parameter.numel()].view_as(parameter)
        place += parameter.numel()
    assert sharers(model) == {}
    before = state_of(model)
    report = distill(model, calls, **quick(inplace=True))
    names = {f"layers.0.attention.{name}" for name in ("q.weight", "q.bias", "k.weight")}
    assert {*changed(before, report.model)} == names
    model.register_buffer("all", flat)
    assert {*sharers(model).values()} == {"all"}
    assert {*sharers(model)} == {name for name, _ in model.named_parameters()}


def test_tied_parameters_have_one_memory():
    model = Separate()
    model.v.weight = model.q.weight
    assert sharers(model) == {}


class TwoSites(nn.Module):
    """Two sites that share their keys, and learn together therefore."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)

    def queries(self, x):
        return self.one(x), self.two(x)

    def forward(self, x):
        k, v = (heads(y) for y in self.kv(x).chunk(2, -1))
        one, two = self.queries(x)
        return attend(heads(one), k, v) + attend(heads(two), k, v)


class BiasOfTheOther(TwoSites):
    def queries(self, x):
        return F.linear(x, self.one.weight) + self.two.bias, self.two(x)


class ScaledByTheOther(TwoSites):
    def queries(self, x):
        scale = self.two.weight[0].view(HEADS, HEAD_DIM).flatten()
        return self.one(x) * scale, self.two(x)


class MadeOfTheOther(TwoSites):
    def queries(self, x):
        one = self.one(x)
        return one, self.two(one)


@pytest.mark.parametrize(
    ("make", "weight"),
    [(BiasOfTheOther, "two.bias"), (ScaledByTheOther, "two.weight"), (MadeOfTheOther, "one.weight")],
)
def test_what_one_site_has_for_a_leaf_does_not_learn_for_another(make, weight, calls):
    model = Transformer(make, layers=1).eval()
    report = distill(model, calls, **quick())
    assert [site.code for site in report.sites] == ["shared_weight"] * 2
    assert f"attention.{weight} also leads to" in report.sites[0].reason
    assert not changed(state_of(model), report.model)


def test_sites_that_share_no_more_than_their_keys_learn(calls):
    report = distill(Transformer(TwoSites, layers=1).eval(), calls, **quick())
    assert [site.code for site in report.sites] == ["distilled"] * 2


def test_parameters_beside_the_path_get_no_gradient(calls):
    class Placed(Separate):
        def __init__(self):
            super().__init__()
            self.places = nn.Parameter(torch.zeros(HEAD_DIM))

        def forward(self, x):
            q, k, v = self.qkv(x)
            return attend(q + self.places, k, v)

    model = Transformer(Placed, layers=1).eval()
    report = distill(model, calls, **quick(inplace=True))
    assert report.num_distilled == 1
    assert all(parameter.grad is None for parameter in model.parameters())
