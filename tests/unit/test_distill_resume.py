"""A run that is stopped changes nothing, and goes on to the weights of one that was not stopped, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.distilled import Transformer, batches, changed, quick, state_of

from monarch_compile import InputError, distill
from monarch_compile.distillation import run
from monarch_compile.distillation.training import Training

ROOT = Path(__file__).parents[2]
STEPS = 12


class Stopped(BaseException):
    pass


@pytest.fixture(autouse=True)
def saves_often(monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY", 5)


@pytest.fixture(scope="module")
def calls():
    return batches(3)


@pytest.fixture(scope="module")
def unbroken(calls):
    return distill(Transformer(), calls, **quick(steps=STEPS))


def stop_after(patch, steps, error):
    """Raise `error` at the step after so many, of all groups together."""
    taken, take = [], Training._take_step

    def counted(self, place):
        if len(taken) == steps:
            raise error
        taken.append(self.name)
        return take(self, place)

    patch.setattr(Training, "_take_step", counted)
    return taken


@pytest.mark.parametrize("steps", [3, 8, STEPS + 7], ids=["before the first save", "after a save", "the second layer"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_stopped_run_goes_on_to_the_same_weights(steps, inplace, calls, unbroken, tmp_path):
    model, arguments = Transformer(), quick(steps=STEPS, checkpoint=tmp_path / "run.pt", inplace=inplace)
    before = state_of(model)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, steps, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            distill(model, calls, **arguments)
    assert not changed(before, model)
    assert model.training
    with pytest.MonkeyPatch.context() as patch:
        taken = stop_after(patch, 1000, Stopped())
        report = distill(model, calls, **arguments)
    assert len(taken) == 2 * STEPS - steps // STEPS * STEPS - steps % STEPS // 5 * 5
    assert not changed(unbroken.model.state_dict(), report.model)
    assert [site.calls for site in report.sites] == [site.calls for site in unbroken.sites]


def test_a_finished_run_is_read_without_another_step(calls, unbroken, tmp_path, monkeypatch):
    arguments = quick(steps=STEPS, checkpoint=tmp_path / "run.pt")
    first = distill(Transformer(), calls, **arguments)
    stop_after(monkeypatch, 0, Stopped())
    again = distill(Transformer(), calls, **arguments)
    assert not changed(unbroken.model.state_dict(), again.model)
    assert again.sites == first.sites


@pytest.mark.nightly
def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(calls, unbroken, tmp_path):
    path = tmp_path / "run.pt"
    program = (
        "import os\n"
        "from support.distilled import Transformer, batches, quick\n"
        "from monarch_compile import distill\n"
        "from monarch_compile.distillation import run\n"
        "from monarch_compile.distillation.training import Training\n"
        "run.SAVE_EVERY, take, taken = 5, Training._take_step, []\n"
        "def counted(self, place):\n"
        "    taken.append(0)\n"
        "    return take(self, place) if len(taken) < 8 else os.kill(os.getpid(), 9)\n"
        "Training._take_step = counted\n"
        f"distill(Transformer(), batches(3), **quick(steps={STEPS}, checkpoint={str(path)!r}))\n"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -9
    assert path.exists()
    report = distill(Transformer(), calls, **quick(steps=STEPS, checkpoint=path))
    assert not changed(unbroken.model.state_dict(), report.model)


@pytest.mark.parametrize("other", ["steps", "lr", "seed", "calls", "held_out", "weights", "options"])
def test_the_checkpoint_of_another_run_is_refused(other, calls, tmp_path):
    path = tmp_path / "run.pt"
    distill(Transformer(layers=1), calls[:1], **quick(steps=2, checkpoint=path))
    model, given, arguments = Transformer(layers=1), calls[:1], quick(steps=2, checkpoint=path)
    if other == "weights":
        with torch.no_grad():
            model.layers[0].mlp[0].bias[0] += 1
    elif other == "calls":
        given = calls[1:2]
    elif other == "options":
        arguments["options"] = {**arguments["options"], "window": 1}
    else:
        arguments[other] = {"steps": 3, "lr": 0.02, "seed": 1, "held_out": calls[1:2]}[other]
    with pytest.raises(InputError, match="checkpoint of another run"):
        distill(model, given, **arguments)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_named(content, calls, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.pt is no checkpoint"):
        distill(Transformer(layers=1), calls[:1], **quick(steps=2, checkpoint=path))
    assert path.read_bytes() == content


def test_new_weights_are_written_all_or_none():
    model = torch.nn.Linear(3, 2)
    before = state_of(model)
    with pytest.raises(RuntimeError), run.written({model.weight: torch.ones(2, 3), model.bias: torch.ones(5)}):
        pass
    assert not changed(before, model)
    with run.written({model.weight: torch.ones(2, 3)}):
        assert (model.weight == 1).all()
    assert {*changed(before, model)} == {"weight"}
