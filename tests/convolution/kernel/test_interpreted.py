"""The kernels of long convolutions in Triton's interpreter, over buffers that start as NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from monarch_compile.codegen.convolution import kernels
from monarch_compile.codegen.convolution import launch as launching
from monarch_compile.codegen.convolution.launch import bucketed, launch, run
from monarch_compile.codegen.convolution.schedule import TRANSFORMS, Schedule, check_schedule, choose_schedule
from monarch_compile.codegen.convolution.search import inputs, variants
from monarch_compile.codegen.launcher import Launcher, build
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.reference import reference
from monarch_compile.errors import CodegenError
from tests.convolution.kernel.problems import BOUNDS, CASES, Case, check, errors, expected, tensors

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SHORT = Case(4, 2, 300, 300, 600, 300)


def ir_of(points: int, **changes: object) -> LongConvolution:
    sizes = (2, 1, points, points, 2 * points, points, 0)
    ir = LongConvolution(*sizes, torch.bfloat16, torch.float32, torch.bfloat16)
    return replace(ir, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("out_dtype", BOUNDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolves(case: Case, out_dtype: torch.dtype) -> None:
    check(case, out_dtype=out_dtype)


@pytest.mark.parametrize("out_dtype", BOUNDS)
@pytest.mark.parametrize("allowed", [1e30, kernels.NOISE])
def test_two_gates_of_one_result(allowed: float, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result is that of a launch of its own, whether or not it is computed again."""
    monkeypatch.setattr(kernels, "NOISE", allowed)
    build.cache_clear()
    given, options = tensors(Case(5, 2, 300, 300, 600, 300, terms="daz", layout="turned"))
    second = given[3].flip(0)
    found = launching.launch_twice(*given, second, **options, out_dtype=out_dtype)
    for result, gate in zip(found, (given[4], second), strict=True):
        torch.testing.assert_close(result, launch(*given[:4], gate, **options, out_dtype=out_dtype), rtol=0, atol=0)
    build.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_inputs(dtype: torch.dtype) -> None:
    given, options = tensors(SHORT, dtype=dtype)
    found = launch(*given, **options, out_dtype=torch.float32)
    assert errors(found, expected(given, options)).max() < BOUNDS[torch.float32]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_sequence(bad: float) -> None:
    given, options = tensors(SHORT)
    clean = launch(*given, **options, out_dtype=torch.float32)
    given[0][1, 0, 7] = bad
    found = launch(*given, **options, out_dtype=torch.float32)
    own = reference(*given, **options)
    assert torch.isnan(found[1, 0]).all()
    assert torch.isnan(own[1, 0]).all()
    clean[1, 0] = found[1, 0]
    torch.testing.assert_close(found, clean, rtol=0, atol=0, equal_nan=True)


def test_a_filter_that_is_not_finite_stays_in_its_channel() -> None:
    given, options = tensors(SHORT)
    given[1][1, 2] = float("nan")
    found = launch(*given, **options, out_dtype=torch.float32)
    assert torch.isnan(found[:, 1]).all()
    assert torch.isfinite(found[:, 0]).all()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-10, 2.0**20, 2.0**100])
def test_any_size_of_numbers(size: float) -> None:
    given, options = tensors(SHORT)
    given[0] = given[0].float() * size
    given[1] = given[1] / size
    found = launch(*given, **options, out_dtype=torch.float32)
    assert errors(found, expected(given, options)).max() < BOUNDS[torch.float32]


