"""The kernels in Triton's interpreter against the float64 reference: tiny problems, every branch of the templates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention.launch import bucketed, launch, run
from monarch_compile.codegen.attention.schedule import choose_schedule
from monarch_compile.codegen.launcher import Launcher, build
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.errors import CodegenError
from tests.attention.kernel.problems import DTYPES, Case, check, tensors

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # A row that sees no key has the log of a zero total, which a later `where` discards.
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

PLAIN = Case(21, 6, 32, 32)
ITERATED = tuple(
    Case(13, 5, 16, 16, num_iters, init, pad, mask)
    for num_iters in (1, 2, 3)
    for init in ("identity", "mean")
    for pad in ("post", "pre")
    for mask in ("none", "blocks")
)
SIZES = (
    Case(9, 4, 25, 25),
    Case(9, 4, 25, 80, 2),
    Case(9, 4, 80, 25, 2, "mean"),
    Case(9, 5, 64, 64),
    Case(9, 5, 72, 72),  # a DiT's heads
    Case(9, 5, 128, 128),
    Case(7, 3, 256, 16),
    Case(5, 1, 16, 16),  # blocks of one key: exact softmax
    Case(11, 30, 16, 16, 2, batch=1),  # one block, mostly padding
    Case(1, 1, 16, 16),
)
STREAMED = (
    Case(45, 40, 16, 16, batch=1),
    Case(45, 40, 16, 16, 1, "mean", "pre", batch=1),
    Case(45, 40, 16, 16, 2, "identity", "pre", "blocks", batch=1),
    Case(37, 2, 16, 16, 2, "identity", "post", "some", batch=1),
)
GROUPS = (
    # One iteration from the identity start: the exact groups are part of stage 1.
    Case(23, 5, 16, 16, window=0),
    Case(23, 5, 16, 16, window=1, pad="pre", mask="blocks"),
    Case(23, 5, 16, 16, window=2, prefix=1, mask="some"),
    Case(23, 5, 16, 16, window=9, prefix=5, pad="pre"),
    Case(23, 5, 16, 16, prefix=7, mask="blocks"),
    Case(23, 5, 16, 16, window=0, prefix=6, mask="blocks"),
    Case(50, 2, 16, 16, window=1, prefix=37),  # more rows than all offsets copy in one turn
    Case(13, 5, 25, 20, window=1, prefix=11, num_heads=2),
    Case(13, 5, 20, 25, window=1, prefix=13, mask="blocks"),
    Case(13, 5, 16, 16, prefix=40, pad="pre", mask="blocks"),
    Case(13, 20, 16, 16, window=1, prefix=5),  # one block, mostly padding
    Case(45, 20, 16, 16, window=1, prefix=3, pad="pre", mask="blocks", batch=1),  # blocks of two tiles, and more
    Case(37, 1, 16, 16, window=10**12, mask="some", batch=1),
    Case(70, 1, 16, 16, window=3, mask="some", batch=1),  # tiles of blocks that no window reaches
    Case(23, 5, 16, 16, window=2, prefix=1, prefix_at_end=True, mask="some"),
    Case(23, 5, 16, 16, window=1, prefix=6, prefix_at_end=True, pad="pre", mask="blocks"),
    Case(50, 2, 16, 16, prefix=37, prefix_at_end=True, batch=1),
    # Otherwise they have a kernel of their own.
    Case(13, 5, 16, 16, 1, "mean", window=1, prefix=1, mask="blocks"),
    Case(13, 5, 16, 16, 1, "mean", "pre", window=0),
    Case(13, 5, 16, 16, 2, window=0),
    Case(13, 5, 16, 16, 2, "identity", "pre", "blocks", window=1, prefix=6),
    Case(13, 5, 16, 16, 2, "mean", "post", "blocks", window=1),
    Case(13, 5, 25, 20, 2, "identity", "post", "some", prefix=5, num_heads=2),
    Case(13, 2, 16, 16, 2, "mean", "pre", window=2, prefix=1),
    Case(13, 5, 16, 16, 3, "identity", "pre", window=1, prefix=14),
    Case(13, 5, 16, 16, 3, "mean", "post", "blocks", window=7, prefix=5),
    Case(45, 20, 16, 16, 2, "identity", "post", "some", batch=1, window=1, prefix=22),
    Case(13, 5, 16, 16, 2, "mean", "pre", "bias", window=1, prefix=3, prefix_at_end=True),
)
SHARED = (  # fewer key heads than query heads
    Case(23, 5, 16, 16, num_heads=4, group=2, mask="some"),
    Case(23, 5, 16, 20, 2, "mean", "pre", num_heads=3, group=3, batch=1),
    Case(23, 5, 25, 16, num_heads=4, group=2, layout="packed", window=1, prefix=2, mask="blocks"),
    Case(45, 20, 16, 16, 2, num_heads=6, group=3, batch=1, window=1, prefix=3, layout="transposed"),
)
CROSS = (  # queries of another number than keys: fewer than blocks, fewer than keys, more
    Case(23, 5, 16, 16, 1, "mean", queries=3),
    Case(23, 5, 16, 16, 1, "mean", "pre", "blocks", queries=17),
    Case(23, 5, 25, 20, 1, "identity", "pre", "some", queries=40, num_heads=2),
    Case(23, 5, 16, 16, 1, "identity", queries=11, layout="packed"),
    Case(23, 5, 16, 25, 2, "mean", "post", "blocks", queries=9, layout="transposed"),
    Case(23, 5, 16, 16, 2, "identity", "pre", "some", queries=31),
    Case(24, 4, 16, 16, 3, "mean", "pre", queries=50, num_heads=4, group=2, mask="some"),
    Case(45, 20, 16, 16, 2, "mean", queries=130, batch=1),  # blocks of several tiles of queries
    Case(45, 2, 16, 16, 2, "mean", "post", "some", queries=5, batch=1),  # mostly blocks without a query
    Case(13, 1, 16, 16, 2, "identity", "post", "blocks", queries=30),
    Case(12, 30, 16, 16, 1, "mean", "pre", "some", queries=5),  # one block, mostly padding
)
BIASED = (
    Case(23, 5, 16, 16, mask="bias"),
    Case(45, 20, 16, 20, 2, "mean", "pre", "bias", batch=1),  # blocks of two tiles
    Case(23, 5, 25, 16, 1, "identity", "pre", "bias", window=1, prefix=3),
    Case(23, 5, 16, 16, 2, "identity", "post", "bias", window=0, prefix=2, num_heads=4, group=2),
    Case(23, 5, 16, 16, 2, "mean", "post", "bias", queries=40),
)
LAYOUTS = tuple(replace(PLAIN, layout=kind, mask="some") for kind in ("packed", "transposed", "unaligned"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, num_iters=2, mask="blocks", num_heads=2)], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu")


@pytest.mark.parametrize("case", [*ITERATED, *SIZES], ids=str)
def test_cases(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_several_tiles(case: Case) -> None:
    """Blocks of more keys than one tile, and more blocks than one tile: the online softmax."""
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_exact_groups(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_keys(case: Case) -> None:
    """Bit for bit what the same keys and values give when they are repeated for every query head."""
    found = check(case, torch.float32, "cpu")
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    repeated = (x.repeat_interleave(case.group, dim=1) for x in (k, v))
    assert torch.equal(found, launch(q, *repeated, mask, **case.options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_exact_groups_in_16_bits(dtype: torch.dtype) -> None:
    check(Case(21, 6, 32, 32, layout="packed", mask="blocks", num_heads=2, window=1, prefix=2), dtype, "cpu")


def test_exact_groups_in_a_kernel_of_their_own() -> None:
    """The schedule chooses where the exact groups are computed, not what they are."""
    case = Case(23, 5, 16, 16, window=1, prefix=2, mask="some")
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    form = Form(5, window=case.window, prefix=case.prefix)
    ir = MonarchAttention(2, 1, 1, "N", "N", 16, 16, q.dtype, form, 0.25, MaskKind.KEY_PADDING)
    fused = choose_schedule(ir)
    separate = replace(fused, near=Tiling(16, 32, 1, 1), fused=False)
    found = [run(Launcher(ir, schedule), q, k, v, mask) for schedule in (fused, separate)]
    torch.testing.assert_close(*found)


def test_a_window_over_everything_is_exact() -> None:
    q, k, v = (torch.randn(2, 1, 17, 16) for _ in range(3))
    mask = torch.rand(2, 17) > 0.4
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=-0.3)
    options = {"scale": -0.3, "block_size": 4, "num_iters": 1, "init": "identity", "pad": "post"}
    for groups in ({"window": 4}, {"prefix": 17}, {"window": 3, "prefix": 5}):
        torch.testing.assert_close(launch(q, k, v, mask, **options, **groups), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case) -> None:
    """Strides are followed, and the answer is bit for bit that of contiguous tensors."""
    found = check(case, torch.float16, "cpu")
    assert torch.equal(found, check(replace(case, layout="contiguous"), torch.float16, "cpu"))


def test_batch_stride_zero_and_negative_scale() -> None:
    q, k, v = (torch.randn(1, 1, 9, 16).expand(2, 2, 9, 16) for _ in range(3))
    found = launch(q, k, v, None, scale=-0.3, block_size=4, num_iters=1, init="identity", pad="post")
    assert torch.equal(found, found[:1, :1].expand_as(found))
    whole = launch(q, k, v, None, scale=-0.3, block_size=9, num_iters=1, init="identity", pad="post")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=-0.3)
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=1e-6)


def test_masked_keys_do_not_matter() -> None:
    """Kept rows are bit for bit the same whatever finite values the hidden keys and values hold."""
    q, k, v = (torch.randn(1, 1, 13, 16) for _ in range(3))
    mask = torch.arange(13)[None] < 8
    options = {"scale": 0.25, "block_size": 4, "num_iters": 1, "init": "identity", "pad": "post"}
    found = launch(q, k, v, mask, **options)
    k[:, :, 8:], v[:, :, 8:] = 1e4, -1e4
    assert torch.equal(found, launch(q, k, v, mask, **options))


def test_float64_has_no_kernel() -> None:
    q = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(CodegenError, match="falls back to the reference"):
        launch(q, q, q, None, scale=1.0, block_size=2, num_iters=1, init="identity", pad="post")


def test_kernels_for_few_blocks_refuse_more() -> None:
    ir = bucketed(MonarchAttention(1, 1, 1, 64, 64, 16, 16, torch.float32, Form(4), 1.0))
    q = torch.randn(1, 1, 4 * 17, 16)
    with pytest.raises(CodegenError, match="at most 16 blocks; found 17"):
        run(build(ir, None, True), q, q, q, None)


@pytest.mark.parametrize("case", CROSS, ids=str)
def test_unequal_lengths(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", BIASED, ids=str)
def test_biased_keys(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_lowest_bias_hides_a_key(dtype: torch.dtype) -> None:
    """A bias of another dtype than the queries; -inf and the lowest float32 are as good as a bool mask."""
    q, k, v, mask = tensors(case := Case(23, 5, 16, 16, mask="blocks", window=1, prefix=2), dtype, "cpu")
    hidden = launch(q, k, v, mask, **case.options)
    for low in (float("-inf"), torch.finfo(torch.float32).min):
        bias = torch.zeros(mask.shape).masked_fill(~mask, low)
        assert torch.equal(launch(q, k, v, bias, **case.options), hidden)


@pytest.mark.parametrize("queries", [1, 4, 40])
@pytest.mark.parametrize("init", ["identity", "mean"])
def test_unequal_lengths_at_the_extremes_are_exact(queries: int, init: str) -> None:
    """One block, and one key a block: softmax attention, for any number of queries."""
    q, k, v = torch.randn(2, 1, queries, 16), torch.randn(2, 1, 23, 16), torch.randn(2, 1, 23, 20)
    mask = torch.rand(2, 23) > 0.4
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=0.3)
    for block_size in (1, 23, 30):
        found = launch(q, k, v, mask, scale=0.3, block_size=block_size, num_iters=1, init=init, pad="post")
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_kernels_of_unequal_lengths_serve_every_number_of_queries_of_a_bucket() -> None:
    """How many queries a block holds is a parameter of the kernels, not a part of their text."""
    build.cache_clear()
    k = torch.randn(1, 1, 30, 16)
    for queries in (7, 31, 100, 190):
        launch(k[:, :, :1].expand(-1, -1, queries, -1), k, k, None, **CROSS[0].options)
    assert build.cache_info().misses == 2


@pytest.mark.parametrize("groups", [{"window": 1}, {"prefix": 2}], ids=str)
def test_exact_groups_between_unequal_lengths_have_no_kernel(groups: dict[str, int]) -> None:
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 6, 16)
    with pytest.raises(CodegenError, match="window or a prefix where seq_len_q != seq_len_k"):
        launch(q, k, k, None, scale=1.0, block_size=2, num_iters=1, init="identity", pad="post", **groups)
