"""The search for schedules, its kernels in Triton's interpreter and its timer and compiler's reports made up."""

from __future__ import annotations

import argparse
import inspect
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from monarch_compile import backend
from monarch_compile.attention import commands
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.attention.op import attention
from monarch_compile.attention.reference import reference
from monarch_compile.codegen import launcher as launching
from monarch_compile.codegen.attention import search as space
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.launch import bucketed, launch
from monarch_compile.codegen.attention.schedule import Schedule, check_schedule, choose_schedule, shared_bytes
from monarch_compile.codegen.attention.search import stages
from monarch_compile.codegen.launcher import build, use
from monarch_compile.codegen.program import Kernel
from monarch_compile.codegen.tiling import Tiling, shared_limit
from monarch_compile.codegen.tuning import search as tuning
from monarch_compile.codegen.tuning.compiler_report import CompileReport
from monarch_compile.codegen.tuning.search import candidates, tune
from monarch_compile.codegen.tuning.store import Tuned, read, write
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.errors import CodegenError
from monarch_compile.report.kernels import kernels_of
from monarch_compile.tools import autotune
from monarch_compile.tools.autotune import Machine, ensure, tuned_now

pytestmark = pytest.mark.usefixtures("interpreted", "own_cache")

CPU = torch.device("cpu")
HERE = Machine(CPU, "Some GPU", None, "3.6.0")
IR = MonarchAttention(1, 1, 1, 75, 75, 16, 16, torch.float32, Form(40), 0.25)
BUCKET = bucketed(IR)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller space, one head: the interpreter is slow."""
    monkeypatch.setattr(space, "WARPS", (1, 2))
    monkeypatch.setattr(space, "STAGES", (1, 2))
    monkeypatch.setattr(space, "CHECKED_HEADS", 1)


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every schedule is taken to be right, and none runs: what is tested is the order of the search."""
    monkeypatch.setattr(tuning.Search, "error", lambda search, schedule: 0.0)


def times(*values: float) -> Callable[[Callable[[], Tensor]], float]:
    """A timer that gives these to the schedules that it meets, in turn, the last of them to all others.

    A call times the same whenever it is timed; it is known by the launcher in its closure.
    """
    series, known = itertools.chain(values, itertools.repeat(values[-1])), {}

    def timer(call: Callable[[], Tensor]) -> float:
        schedule = inspect.getclosurevars(inspect.getclosurevars(call).nonlocals["call"]).nonlocals["launcher"].schedule
        return known[schedule] if schedule in known else known.setdefault(schedule, next(series))

    return timer


def search(timer=None, report=None, **options) -> tuple[Tuned, dict[str, str]]:
    options = {"device": CPU, "capability": None, "timer": timer or times(1.0), "inspect": report} | options
    return tune(IR, **options)


def shipped() -> Schedule:
    return choose_schedule(BUCKET)


@pytest.mark.usefixtures("few", "right")
def test_the_fastest_schedule_is_found() -> None:
    result, rejected = search(times(10.0, 9.0, 4.0, 8.0))
    assert (result.ms, result.shipped_ms, rejected) == (4.0, 10.0, {})
    assert result.schedule == candidates_after(shipped())[1]
    assert result.tried > 8


def candidates_after(start: Schedule) -> list[Schedule]:
    return list(candidates(start, "summarize", BUCKET, None))


@pytest.mark.usefixtures("few", "right")
@pytest.mark.parametrize("other", [9.9, 11.0])
def test_the_shipped_schedule_stays_where_little_is_gained(other: float) -> None:
    result, _ = search(times(10.0, other))
    assert result.schedule == shipped()
    assert result.ms == result.shipped_ms == 10.0


@pytest.mark.usefixtures("few", "right")
def test_a_gain_that_does_not_repeat_is_none() -> None:
    """Clocks drift: the shipped schedule and the winner are timed again in the end."""
    series = itertools.chain([10.0, 5.0], itertools.repeat(5.0))
    result, _ = search(lambda call: next(series))
    assert result.schedule == shipped()
    assert result.ms == result.shipped_ms == 5.0


