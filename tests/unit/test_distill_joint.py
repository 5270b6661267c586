"""Sites that learn together after each has learned by itself: nearer on unseen inputs, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from support.distilled import OPTIONS, Joint, Packed, Rotary, Transformer, batches, changed, quick, state_of

from monarch_compile import DistillationError, InputError, distill
from monarch_compile.calibration.instrument import with_attention
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.distillation import joint
from monarch_compile.distillation.training import Training

TOGETHER = {"joint_steps": 60, "joint_lr": 5e-3}


@pytest.fixture(scope="module")
def calls():
    return batches(8)


@pytest.fixture(scope="module")
def unseen():
    return batches(4, seed=9)


@pytest.mark.parametrize(("make", "dtype"), [(Packed, torch.bfloat16), (Joint, torch.float32), (Rotary, torch.float32)])
def test_the_output_is_nearer_on_unseen_inputs(make, dtype, calls, unseen):
    teacher = Transformer(make, layers=3).eval().to(dtype)
    given, others = ([x.to(dtype) for x in inputs] for inputs in (calls, unseen))
    report = distill(teacher, given, held_out=others, **quick(steps=40), **TOGETHER)
    assert report.joint.kept
    assert report.joint.held_out.after < 0.97 * report.joint.held_out.before
    assert (report.calls.after, report.held_out.after) == (report.joint.calls.after, report.joint.held_out.after)
    lowered = with_attention(report.model, lambda call: call.monarch(), OPTIONS)
    with torch.no_grad():
        error = relative_error([teacher(x) for x in others], [lowered(x) for x in others])
    assert error == pytest.approx(report.held_out.after, rel=1e-3)
    assert "60 steps together" in str(report)
    assert report.to_dict()["joint"]["steps"] == 60


def test_only_what_has_learned_site_by_site_changes(calls):
    model = Transformer()
    model.layers[1].attention.qkv.requires_grad_(False)
    alone = distill(model, calls[:2], **quick())
    together = distill(model, calls[:2], **quick(), **TOGETHER)
    found = changed(state_of(model), together.model)
    assert {*found} == {*changed(state_of(model), alone.model)}
    assert {*found} == {"layers.0.attention.qkv.weight", "layers.0.attention.qkv.bias"}
    assert not any(x[2 * x.shape[0] // 3 :].any() for x in found.values())  # those of the values
    assert changed(alone.model.state_dict(), together.model)
    assert [p.requires_grad for p in together.model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_nothing_gets_a_gradient_and_the_inputs_stay(calls):
    model, x = Transformer(), calls[0].clone().requires_grad_()
    distill(model, x, inplace=True, **quick(), **TOGETHER)
    assert x.grad is None
    assert all(p.grad is None and p.is_leaf for p in model.parameters())
    assert torch.equal(x, calls[0])
    assert model.training


def test_what_inputs_and_attributes_are_made_of_gets_no_gradient(calls):
    """Neither do they stop a second visit of a call."""

    class Scaled(Transformer):
        def __init__(self):
            super().__init__()
            self.base = torch.nn.Parameter(torch.ones(()))
            self.scale = self.base * 1.0

        def forward(self, x):
            return super().forward(x * self.scale)

    model, embedding = Scaled(), torch.nn.Linear(calls[0].shape[-1], calls[0].shape[-1])
    given = [embedding(x) for x in calls[:2]]
    report = distill(model, given, inplace=True, **quick(), joint_steps=5)
    assert report.joint.steps == 5
    assert model.base.grad is None
    assert embedding.weight.grad is None


class Within(Transformer):
    """Autocast around each layer."""

    def forward(self, x):
        for layer in self.layers:
            with torch.autocast("cpu", torch.bfloat16):
                x = layer(x)
        return x.float()


def test_autocast_in_the_model_is_left_as_it_was(calls):
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    teacher = Within(layers=2).eval()
    report = distill(teacher, calls[:4], **quick(steps=40), **TOGETHER)
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == depth
    assert report.calls.after < 0.8 * report.calls.before
    lowered = with_attention(report.model, lambda call: call.monarch(), OPTIONS)
    with torch.no_grad():
        error = relative_error([teacher(x) for x in calls[:4]], [lowered(x) for x in calls[:4]])
    assert error == pytest.approx(report.calls.after, rel=0.05)


def test_around_autocast_weights_that_were_cast_are_forgotten(calls):
    with torch.autocast("cpu", torch.bfloat16):
        report = distill(Transformer(), calls[:4], **quick(steps=40), **TOGETHER)
    assert report.joint.kept
    assert report.calls.after < 0.8 * report.calls.before


def test_gradients_pass_views_that_are_written_to(calls):
    class Padded(Transformer):
        def forward(self, x):
            x = self.layers[0](x)
            y = torch.zeros(x.shape[0], x.shape[1] + 8, x.shape[2])
            y[:, : x.shape[1]] = x
            return self.layers[1](y[:, : x.shape[1]])

    report = distill(Padded(), calls[:2], **quick(), **TOGETHER)
    assert report.joint.unreached == ()


def test_what_no_gradient_reaches_is_named(calls, caplog):
    class Broken(Transformer):
        @torch._dynamo.disable
        def hidden(self, x):
            return x * 1.0

        def forward(self, x):
            return self.layers[1](self.hidden(self.layers[0](x)))

    report = distill(Broken(), calls[:2], **quick(), **TOGETHER)
    assert report.joint.unreached == ("layers.0.attention.qkv.weight", "layers.0.attention.qkv.bias")
    assert "no gradient reached layers.0.attention.qkv.weight" in caplog.text


def test_an_output_that_is_not_finite_keeps_what_was_learned_site_by_site(calls, caplog):
    class Masked(Transformer):
        def forward(self, x):
            y = super().forward(x)
            return torch.where(torch.arange(y.shape[-1]) < 2, -torch.inf, y)

    report = distill(Masked(), calls[:2], **quick(), **TOGETHER)
    assert report.joint is None
    assert report.num_distilled == 2
    assert "sites do not learn together: the error of the model's output is nan" in caplog.text


def test_weights_that_bring_it_no_nearer_are_not_kept(calls):
    alone = distill(Transformer(), calls[:2], **quick())
    report = distill(Transformer(), calls[:2], **quick(), joint_steps=5, joint_lr=3.0)
    assert not report.joint.kept
    assert report.joint.calls.after > report.joint.calls.before
    assert report.calls == alone.calls
    assert not changed(alone.model.state_dict(), report.model)
    assert "not kept" in str(report)


def test_weights_that_cannot_move_do_not_learn_together(calls):
    model = Transformer().requires_grad_(False)
    report = distill(model, calls[:2], **quick(), **TOGETHER)
    assert report.joint is None
    assert not changed(state_of(model), report.model)


@pytest.mark.parametrize("stop", [2, 7])
def test_a_stopped_run_goes_on_to_the_same_weights(stop, calls, tmp_path, monkeypatch):
    monkeypatch.setattr("monarch_compile.distillation.run.SAVE_EVERY", 5)
    arguments = quick(steps=4, checkpoint=tmp_path / "run.pt", joint_steps=12)
    unbroken = distill(Transformer(), calls[:3], **quick(steps=4, joint_steps=12))
    take = Training._take_step

    def stopped(self, place):
        if self.name == joint.NAME and self.step == stop:
            raise KeyboardInterrupt
        return take(self, place)

    model = Transformer()
    before = state_of(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_take_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            distill(model, calls[:3], inplace=True, **arguments)
    assert not changed(before, model)
    steps = []

    def counted(self, place):
        steps.append(self.name)
        return take(self, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_take_step", counted)
        report = distill(model, calls[:3], **arguments)
        assert steps == [joint.NAME] * (12 - stop // 5 * 5)
        again = distill(Transformer(), calls[:3], **arguments)
    assert len(steps) == 12 - stop // 5 * 5, "what is done is read"
    assert not changed(unbroken.model.state_dict(), report.model)
    assert not changed(unbroken.model.state_dict(), again.model)
    with pytest.raises(InputError, match="checkpoint of another run"):
        distill(model, calls[:3], **{**arguments, "joint_steps": 13})


def test_a_loss_that_is_not_finite_changes_nothing(calls):
    model = Transformer()
    before = state_of(model)
    with pytest.raises(DistillationError, match="all sites together: the loss is nan"):
        distill(model, calls[0], inplace=True, **quick(), joint_steps=5, joint_lr=1e30)
    assert not changed(before, model)


@pytest.mark.parametrize("number", [-1, 1.5, True])
def test_a_number_of_steps_that_is_none_is_named(number, calls):
    with pytest.raises(InputError, match="joint_steps must be an int of at least 0; found"):
        distill(Transformer(), calls[0], **quick(), joint_steps=number)
