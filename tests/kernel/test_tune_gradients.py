"""Tuning the kernels of gradients: their space, its store, what is launched. Timer and compiler's reports are fakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from monarch_compile import backend
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.calls import Calls
from monarch_compile.codegen import launcher as launching
from monarch_compile.codegen.attention import search as space
from monarch_compile.codegen.attention.gradient_emitter import GRADIENTS
from monarch_compile.codegen.attention.gradient_ir import GradientsOf, gradients_of
from monarch_compile.codegen.attention.gradient_schedule import GradientSchedule, check_gradient_schedule
from monarch_compile.codegen.attention.gradient_search import stages
from monarch_compile.codegen.attention.gradients import launch_backward, launch_with_lse
from monarch_compile.codegen.emitters import emitter, launched
from monarch_compile.codegen.launcher import build
from monarch_compile.codegen.program import Kernel
from monarch_compile.codegen.tiling import Tiling, shared_limit
from monarch_compile.codegen.tuning import search as tuning
from monarch_compile.codegen.tuning.compiler_report import CompileReport
from monarch_compile.codegen.tuning.search import candidates, tune
from monarch_compile.codegen.tuning.store import Tuned, is_legal, read, write
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.errors import CodegenError
from monarch_compile.tools import autotune, cli
from monarch_compile.tools.autotune import Machine, ensure

pytestmark = pytest.mark.usefixtures("interpreted", "own_cache")

CPU = torch.device("cpu")
HERE = Machine(CPU, "Some GPU", None, "3.6.0")
FORWARD = MonarchAttention(1, 1, 1, 75, 75, 16, 16, torch.float32, Form(20, window=1), 0.25)
IR = GradientsOf(FORWARD)
BUCKET = GRADIENTS.bucketed(IR)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller space, one head: the interpreter is slow."""
    monkeypatch.setattr(space, "WARPS", (1,))
    monkeypatch.setattr(space, "STAGES", (1,))
    monkeypatch.setattr(space, "CHECKED_HEADS", 1)


def shipped() -> GradientSchedule:
    return GRADIENTS.choose_schedule(BUCKET, None)


def other() -> GradientSchedule:
    """A legal schedule that is not the shipped one."""
    return replace(shipped(), keys=Tiling(16, 16, 1, 1), fused=False, represent=Tiling(16, 16, 1, 1), whole=False)


def search(ir: GradientsOf = IR, **options: Any) -> tuple[Tuned, dict[str, str]]:
    series = itertools.chain([10.0, 9.0, 4.0], itertools.repeat(8.0))
    usual = {"device": CPU, "capability": None, "timer": lambda call: next(series), "inspect": None}
    return tune(ir, **usual | options)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("mask", [pytest.param(MaskKind.NONE, marks=pytest.mark.nightly), MaskKind.KEY_PADDING])
def test_every_gradient_is_checked_and_the_step_timed(mask: MaskKind) -> None:
    timed = []

    def timer(call: Callable[[], Any]) -> float:
        timed.append([tuple(x.shape) for x in call()])
        return float(len(timed))

    ir = GradientsOf(FORWARD.changed(mask=mask, num_heads=2, prefix=1))
    result, rejected = search(ir, timer=timer)
    assert rejected == {}
    assert result.error < space.bound(FORWARD)
    assert timed[0] == [(1, 2, 75, 16), (1, 1, 75, 16), (1, 1, 75, 16)]
    assert result.tried == len(timed) > 4


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("place", range(3))
def test_one_wrong_gradient_rejects_a_schedule(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    right = GRADIENTS.run

    def wrong(launcher: launching.Launcher, *tensors: Any) -> tuple[torch.Tensor, ...]:
        found = list(right(launcher, *tensors))
        if launcher.schedule != shipped():
            found[place] = found[place] * 1.01
        return tuple(found)

    monkeypatch.setattr("monarch_compile.codegen.tuning.search.emitter", lambda family: replace(GRADIENTS, run=wrong))
    result, rejected = search(timer=lambda call: 1.0)
    assert result.schedule == shipped()
    assert rejected
    assert all("at most 1.91e-06 is right" in reason for reason in rejected.values())


def test_the_compilers_report_prunes_kernels_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.Search, "error", lambda search, schedule: 0.0)
    asked = []

    def made_up(kernel: Kernel, capability: tuple[int, int]) -> CompileReport:
        asked.append(kernel.name)
        is_new = "summarize_keys" in kernel.name and kernel.tiling != shipped().keys
        return CompileReport(kernel.name, 4, 128, 1000, 400 * is_new, True, False, "")

    result, rejected = search(inspect=made_up)
    assert all("spills 400 bytes" in reason for reason in rejected.values())
    assert result.schedule.keys == shipped().keys
    assert {"monarch_summarize", "monarch_summarize_keys_backward"} <= set(asked)