@pytest.mark.usefixtures("few", "right")
def test_every_stage_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    met = []
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(tuning, "_measured", lambda search, schedule, spilled: met.append(schedule))
    search(times(1.0), seconds=6.0)
    assert [schedule.summarize != shipped().summarize for schedule in met] == [True, True, False, False]


def test_what_is_timed_is_the_problem_at_full_size() -> None:
    shapes = []

    def timer(call: Callable[[], Tensor]) -> float:
        shapes.append(tuple(call().shape))
        return 1.0

    search(timer, seconds=0.0)
    assert set(shapes) == {(1, 1, 75, 16)}


@pytest.mark.usefixtures("few")
def test_a_wrong_schedule_is_rejected_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(launching.Launcher):
        def __call__(self, *arguments: object) -> tuple[Tensor, ...]:
            (found,) = super().__call__(*arguments)
            wrong = found * (1.01 if self.schedule.attend.rows == 16 else torch.nan)
            return (found if self.schedule == shipped() else wrong,)

    monkeypatch.setattr(tuning, "Launcher", Wrong)
    result, rejected = search(times(10.0, 1.0))
    assert result.schedule == shipped()
    assert result.tried == 2
    assert rejected
    assert all("at most 1.91e-06 is right" in reason for reason in rejected.values())


@pytest.mark.usefixtures("few")
def test_a_schedule_that_does_not_launch_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(launching.Launcher):
        def __call__(self, *arguments: object) -> tuple[Tensor, ...]:
            if self.schedule.summarize.num_warps > 1:
                raise RuntimeError("out of resources\nand so on")
            return super().__call__(*arguments)

    start = replace(shipped(), summarize=Tiling(32, 32, 1, 1))
    monkeypatch.setattr(tuning, "Launcher", Refusing)
    starting = replace(EMITTER, choose_schedule=lambda ir, capability: start)
    monkeypatch.setattr(tuning, "emitter", lambda family: starting)
    result, rejected = search(times(10.0, 1.0))
    assert set(rejected.values()) == {"RuntimeError: out of resources"}
    assert result.schedule.summarize.num_warps == 1
    assert result.ms == 1.0


def usage(name: str, shared: int = 1000, spilled: int = 0) -> CompileReport:
    return CompileReport(name, 4, 128, shared, spilled, True, False, "")


@pytest.mark.usefixtures("few", "right")
@pytest.mark.parametrize(
    ("more", "reason"), [({"spilled": 17}, "spills 17 bytes"), ({"shared": 10**6}, "1000000 bytes of shared memory")]
)
def test_the_compilers_report_prunes(more: dict[str, int], reason: str) -> None:
    asked = []

    def made_up(kernel: Kernel, capability: tuple[int, int]) -> CompileReport:
        asked.append(kernel.name)
        is_new = kernel.name == "monarch_summarize" and kernel.tiling != shipped().summarize
        return usage(kernel.name, **(more if is_new else {}))

    result, rejected = search(times(10.0, 9.0), made_up)
    assert all(reason in found for found in rejected.values())
    assert len(rejected) == len(candidates_after(shipped()))
    assert result.schedule.summarize == shipped().summarize
    assert result.schedule.attend != shipped().attend
    assert asked.count("monarch_summarize") == 1 + len(rejected), "a kernel is compiled once"


@pytest.mark.usefixtures("few", "right")
def test_spills_of_the_shipped_schedule_are_no_reason() -> None:
    _, rejected = search(report=lambda kernel, _: usage(kernel.name, spilled=400))
    assert rejected == {}


def test_a_shipped_schedule_that_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "reference", lambda q, *_, **options: torch.zeros_like(q) + 1)
    with pytest.raises(CodegenError, match=r"the shipped schedule .* is off by"):
        search()


