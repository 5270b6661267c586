"""Runs that are compared start alike: models that draw noise or keep state have no error from that."""

from __future__ import annotations

import functools
import logging
import random
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import monarch_compile
from monarch_compile.attention import candidates
from monarch_compile.calibration.snapshot import Snapshot, kept
from monarch_compile.report.explainer import explain

SEQ_LEN, DIM = 24, 16
EXACT = {"policy": "always", "block_size": SEQ_LEN}
"""One block: the Monarch form is exact attention, and any error comes from elsewhere."""


class Model(nn.Module):
    """Self-attention of what `disturbed` makes of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x, *rest):
        q, k, v = self.qkv(self.disturbed(x, *rest)).view(*x.shape[:2], 3, 2, DIM // 2).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class Noise(Model):
    def disturbed(self, x):
        return F.dropout(x + torch.randn_like(x), 0.4)


class OwnGenerator(Model):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    @torch.compiler.disable
    def disturbed(self, x):
        return x + torch.randn(x.shape, generator=self.generator)


class OtherGenerators(Model):
    @torch.compiler.disable
    def disturbed(self, x):
        return x * (random.random() + np.random.rand())


class RunningStatistics(Model):
    """BatchNorm's, in train mode, read before they are updated."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def disturbed(self, x):
        shift = self.norm.running_mean.clone()
        return self.norm(x.transpose(1, 2)).transpose(1, 2) + 9 * shift


class SpectralNorm(Model):
    """The power iteration in train mode goes on from where it was."""

    def __init__(self):
        super().__init__()
        self.mix = nn.utils.spectral_norm(nn.Linear(DIM, DIM))

    def disturbed(self, x):
        return self.mix(x)


class Counter(Model):
    """A number, a tensor that is no buffer, and a buffer that is assigned anew."""

    def __init__(self):
        super().__init__()
        self.step, self.plain = 0, torch.zeros(())
        self.register_buffer("total", torch.zeros(()))

    def disturbed(self, x):
        self.step += 1
        self.plain += 1
        self.total = self.total + 1
        return x * (self.step + self.plain + self.total)


class Cache:
    """As those of transformers: layers in a list, tensors that are replaced as they grow."""

    def __init__(self):
        self.layers = [Cached()]


class Cached:
    def __init__(self):
        self.seen = None


class KeepsACache(Model):
    def __init__(self):
        super().__init__()
        self.cache = Cache()

    def disturbed(self, x):
        layer = self.cache.layers[0]
        layer.seen = x if layer.seen is None else layer.seen + x
        return layer.seen * 2


class IsGivenACache(Model):
    """And an input, both of which it writes to."""

    def disturbed(self, x, cache):
        cache["steps"].append(x.clone())
        x.mul_(1.5)
        return x + sum(cache["steps"])


def closure():
    model, step = Counter(), torch.zeros(())

    def run(x):
        step.add_(1)
        return model(x * step)

    return run


GLOBAL = RunningStatistics()


def by_global(x):
    return helper(x)


def helper(x):
    return (lambda y: GLOBAL(y))(x)


SUBJECTS = {
    "noise": Noise,
    "own_generator": OwnGenerator,
    "other_generators": OtherGenerators,
    "batch_norm": RunningStatistics,
    "spectral_norm": SpectralNorm,
    "counter": Counter,
    "cache": KeepsACache,
    "closure": closure,
    "global": lambda: by_global,
    "partial": lambda: functools.partial(Counter()),
    "method": lambda: Counter().forward,
    "compiled": lambda: torch.compile(Counter(), backend="eager"),
}


def an_input():
    return torch.randn(2, SEQ_LEN, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_exact_form_has_no_error_in_a_model_with_state(name):
    model = SUBJECTS[name]()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    report = explain(model, an_input(), options=EXACT, measure=True)
    assert [site.status for site in report.sites] == ["lowered"]
    assert report.output_error < 1e-5
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.gpu
def test_an_exact_form_has_no_error_in_a_model_that_draws_noise_on_cuda():
    model, x = Noise().cuda(), an_input().cuda()
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    report = explain(model, x, options=EXACT, measure=True)
    assert report.output_error < 1e-2
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_measure_still_tells_forms_apart_and_repeats_itself():
    model, options = KeepsACache(), EXACT | {"block_size": 4}
    error = explain(model, an_input(), options=options, measure=True).output_error
    assert error > 1e-3
    assert explain(model, an_input(), options=options, measure=True).output_error == error


def test_inputs_that_are_written_to_are_the_same_for_every_run():
    x, cache = an_input(), {"steps": []}
    assert explain(IsGivenACache(), x, cache, options=EXACT, measure=True).output_error < 1e-5
    assert torch.equal(x, an_input())
    assert cache == {"steps": []}


@pytest.mark.parametrize("name", ["noise", "batch_norm", "counter", "cache"])
def test_calibration_lowers_a_model_with_state_within_its_budget(name, monkeypatch):
    monkeypatch.setattr(candidates.Occurrence, "seconds", lambda *_: (2.0, 1.0))
    options = {"block_size": SEQ_LEN, "window": None, "num_iters": 1, "init": "identity", "pad": "post", "prefix": 0}
    model = SUBJECTS[name]()
    plan = monarch_compile.calibrate(model, [an_input(), 2 * an_input()], budget=1e-4, options=options, progress=False)
    assert plan.num_lowered == 1
    assert plan.metric < 1e-5
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), SUBJECTS[name]().buffers(), strict=True))