@pytest.mark.parametrize(("block", "window"), [(64, 1), (128, None), (150, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_are_legal(block: int, window: int | None, dtype: torch.dtype) -> None:
    form = Form(block, window=window)
    ir = GradientsOf(MonarchAttention(1, 1, 1, 4096, 4096, 64, 64, dtype, form, 0.125))
    start = GRADIENTS.choose_schedule(ir, (9, 0))
    met = 0
    for stage in stages(ir):
        found = list(candidates(start, stage, ir, (9, 0)))
        without_kernel = (stage == "queries" and start.fused) or (stage == "attend" and start.whole)
        assert (not found) == without_kernel
        assert start not in found
        assert len(set(found)) == len(found)
        for schedule in found:
            check_gradient_schedule(schedule, ir.forward)
            assert is_legal(schedule, ir, (9, 0))
            tilings = dict(schedule.tilings())
            assert all(GRADIENTS.tuning.shared_bytes(n, t, ir) <= shared_limit((9, 0)) for n, t in tilings.items())
        met += len(found)
    assert met > 20


def test_schedules_of_gradients_are_kept_beside_those_of_the_forward_pass() -> None:
    forward_schedule = emitter("attention").choose_schedule(FORWARD, None)
    forward = Tuned(forward_schedule, 1.0, 1.0, 0.0, 1)
    backward = Tuned(other(), 1.0, 2.0, 0.0, 3)
    keys = [autotune.key(ir, HERE) for ir in (FORWARD, IR)]
    assert keys[0] != keys[1]
    assert "gradients of attention" in keys[1]
    write(dict(zip(keys, (forward, backward), strict=True)))
    assert read() == dict(zip(keys, (forward, backward), strict=True))
    assert is_legal(other(), IR, None)
    assert not is_legal(replace(other(), whole=True, represent=Tiling(16, 16, 1, 1)), larger(), None)
    assert not is_legal(replace(other(), keys=Tiling(16, 16, 1, 1), fused=True), IR, None)
    assert not is_legal(forward_schedule, IR, None)  # type: ignore[arg-type]


def larger() -> GradientsOf:
    """Of more blocks than 16."""
    return GradientsOf(FORWARD.changed(seq_len_q=800, seq_len_k=800))


def test_the_launcher_reads_what_was_tuned() -> None:
    asked = []

    def fake(ir: Any, **options: object) -> tuple[Tuned, dict[str, str]]:
        asked.append(ir)
        return Tuned(other(), 1.0, 2.0, 0.0, 3), {}

    assert build(BUCKET, None, True).schedule == shipped()
    first = ensure([IR], HERE, fake)
    assert asked == [IR]
    assert build(BUCKET, None, True).schedule == other()
    launching._CHOSEN.clear()
    build.cache_clear()
    assert ensure([IR], HERE, fake) == first
    assert len(asked) == 1, "the second time it comes from the file"
    q, k, v, dz = (torch.randn(1, 1, 75, 16, generator=torch.Generator().manual_seed(i)) for i in range(4))
    options = FORWARD.options()
    seen: list[GradientSchedule] = []
    z, lse = launch_with_lse(q, k, v, None, **options)
    with pytest.MonkeyPatch.context() as patch:
        call = launching.Launcher.__call__
        patch.setattr(
            launching.Launcher, "__call__", lambda self, *given: (seen.append(self.schedule), call(self, *given))[1]
        )
        tuned = launch_backward(dz, q, k, v, None, z, lse, **options)
    assert seen == [other()]
    launching._CHOSEN.clear()
    build.cache_clear()
    plain = launch_backward(dz, q, k, v, None, z, lse, **options)
    for found, expected in zip(tuned[:3], plain[:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_later_schedule_of_the_forward_pass_is_used_in_training() -> None:
    q, k, v = (torch.randn(1, 1, 75, 16) for _ in range(3))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        call = launching.Launcher.__call__
        patch.setattr(
            launching.Launcher, "__call__", lambda self, *given: (seen.append(self.schedule), call(self, *given))[1]
        )
        launch_with_lse(q, k, v, None, **FORWARD.options())
        changed = replace(seen[0], attend=Tiling(16, 16, 1, 1), whole=False)
        launching.use(FORWARD, None, changed)
        launch_with_lse(q, k, v, None, **FORWARD.options())
    assert seen[1] == changed != seen[0]


@pytest.mark.parametrize(
    "change", [{"seq_len_q": 30}, {"num_iters": 2}, {"init": "mean"}, {"prefix": 17}, {"block_size": 75}], ids=str
)
def test_forms_whose_gradients_are_the_references_have_none(change: dict[str, Any]) -> None:
    ir = FORWARD.changed(**{"window": None, **change})
    assert gradients_of(ir) is None
    assert launched(ir, trains=True) == (ir,)


def test_sites_that_train_have_their_gradients_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Machine, "here", lambda: HERE)
    monkeypatch.setattr(autotune, "ensure", lambda irs, machine: asked.extend(irs) or "digest")
    site = Decision("attention", "a", LOWERED, "lowered", "lowered", "", "n", ir=FORWARD, device="cuda")
    assert backend._autotune([site]) == "-digest"
    assert asked == [FORWARD]
    asked.clear()
    backend._autotune([replace(site, calls=Calls(trains=True))])
    assert asked == [FORWARD, IR]


def test_the_command_tunes_gradients(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def fake(ir: GradientsOf, **options: object) -> tuple[Tuned, dict[str, str]]:
        asked.append(ir)
        return Tuned(GRADIENTS.choose_schedule(ir, None), 1.0, 2.0, 0.0, 3), {}

    monkeypatch.setattr(Machine, "here", lambda: HERE)
    monkeypatch.setattr(autotune, "default_tune", lambda seconds: fake)
    sizes = ["--lengths", "256", "--heads", "2", "--head-dim", "16", "--jobs", "0"]
    assert cli.main(["tune", "--backward", *sizes]) == 0
    assert [type(ir) for ir in asked] == [GradientsOf, GradientsOf]
    printed = capsys.readouterr().out
    assert "to put into codegen/attention/gradient_schedule.py: GradientSchedule(summaries=Schedule(" in printed
    assert cli.main(["tune", "--backward", *sizes]) == 0
    assert capsys.readouterr().out.count("tuned already") == 2
    asked.clear()
    assert cli.main(["tune", "--backward", "--iters", "2", *sizes]) == 2
    assert not asked
    assert "kernels of gradients" in capsys.readouterr().err


def test_a_family_without_kernels_of_gradients_is_told() -> None:
    with pytest.raises(CodegenError, match="no kernels for family 'linear/gradients'"):
        emitter("linear/gradients")
    assert emitter("linear").gradients(SimpleNamespace()) is None