@pytest.mark.usefixtures("few")
def test_masks_groups_and_windows_are_tuned_as_they_are() -> None:
    ir = IR.changed(mask=MaskKind.KEY_PADDING, num_heads=2, block_size=20, window=1)
    options = {"device": CPU, "capability": None, "timer": times(10.0, 9.0), "inspect": None}
    result, rejected = tune(ir, **options)
    assert rejected == {}
    assert result.error < space.ERROR_BOUNDS[torch.float32]
    assert result.schedule.near is not None


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("num_iters", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_candidates_are_legal_and_nearest_first(window: int | None, num_iters: int, dtype: torch.dtype) -> None:
    ir = MonarchAttention(1, 1, 1, 4096, 4096, 64, 64, dtype, Form(64, num_iters, window=window), 0.125)
    start = choose_schedule(ir, (8, 6))
    names = stages(ir)
    assert ("near" in names, "represent" in names) == (window is not None, num_iters > 1)
    for stage in names:
        found = list(candidates(start, stage, ir, (8, 6)))
        assert len(found) > 5
        assert start not in found
        assert len(set(found)) == len(found)
        distances = [tuning._distance(getattr(start, stage), getattr(s, stage)) for s in found]
        assert distances == sorted(distances)
        for schedule in found:
            assert all(shared_bytes(tiling, ir) <= shared_limit((8, 6)) for _, tiling in schedule.tilings())
            assert schedule.whole == (schedule.attend.step >= 64)
            assert schedule.exchange == (num_iters > 1 and schedule.represent.rows >= 64)
            check_schedule(schedule, ir)
            if schedule.near is not None and schedule.fused:
                other = replace(schedule.near, step=schedule.summarize.step, turns=schedule.summarize.turns)
                assert other == schedule.summarize
                assert schedule.near.turns == 1


def test_results_are_kept_and_used(caplog: pytest.LogCaptureFixture) -> None:
    found = replace(shipped(), summarize=Tiling(32, 16, 1, 1))
    asked = []

    def fake(ir: MonarchAttention, **options: object) -> tuple[Tuned, dict[str, str]]:
        asked.append(ir)
        return Tuned(found, 1.0, 2.0, 0.0, 3), {}

    digest = ensure([IR, IR], HERE, fake)
    assert asked == [IR]
    assert build(BUCKET, None, True).schedule == found
    assert any(str(found) in kernel.text for kernel in kernels_of(IR)[0]), "a report shows what runs"
    assert [result.schedule for result in read().values()] == [found]
    launching._CHOSEN.clear()
    build.cache_clear()
    assert ensure([IR], HERE, fake) == digest
    assert len(asked) == 1, "the second time it comes from the file"
    assert build(BUCKET, None, True).schedule == found
    assert ensure([IR], replace(HERE, gpu="Other GPU"), fake) == digest
    assert len(asked) == 2, "another GPU's results are its own"
    q, k, v = (torch.randn(1, 1, 75, 16) for _ in range(3))
    torch.testing.assert_close(
        launch(q, k, v, None, **IR.options()),
        attention(q, k, v, None, 0.25, 40, 1, "identity", "post", None, 0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_without_autotune_the_shipped_tables_run() -> None:
    """Even where the cache holds something else."""
    other = replace(shipped(), summarize=Tiling(32, 16, 1, 1))
    write({autotune.key(IR, HERE): Tuned(other, 1.0, 2.0, 0.0, 3)})
    assert build(BUCKET, None, True).schedule == shipped()
    use(IR, None, other)
    assert build(BUCKET, None, True).schedule == other
    more = bucketed(IR.changed(seq_len_q=160, seq_len_k=160))
    assert build(more, None, True).schedule == choose_schedule(more) != other


def test_an_illegal_entry_is_tuned_anew() -> None:
    write({autotune.key(IR, HERE): Tuned(replace(shipped(), near=Tiling(16, 16, 1, 1)), 1.0, 2.0, 0.0, 3)})
    ensure([IR], HERE, lambda *_, **options: (Tuned(shipped(), 1.0, 1.0, 0.0, 1), {}))
    assert build(BUCKET, None, True).schedule == shipped()


def test_tuning_that_fails_leaves_the_shipped_schedule(caplog: pytest.LogCaptureFixture) -> None:
    def failing(*_: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with caplog.at_level(logging.WARNING):
        ensure([IR], HERE, failing)
    assert "tuning failed" in caplog.text
    assert read() == {}
    assert build(BUCKET, None, True).schedule == shipped()


@pytest.mark.parametrize("lengths", [{"seq_len_q": "n", "seq_len_k": "n"}, {"seq_len_q": 7}], ids=str)
def test_symbolic_and_unequal_lengths_are_not_tuned(lengths: dict[str, int | str]) -> None:
    def never(*_: object, **options: object) -> None:
        raise AssertionError

    assert ensure([IR.changed(**lengths)], HERE, never) == ensure([], HERE, never)


def test_tuning_while_dynamo_traces_uses_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(autotune, "graph_timer", lambda call: float(call().abs().sum() > 0))
    with FakeTensorMode():
        result, _ = tuned_now(IR, HERE, lambda *x, **options: tune(*x, inspect=None, seconds=0.0, **options))
    assert result.ms == 1.0


def test_the_option_tunes_lowered_cuda_sites_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Dynamo, with real tensors, and the schedules are part of the key of compile caches."""
    keys = []

    def compile_fx(gm, example_inputs, config_patches):
        keys.append(config_patches["joint_custom_pre_pass"].uuid())
        return gm.forward

    def as_if_on_cuda(decisions):
        return real(tuple(replace(decision, device="cuda") for decision in decisions))

    def quickly(*arguments: object, **options: object) -> tuple[Tuned, dict[str, str]]:
        asked.append(arguments)
        return tune(
            *arguments, **{**options, "inspect": None, "seconds": 0.0, "timer": lambda call: call().norm().item()}
        )

    asked: list[object] = []
    real = backend._autotune
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(backend, "_autotune", as_if_on_cuda)
    monkeypatch.setattr(Machine, "here", lambda: HERE)
    monkeypatch.setattr(autotune, "default_tune", lambda: quickly)
    q, k, v = (torch.randn(1, 1, 75, 16) for _ in range(3))
    options = {"policy": "always", "block_size": 40, "window": None}
    for chosen in (options, options | {"autotune": True}):
        torch._dynamo.reset()
        attend = torch.nn.functional.scaled_dot_product_attention
        compiled = torch.compile(lambda *x: attend(*x), backend=backend.monarch, options=chosen)  # noqa: B023
        found = compiled(q, k, v)
    torch.testing.assert_close(found, reference(q, k, v, None, **IR.options()))
    assert asked == [(IR,)]
    assert read()[autotune.key(IR, HERE)].ms > 0
    assert len(set(keys)) == 2
    assert keys[1].endswith(f"-{ensure([IR], HERE)}")


def test_nothing_is_tuned_for_sites_on_the_cpu_or_without_a_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Machine:
        raise CodegenError("no device at all")

    monkeypatch.setattr(Machine, "here", missing)
    site = Decision("attention", "a", LOWERED, "lowered", "lowered", "", "n", ir=IR)
    with caplog.at_level(logging.WARNING):
        assert backend._autotune([site]) == ""
        assert not caplog.records
        assert backend._autotune([replace(site, device="cuda")]) == ""
    assert "no tuning: no device at all" in caplog.text


def test_what_has_no_kernel_is_not_tuned() -> None:
    wide, double = IR.changed(head_dim=512), IR.changed(dtype=torch.float64)
    assert list(autotune.tunable([None, wide, IR, double])) == [IR]


def test_the_command_tunes_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    def fake(ir: MonarchAttention, **options: object) -> tuple[Tuned, dict[str, str]]:
        if ir.form.window == 1:
            raise CodegenError("no such kernel")
        return Tuned(shipped(), 1.0, 2.0, 0.0, 3), {"a": "spills"}

    asked = argparse.ArgumentParser()
    commands.add_tune_arguments(asked)
    sizes = "--lengths 256 1024 --windows none 1 --heads 2 --head-dim 16 --masked"
    irs = commands.problems(asked.parse_args(sizes.split()), HERE.device.type)
    assert [(ir.seq_len_k, ir.form.window, ir.mask.value) for ir in irs] == [
        (n, window, "key_padding") for n in (256, 1024) for window in (None, 1)
    ]
    autotune.run(irs, HERE, seconds=1.0, tune=fake)
    printed = capsys.readouterr().out
    assert printed.count("2.0000 -> 1.0000 ms (2.00x)") == 2
    assert printed.count("failed: CodegenError: no such kernel") == 2
    assert "to put into codegen/attention/schedule.py: Schedule(summarize=Tiling(rows=" in printed
    autotune.run(irs, HERE, seconds=1.0, tune=fake)
    assert capsys.readouterr().out.count("tuned already") == 2
    autotune.run(irs, HERE, seconds=1.0, tune=fake, fresh=True)
    assert "tuned already" not in capsys.readouterr().out


class InThisProcess:
    """A pool of none."""

    def __init__(self, jobs: int, mp_context: object) -> None:
        self.map = lambda function, tasks, chunksize: map(function, tasks)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_kernels_are_compiled_ahead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = []
    monkeypatch.setattr(autotune, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(tuning, "compile_ahead", compiled.append)
    result = Tuned(shipped(), 1.0, 2.0, 0.0, 3)
    autotune.run([IR], HERE, seconds=1.0, jobs=2, tune=lambda *_, **options: (result, {}))
    printed = capsys.readouterr().out
    assert f"compiling {len(compiled)} schedules in 2 processes" in printed
    assert {task.ir for task in compiled} == {IR}
    schedules = [task.schedule for task in compiled]
    assert schedules[0] == shipped()
    assert set(candidates_after(shipped())) < set(schedules)
    autotune.run([IR], HERE, seconds=1.0, jobs=2, tune=lambda *_, **options: (result, {}))
    assert "compiling" not in capsys.readouterr().out, "nothing is missing"


def test_a_pool_that_breaks_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **options: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(autotune, "ProcessPoolExecutor", broken)
    result = Tuned(shipped(), 1.0, 2.0, 0.0, 3)
    autotune.run([IR], HERE, seconds=1.0, jobs=2, tune=lambda *_, **options: (result, {}))
    assert "stopped: OSError('no more processes')" in capsys.readouterr().out
    assert len(read()) == 1


def test_compiling_ahead_launches_and_passes_over_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Noted(launching.Launcher):
        def __call__(self, *arguments: object) -> tuple[Tensor, ...]:
            launched.append(self.schedule)
            raise RuntimeError("out of resources")

    monkeypatch.setattr(tuning, "Launcher", Noted)
    tuning.compile_ahead(tuning.tasks(IR, None, "cpu")[0])
    assert launched == [shipped()]


@pytest.mark.parametrize(("name", "hinted"), [("NVIDIA H200", False), ("NVIDIA A100-SXM4-40GB", True)])
def test_an_unknown_gpu_is_hinted_at_once(
    name: str, hinted: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    launching._capability_of.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert launching.capability_of(torch.device("cuda", 0)) == (9, 0)
            launching.capability_of(torch.device("cuda", 0))
        assert caplog.text.count("`monarch-compile tune`") == int(hinted)
        assert (name in caplog.text) is hinted
    finally:
        launching._capability_of.cache_clear()
