"""The kernels of gradients in Triton's interpreter against those of the float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.codegen import launcher
from monarch_compile.codegen.attention.gradient_schedule import GradientSchedule
from monarch_compile.codegen.attention.gradients import backward_refusal, launch_backward, launch_with_lse
from monarch_compile.codegen.attention.launch import launch
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.errors import CodegenError
from tests.attention.kernel.gradients import Change, check_backward, run_backward, scheduled
from tests.attention.kernel.problems import Case, tensors

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # A row that sees no key has the log of a zero total, which a later `where` discards.
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

tiled = Case.tiled
IMAGE, VIDEO = ((5, 7), (2, 3)), ((3, 4, 5), (2, 2, 3))
"""A grid and a tile that does not divide it along any axis."""

PIECES = (
    Case(24, 6, 16, 16),  # whole blocks
    Case(21, 6, 25, 20, pad="pre", batch=1),
    Case(23, 5, 16, 16, mask="some", num_heads=2, layout="packed", batch=1),
    Case(23, 5, 16, 16, mask="blocks", pad="pre"),
    Case(23, 5, 16, 20, mask="bias", batch=1),
    Case(37, 2, 16, 16, mask="some", batch=1),  # more blocks than one tile holds
    Case(9, 1, 16, 16, batch=1),  # blocks of one key: exact softmax
    Case(23, 5, 16, 16, num_heads=2, group=2, mask="bias", layout="transposed"),
)
WINDOWS = (
    Case(24, 4, 16, 16, window=1, batch=1),
    Case(23, 5, 16, 16, window=0, mask="blocks"),  # the same as no window
    Case(23, 5, 16, 16, window=1, pad="pre", mask="blocks"),
    Case(23, 5, 25, 20, window=2, prefix=1, mask="some", batch=1),
    Case(23, 5, 16, 16, window=9, prefix=5, pad="pre", batch=1),  # every key is exact
    Case(23, 5, 16, 16, prefix=7, mask="blocks"),
    Case(40, 2, 16, 16, window=1, prefix=16, batch=1),
    Case(23, 5, 16, 16, num_heads=4, group=2, mask="bias", window=1, prefix=2, pad="pre", batch=1),
    Case(61, 20, 16, 16, batch=1, num_heads=2, group=2, window=1, prefix=3, mask="bias"),
)
GRIDS = (
    tiled(*IMAGE, 16, 16, batch=1),
    tiled(*IMAGE, 25, 20, window=1, mask="some", batch=1),
    tiled(*IMAGE, 16, 16, window=1, window_shape="plus", prefix=5, mask="blocks"),
    tiled(*IMAGE, 16, 16, window=2, prefix=1, mask="bias", batch=1, num_heads=2, group=2),
    tiled(*VIDEO, 16, 16, window=1, batch=1, mask="some"),
    tiled(*VIDEO, 16, 20, window=1, window_shape="plus", prefix=1, mask="bias", batch=1),
    tiled((9,), (4,), 16, 16, window=0, batch=1),
    tiled((6, 8), (2, 4), 16, 16, window=1, batch=1),  # whole tiles
)
ALONG_AXES = (
    tiled(*IMAGE, 25, 20, window=(0, 1), mask="some", batch=1),
    tiled(*VIDEO, 16, 16, window=(2, 0, 1), window_shape="plus", prefix=1, mask="bias", batch=1),
)
AT_END = (
    Case(23, 5, 25, 20, window=2, prefix=1, prefix_at_end=True, mask="some", batch=1),
    Case(23, 5, 16, 16, window=9, prefix=5, prefix_at_end=True, pad="pre", batch=1),
    Case(61, 20, 16, 16, num_heads=2, group=2, window=1, prefix=3, prefix_at_end=True, mask="bias", batch=1),
    tiled(*IMAGE, 16, 16, window=1, window_shape="plus", prefix=5, prefix_at_end=True, mask="blocks"),
    tiled((6, 8), (2, 4), 16, 16, prefix=16, prefix_at_end=True, batch=1),
)
CASES = (*PIECES, *WINDOWS, *GRIDS, *ALONG_AXES, *AT_END)


def _small(schedule: GradientSchedule) -> GradientSchedule:
    tiling = Tiling(16, 16, 1, 1)
    return replace(schedule, attend=tiling, represent=tiling, queries=tiling, keys=tiling, whole=False, fused=False)


def _whole(schedule: GradientSchedule) -> GradientSchedule:
    return replace(schedule, whole=True, represent=Tiling(64, 16, 1, 1), fused=False)


def _fused(schedule: GradientSchedule) -> GradientSchedule:
    return replace(schedule, whole=False, fused=True, keys=Tiling(32, 16, 1, 1))


def _one_step(schedule: GradientSchedule) -> GradientSchedule:
    """All blocks, and all offsets of a block, at once."""
    return replace(schedule, whole=True, represent=Tiling(64, 64, 1, 1), fused=True, keys=Tiling(32, 32, 1, 1))


CHANGES = (_small, _whole, _fused, _one_step)


def quarters() -> Iterator[Any]:
    """Every case under every change of the schedule; three quarters of the pairs run nightly."""
    for (i, case), (j, change) in itertools.product(enumerate(CASES), enumerate(CHANGES)):
        marks = [pytest.mark.nightly] if (i + j) % 4 else []
        yield pytest.param(case, change, id=f"{case}-{change.__name__.strip('_')}", marks=marks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case) -> None:
    check_backward(case, torch.float32, "cpu")


@pytest.mark.parametrize(("case", "change"), quarters())
def test_every_schedule(case: Case, change: Change) -> None:
    with scheduled(change):
        check_backward(case, torch.float32, "cpu")


@pytest.mark.parametrize("change", [_small, _one_step])
def test_two_runs_agree(change: Change) -> None:
    """Bit for bit: no sum depends on which program ends first."""
    with scheduled(change):
        first, second = (run_backward(WINDOWS[2], torch.float32, "cpu") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [PIECES[1], WINDOWS[7]], ids=str)
def test_16_bits(case: Case, dtype: torch.dtype) -> None:
    check_backward(case, dtype, "cpu")


@pytest.mark.parametrize("dims", [(80, 25), (72, 72), (16, 256)], ids=str)
def test_head_sizes(dims: tuple[int, int]) -> None:
    check_backward(Case(11, 4, *dims, window=1, prefix=1, batch=1), torch.float32, "cpu")


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_case(data: st.DataObject) -> None:
    """Lengths, forms and masks that nobody chose."""
    draw = data.draw
    group = draw(st.sampled_from((1, 2)))
    block_size = draw(st.integers(1, 9))
    case = Case(
        draw(st.integers(block_size + 4, 30)),
        block_size,
        16,
        16,
        batch=draw(st.sampled_from((1, 2))),
        num_heads=group,
        group=group,
        pad=draw(st.sampled_from(("post", "pre"))),
        mask=draw(st.sampled_from(("none", "some", "blocks", "bias"))),
        window=draw(st.sampled_from((None, 0, 1, 3))),
        prefix=draw(st.integers(0, 3)),
        prefix_at_end=draw(st.booleans()),
    )
    check_backward(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", [PIECES[0], WINDOWS[0]], ids=str)
def test_logsumexps(case: Case) -> None:
    """Of a row's scores with the blocks of its far field, and with the keys of its window."""
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    z, lse = launch_with_lse(q, k, v, None, **case.options)
    assert torch.equal(z, launch(q, k, v, None, **case.options))
    blocks, size = case.seq_len // case.block_size, case.block_size
    scale = case.options["scale"]
    q_blocks, k_blocks = (x.double().unflatten(2, (blocks, size)) for x in (q, k))
    local = scale * q_blocks @ k_blocks.mT  # (E, H, b, j, i)
    a = scale * local.softmax(-1) @ k_blocks
    c = (q_blocks * a).sum(-1) - local.logsumexp(-1)
    far = torch.einsum("ehljd,ehbjd->ehljb", q_blocks, a) - c.transpose(2, 3)[:, :, None]
    exact = (scale * q.double() @ k.double().mT).unflatten(2, (blocks, size)).unflatten(-1, (blocks, size))
    block = torch.arange(blocks)
    near = (block[:, None] - block).abs() <= (-1 if case.window is None else case.window)  # (l, b)
    far = far.masked_fill(near[:, None], float("-inf"))
    exact = exact.masked_fill(~near[:, None, :, None], float("-inf")).flatten(-2)
    expected = torch.cat([far, exact], -1).logsumexp(-1).flatten(2)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


