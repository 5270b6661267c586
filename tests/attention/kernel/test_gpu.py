"""The compiled kernels on a CUDA device against the float64 reference: odd sizes, every dtype, strides, races."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from tolerances import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from monarch_compile.codegen.attention.rows import FEW_HEADS, exact_rows
from tests.attention.kernel.problems import DTYPES, Case, check, in_every_layout, run, tensors, through_operator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLAIN = Case(1001, 39, 64, 64, num_heads=3)
SIZES = tuple(
    Case(777, 45, dim, dim, num_iters, num_heads=2) for dim in (25, 32, 64, 72, 80, 128, 256) for num_iters in (1, 2, 3)
)
ITERATED = tuple(
    Case(997, block_size, 64, 64, num_iters, init, pad, mask, num_heads=2)
    for block_size in (20, 150)
    for num_iters in (1, 2, 3)
    for init in ("identity", "mean")
    for pad in ("post", "pre")
    for mask in ("none", "some", "blocks")
)
LENGTHS = tuple(
    Case(seq_len, block_size, 64, 64, num_heads=2)
    for seq_len, block_size in ((1, 1), (17, 1), (63, 8), (129, 129), (100, 300), (2049, 64), (4097, 7), (4999, 71))
)
IN_TURN = (  # long enough for programs that take several tiles in turn; whole blocks, and others
    Case(16384, 128, 64, 64, batch=1),
    Case(16000, 128, 64, 64, batch=1, layout="packed"),
    Case(16383, 128, 64, 64, 2, pad="pre", batch=1, mask="some"),
    Case(65536, 256, 64, 64, batch=1),
    Case(65000, 256, 64, 64, batch=1, mask="bias"),
    Case(32768, 128, 64, 64, 2, batch=1),
    Case(16384, 128, 128, 128, batch=1),
    Case(16383, 127, 64, 64, batch=1),
    Case(16384, 64, 64, 64, batch=1, window=1),
    Case(32768, 128, 64, 64, batch=1, window=1, prefix=4, num_heads=2, group=2),
)
MIXED = (Case(500, 30, 64, 32), Case(500, 30, 32, 128, 2), Case(500, 30, 80, 25, 2, "mean", "pre", "blocks"))
GROUPED = tuple(  # with exact groups: some of all combinations, each in one dtype
    (Case(997, block_size, 64, 64, *form, num_heads=2, window=window, prefix=prefix), DTYPES[place % 3])
    for place, (block_size, window, prefix, *form) in enumerate(
        random.Random(0).sample(
            [
                options
                for options in itertools.product(
                    (20, 64, 150),
                    (None, 0, 1, 2, 60),
                    (0, 1, 5, 151, 997),
                    (1, 1, 2, 3),
                    ("identity", "mean"),
                    ("post", "pre"),
                    ("none", "some", "blocks"),
                )
                if options[1:3] != (None, 0)
            ],
            60,
        )
    )
)
WINDOWS = (
    replace(PLAIN, num_heads=6, group=3, window=1, prefix=4, mask="some"),
    replace(PLAIN, num_heads=6, group=2, num_iters=2, init="mean"),
    replace(PLAIN, window=1),
    Case(777, 45, 25, 80, num_heads=2, window=1, prefix=4, mask="blocks"),
    Case(777, 45, 128, 128, num_heads=2, window=1, prefix=4, mask="some"),
    Case(777, 100, 256, 256, num_heads=2, window=1),
    Case(4097, 7, 64, 64, num_heads=2, window=2),
    Case(100, 300, 64, 64, num_heads=2, window=1, prefix=3),
    Case(300, 2, 64, 64, num_heads=2, window=1, prefix=70),  # more rows than all offsets copy in one turn
    Case(777, 45, 64, 64, num_heads=2, window=1, prefix=40),
    Case(1, 1, 64, 64, window=1, prefix=1),
    Case(4999, 300, 64, 64, 2, "mean", num_heads=2, window=1),
)
TILED = (
    *(
        Case.tiled((37, 37), (4, 8), 64, 64, num_heads=2, window=window, window_shape=shape, prefix=prefix, mask=mask)
        for window, shape in ((None, "box"), (0, "box"), (1, "box"), (1, "plus"), (2, "box"))
        for prefix, mask in ((0, "none"), (1, "blocks"), (5, "bias"))
    ),
    Case.tiled((37, 37), (8, 8), 64, 64, num_iters=2, init="mean", num_heads=2, window=1, prefix=1, mask="some"),
    Case.tiled((128, 128), (8, 8), 64, 64, batch=1, num_heads=2, window=1),
    Case.tiled((128, 128), (8, 8), 64, 64, batch=1, num_iters=2, layout="packed"),
    Case.tiled((64, 64), (4, 8), 128, 128, batch=1, window=0, num_heads=4, group=2),
    Case.tiled((61, 67), (8, 16), 25, 80, window=1, window_shape="plus", layout="transposed"),
    Case.tiled((9, 30, 31), (4, 4, 4), 64, 64, batch=1, window=1, window_shape="plus", prefix=5, mask="some"),
    Case.tiled((9, 30, 31), (2, 4, 4), 80, 80, batch=1, num_iters=3, mask="blocks"),
    # Text after the image: its rows in stage 1, in a kernel of their own, and of two iterations.
    Case.tiled((37, 37), (8, 8), 64, 64, num_heads=2, window=1, prefix=13, prefix_at_end=True, mask="bias"),
    Case.tiled((64, 64), (8, 8), 64, 64, batch=1, num_heads=2, prefix=333, prefix_at_end=True, layout="packed"),
    Case.tiled(
        (37, 37), (4, 8), 64, 64, num_iters=2, num_heads=2, window=0, prefix=77, prefix_at_end=True, mask="some"
    ),
)
ALONG_AXES = (
    Case.tiled((9, 30, 31), (4, 4, 4), 64, 64, batch=1, window=(0, 1, 1), prefix=5, mask="some"),
    Case.tiled((9, 30, 31), (2, 4, 4), 64, 64, batch=1, window=(2, 1, 0), window_shape="plus", num_iters=2),
    Case.tiled((128, 128), (8, 8), 64, 64, batch=1, num_heads=2, window=(0, 2)),
)
BIASED = (
    replace(PLAIN, mask="bias"),
    replace(PLAIN, mask="bias", window=1, prefix=4, num_heads=6, group=3),
    Case(997, 150, 80, 25, 2, "mean", "pre", "bias", num_heads=2, window=1),
)
CROSS = (  # queries of another number than keys
    Case(1001, 39, 64, 64, 1, "mean", num_heads=3, queries=100),
    Case(1001, 39, 64, 64, 2, "mean", "pre", "some", num_heads=3, queries=2500, layout="packed"),
    Case(4097, 64, 64, 64, 1, "mean", "post", "blocks", num_heads=2, queries=7),
    Case(777, 45, 25, 80, 2, "mean", "post", "blocks", num_heads=2, queries=778),
    Case(777, 45, 128, 128, 1, "identity", "pre", "some", num_heads=2, queries=300),
    Case(500, 150, 256, 256, 3, "mean", num_heads=2, queries=4999),
    Case(4999, 7, 64, 64, 2, "mean", num_heads=6, group=3, queries=1500, mask="some"),
    Case(1001, 1001, 64, 64, 1, "mean", num_heads=2, queries=513),
    Case(8192, 64, 64, 64, 1, "mean", batch=1, queries=8064),
    Case(16384, 128, 64, 64, 2, "mean", batch=1, queries=40000, mask="some"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [PLAIN, *SIZES, *LENGTHS, *IN_TURN, *MIXED], ids=str)
def test_sizes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ITERATED, ids=str)
def test_iterations_and_masks(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize(("case", "dtype"), GROUPED, ids=str)
def test_exact_groups(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*TILED, *ALONG_AXES], ids=str)
def test_tiles(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BIASED, ids=str)
def test_biased_keys(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CROSS, ids=str)
def test_unequal_lengths(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["packed", "transposed", "unaligned"])
def test_layouts(kind: str, dtype: torch.dtype) -> None:
    check(replace(PLAIN, layout=kind, mask="some"), dtype, "cuda")


@pytest.mark.parametrize(("place", "case"), enumerate(in_every_layout(60)), ids=str)
def test_layouts_of_every_size(place: int, case: Case) -> None:
    check(case, DTYPES[place % 3], "cuda")


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_sequence_without_races(dtype: torch.dtype, window: int | None) -> None:
    """A long sequence is right, and bit for bit the same each time: there are no atomics, so a difference is a race."""
    case = Case(16384, 128, 64, 64, num_heads=12, batch=1, window=window)
    first = check(case, dtype, "cuda")
    q, k, v, mask = tensors(case, dtype, "cuda")
    for _ in range(20):
        assert torch.equal(first, run(case, q, k, v, mask))


def test_offsets_beyond_32_bits() -> None:
    """A head that begins past 2**31 elements is read where it is."""
    heads, seq_len, dim = 3, 512, 64
    apart = 2**30 + 64
    store = torch.empty(2 * apart + seq_len * dim, device="cuda", dtype=torch.float16)
    far = store.as_strided((1, heads, seq_len, dim), (0, apart, dim, 1))
    near = torch.randn(1, heads, seq_len, dim, device="cuda", dtype=torch.float16)
    far.copy_(near)
    case = Case(seq_len, 32, dim, dim)
    assert torch.equal(run(case, far, far, far, None), run(case, near, near, near, None))


def test_rows_beyond_32_bits() -> None:
    """Rows so far apart that their sequence spans more than 2**31 elements."""
    seq_len, dim, apart = 512, 64, 2**23
    store = torch.empty(seq_len * apart, device="cuda", dtype=torch.float16)
    far = store.as_strided((1, 1, seq_len, dim), (0, 0, apart, 1))
    near = torch.randn(1, 1, seq_len, dim, device="cuda", dtype=torch.float16)
    far.copy_(near)
    for window in (None, 1):
        case = Case(seq_len, 32, dim, dim, window=window)
        assert torch.equal(run(case, far, far, far, None), run(case, near, near, near, None))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "case",
    [replace(WINDOWS[1], layout="packed"), *(replace(x, prefix=5) for x in (WINDOWS[0], WINDOWS[2])), *CROSS[:2]],
    ids=str,
)
def test_compiled(case: Case, dynamic: bool) -> None:
    """Inductor traces through the operator, with known and with symbolic lengths.

    Exact rows of a prefix and unequal lengths included.
    """
    q, k, v, mask = tensors(case, torch.float16, "cuda")
    compiled = torch.compile(lambda *x: through_operator(case, *x), fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(q, k, v, mask), run(case, q, k, v, mask), rtol=2e-3, atol=2e-3)


def test_exact_groups_in_a_cuda_graph() -> None:
    case = replace(PLAIN, window=1, prefix=5, mask="some")
    q, k, v, mask = tensors(case, torch.float16, "cuda")
    expected = run(case, q, k, v, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case, q, k, v, mask)
    for x in (q, k, v):
        x.copy_(x.flip(2))
    expected_flipped = run(case, q, k, v, mask)
    graph.replay()
    assert torch.equal(found, expected_flipped)
    assert not torch.equal(found, expected)


SERVING = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


@pytest.mark.parametrize(
    ("batch", "rows", "allowed", "shares"),
    [
        (1, 4, [*SERVING], True),
        (1, 1, [*SERVING], False),
        (FEW_HEADS, 4, [*SERVING], False),
        (1, 4, [SDPBackend.MATH], False),  # what the caller switched off stays off
    ],
)
def test_few_rows_of_few_heads_share_out_the_keys(
    batch: int, rows: int, allowed: list[SDPBackend], shares: bool
) -> None:
    q, k, v, _ = tensors(replace(PLAIN, seq_len=4096, batch=batch, num_heads=2), torch.float16, "cuda")
    with (
        sdpa_kernel(allowed),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
    ):
        found = exact_rows(q[:, :, :rows], k, v, None, 0.125)
        torch.cuda.synchronize()
    assert any("flash_fwd_splitkv" in event.key for event in profile.key_averages()) is shares
    expected = scaled_dot_product_attention(q[:, :, :rows].double(), k.double(), v.double(), scale=0.125)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mask", ["none", "some", "bias"])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_exact_rows_of_tensors_that_begin_anywhere(dtype: torch.dtype, rows: int, mask: str, head_dim: int) -> None:
    case = Case(500, 64, head_dim, head_dim, num_heads=2, mask=mask, layout="unaligned")
    q, k, v, key_mask = tensors(case, dtype, "cuda")
    found = exact_rows(q[:, :, :rows], k, v, key_mask, 0.125)
    attn_mask = None if key_mask is None else key_mask[:, None, None, :]
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    expected = scaled_dot_product_attention(
        q[:, :, :rows].double(), k.double(), v.double(), attn_mask=attn_mask, scale=0.125
    )
    assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 1])
def test_two_kernels_a_site(window: int | None) -> None:
    """T = 1 from the identity start is two kernels and nothing else on the device."""
    case = replace(PLAIN, layout="packed", window=window)
    q, k, v, mask = tensors(case, torch.float16, "cuda")
    run(case, q, k, v, mask)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(case, q, k, v, mask)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in names if name.startswith("monarch_")]
    assert ours == ["monarch_summarize" if window is None else "monarch_summarize_near", "monarch_attend"], names