@pytest.mark.parametrize("points", [256, 1024])
def test_nothing_overflows_or_is_lost(points: int) -> None:
    """Results that are small beside what the transform holds; rounding to float16 alone would show in them."""
    ramp = torch.arange(points)
    chirp = torch.cos(torch.pi * ramp**2 / points / 64)
    impulse = torch.zeros(points)
    impulse[-1] = 1.0
    u = torch.stack([torch.ones(points), chirp, chirp.flip(0), impulse])[:, None]
    for filter in (torch.ones(1, points), chirp[None], impulse[None].flip(-1)):
        options = {"transform_len": 2 * points, "out_len": points, "lag": 0, "scale": 1.0}
        found = launch(u, filter, None, None, None, **options, out_dtype=torch.bfloat16)
        wanted = reference(u.double(), filter.double(), **options)
        assert errors(found, wanted).max() < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_nothing_is_read_beyond_a_batch_that_fills_its_tiles(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed again, in tiles of its own."""
    monkeypatch.setattr(kernels, "NOISE", 1e30)
    build.cache_clear()
    check(Case(batch, 2, 256, 256, 512, 256, terms="daz"), out_dtype=torch.bfloat16)
    build.cache_clear()


def test_only_what_is_marked_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no allowance everything is marked; with a large one nothing is."""
    given, options = tensors(SHORT)
    again = []
    for noise in (1e30, 0.0):
        monkeypatch.setattr(kernels, "NOISE", noise)
        ir = ir_of(512, out_dtype=torch.bfloat16)
        launcher = Launcher(bucketed(ir), choose_schedule(bucketed(ir)))
        monkeypatch.setattr(launching, "build", lambda *_, made=launcher: made)
        again.append(launch(*given, **options, out_dtype=torch.bfloat16))
    single = launch(*given, **options, out_dtype=torch.bfloat16)
    assert errors(again[0].float(), again[1].double()).max() > 0
    assert errors(again[0].float(), expected(given, options)).max() < BOUNDS[torch.bfloat16]
    torch.testing.assert_close(single, again[1], rtol=0, atol=0)


def test_zeros() -> None:
    given, options = tensors(SHORT)
    given[0][1:] = 0
    found = launch(*given, **options, out_dtype=torch.float32)
    assert not found[1:].any()
    assert found[0].any()
    given[1].zero_()
    assert not launch(*given, **options, out_dtype=torch.float32).any()


def test_every_schedule_of_the_search_convolves() -> None:
    ir = ir_of(1024, batch=8)
    start = choose_schedule(bucketed(ir))
    found = set(variants(start, "main", ir))
    assert len(found) > 20
    given = inputs(ir, torch.device("cpu"))
    wanted = expected(list(given[:5]), given[5])
    for schedule in sorted(found, key=str)[::25]:
        check_schedule(schedule, bucketed(ir))
        result = run(Launcher(bucketed(ir), schedule), *given)
        assert errors(result, wanted).max() < BOUNDS[torch.bfloat16], schedule


@pytest.mark.parametrize("points", sorted(TRANSFORMS))
def test_shipped_schedules_are_legal(points: int) -> None:
    ir = bucketed(ir_of(points))
    check_schedule(choose_schedule(ir), ir)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(Tiling(16, 32, 1, 1)),
        Schedule(Tiling(16, 32, 1, 1), sequences=3),
        Schedule(Tiling(16, 16, 1, 1), kept="some"),
        Schedule(Tiling(16, 16, 1, 1, 0)),
        Schedule(Tiling(16, 16, 1, 1), precision="double"),
    ],
)
def test_what_no_schedule_may_be(schedule: Schedule) -> None:
    with pytest.raises(CodegenError):
        check_schedule(schedule, bucketed(ir_of(256)))


@pytest.mark.parametrize("changes", [{"dtype": torch.float64}, {"seq_len": "s0"}])
def test_no_kernels(changes: dict[str, object]) -> None:
    with pytest.raises(CodegenError):
        choose_schedule(bucketed(ir_of(256, **changes)))


def test_longer_than_any_transform() -> None:
    with pytest.raises(CodegenError, match="at most"):
        choose_schedule(bucketed(ir_of((1 << 20) + 1)))


def test_launchers_are_shared() -> None:
    one, other = (bucketed(ir_of(points, batch=batch)) for points, batch in ((1000, 5), (900, 7)))
    assert one == other
    assert one.wraps is False
    assert bucketed(ir_of(1000, lag=1)).wraps
    assert launching.looks_back(8, 3, 10, 0)
    assert not launching.looks_back(8, 4, 10, 0)