def test_hidden_keys_and_blind_rows_have_no_gradient() -> None:
    case = Case(23, 5, 16, 16, window=1, prefix=2, mask="blocks")
    *_, mask = tensors(case, torch.float32, "cpu")
    assert mask is not None
    _, lse, dq, dk, dv = run_backward(case, torch.float32, "cpu")
    assert (lse[-1] == float("-inf")).all()
    assert (dq[-1] == 0).all()
    for gradient in (dk, dv):
        assert (gradient.transpose(1, 2)[~mask] == 0).all()
        assert (gradient.transpose(1, 2)[0][mask[0]] != 0).any()


def test_scale_that_is_not_positive() -> None:
    """Gradients of a negative scale are those of negated queries."""
    q, k, v, dz = (torch.randn(1, 1, 22, 16) for _ in range(4))
    options: dict[str, Any] = {"block_size": 5, "window": 1}
    found = []
    for sign in (1, -1):
        z, lse = launch_with_lse(sign * q, k, v, None, scale=sign * 0.3, **options)
        found.append(launch_backward(dz, sign * q, k, v, None, z, lse, scale=sign * 0.3, **options))
    torch.testing.assert_close(found[0][0], -found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1:3], found[1][1:3], rtol=1e-5, atol=1e-6)


def test_summaries_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last buffers are allocated, those of the kernels that are done are free."""
    allocate = launcher._allocate
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[torch.Size]] = []

    def noted(*arguments: Any) -> Tensor:
        alive.append([tensor.shape for tensor in (x() for x in made) if tensor is not None])
        found = allocate(*arguments)
        made.append(weakref.ref(found))
        return found

    case = WINDOWS[0]
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    z, lse = launch_with_lse(q, k, v, None, **case.options)
    monkeypatch.setattr(launcher, "_allocate", noted)
    for change in (_small, _one_step):
        del made[:], alive[:]
        with scheduled(change):
            launch_backward(z, q, k, v, None, z, lse, **case.options)
        summaries = torch.Size((case.block_size * 6 * 16,))
        assert alive[2].count(summaries) == 2  # a and y, while c is allocated
        assert alive[-1].count(summaries) == 2  # da and dy


def test_expanded_gradients() -> None:
    """What a sum over the output gives: one element, with strides of 0."""
    case = WINDOWS[0]
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    z, lse = launch_with_lse(q, k, v, None, **case.options)
    ones = torch.ones(()).expand_as(z)
    found = launch_backward(ones, q, k, v, None, z, lse, **case.options)
    whole = launch_backward(ones.contiguous(), q, k, v, None, z, lse, **case.options)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], whole[:3], strict=True))


REFUSED = {
    "num_iters": (Form(4, num_iters=2), False, 20),
    "identity start": (Form(4, init="mean"), False, 20),
    "different lengths": (Form(4), True, 20),
    "prefix of at most": (Form(4, prefix=17), False, 40),
    "chosen=2": (Form(4, chosen=2), False, 40),
    "exact attention": (Form(20), False, 20),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    form, is_cross, seq_len = REFUSED[reason]
    assert reason in (backward_refusal(form, is_cross, seq_len) or "")
    q, k = torch.randn(1, 1, seq_len, 16), torch.randn(1, 1, seq_len + is_cross, 16)
    with pytest.raises(CodegenError, match=reason):
        launch_with_lse(q, k, k, None, scale=0.25, **dataclasses.asdict(form))


def test_what_has_kernels_is_not_refused() -> None:
    assert backward_refusal(Form(4, window=1, prefix=16), False, 40) is None
    assert backward_refusal(Form(4), False) is None