class Fails(Counter):
    left = 0  # of the class: no part of a snapshot

    @torch.compiler.disable
    def disturbed(self, x):
        x = super().disturbed(x)
        if not Fails.left:
            raise RuntimeError("as asked")
        Fails.left -= 1
        return x + torch.randn_like(x)


@pytest.mark.parametrize("num_runs", [0, 1])
def test_state_is_put_back_when_a_run_raises(num_runs):
    model, Fails.left = Fails(), num_runs
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="as asked"):
        explain(model, an_input(), options=EXACT, measure=True)
    assert Fails.left == 0
    assert (model.step, model.plain.item(), model.total.item()) == (0, 0.0, 0.0)
    assert torch.equal(torch.get_rng_state(), before)


class ReturnsItsBuffer(Counter):
    def forward(self, x):
        return super().forward(x), self.plain


def test_an_output_that_is_a_buffer_is_compared_as_it_was():
    seen = []

    def metric(reference, output):
        seen.append((reference[1].item(), output[1].item()))
        return 0.0

    monarch_compile.calibrate(ReturnsItsBuffer(), [an_input()], budget=1.0, metric=metric, progress=False)
    assert seen
    assert {*seen} == {(1.0, 1.0)}


def changed_in_place(owner):
    owner.list.append(1)
    owner.deque.popleft()
    owner.dict["new"] = owner.dict.pop("old")
    owner.ordered.move_to_end("a")
    owner.set.add(3)
    owner.nested[0]["x"].append(4)
    owner.tensor.resize_(5).fill_(7)
    owner.expanded.untyped_storage().fill_(9)
    owner.replaced.data = torch.ones(4)
    owner.inference.add_(1)
    owner.new = 1
    del owner.gone


class Owner:
    def __init__(self):
        self.list, self.deque, self.set, self.dict = [0], deque([1, 2]), {1, 2}, {"old": 1, "other": 2}
        self.ordered, self.nested = OrderedDict(a=1, b=2), ({"x": [3]},)
        self.tensor, self.expanded, self.replaced = torch.arange(3.0), torch.zeros(1).expand(3), torch.zeros(2)
        with torch.inference_mode():
            self.inference = torch.zeros(2)
        self.gone = None


def test_everything_that_an_object_holds_is_put_back():
    owner = Owner()
    items = dict(vars(owner))
    with Snapshot(owner) as state:
        for _ in range(2):
            with torch.inference_mode():
                changed_in_place(owner)
            state.restore()
    found, expected = vars(owner), vars(Owner())
    assert list(found) == list(expected)
    assert all(found[name] is value for name, value in items.items())
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value)
        else:
            assert found[name] == value
    assert list(found["ordered"]) == ["a", "b"]


def test_tensors_that_a_backward_pass_waits_for_are_not_disturbed():
    x, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (x * weight).sum()
    with Snapshot(x):
        x.data.add_(1)
    loss.backward()
    assert torch.equal(weight.grad, torch.ones(3))


def test_a_parameter_that_is_written_to_is_warned_of_once(caplog):
    model = nn.Linear(2, 3, bias=False)
    with caplog.at_level(logging.WARNING, "monarch_compile.calibration.snapshot"), Snapshot(model) as state:
        state.restore()
        assert not caplog.records
        with torch.no_grad():
            model.weight.add_(1)
        state.restore()
    assert [record.getMessage() for record in caplog.records] == [
        "the model wrote to a parameter of shape [3, 2], which is not put back: runs differ"
    ]


def test_a_lazy_module_is_made_by_its_first_run():
    model = nn.Sequential(nn.LazyLinear(DIM), nn.LazyBatchNorm1d(SEQ_LEN))
    with Snapshot(model):
        expected = model(an_input())
    assert torch.equal(model(an_input()), expected)
    assert (type(model[0]), model[0].in_features) == (nn.Linear, DIM)


def test_a_kept_output_is_written_to_by_no_run():
    buffer = torch.zeros(2)
    output = kept({"a": [buffer], "b": 3})
    buffer += 1
    assert torch.equal(output["a"][0], torch.zeros(2))
    assert output["b"] == 3
