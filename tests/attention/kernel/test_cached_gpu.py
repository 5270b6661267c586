"""The compiled kernels of causal queries after a cache on a CUDA device, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from monarch_compile.attention.functional import monarch_attention
from tests.attention.kernel.chosen import check_replay_of_choice, check_with_choice
from tests.attention.kernel.problems import DTYPES, Case, check, tensors, through_operator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAR = (
    Case(1001, 39, 64, 64, num_heads=3, causal=True, window=1, queries=200),
    Case(2048, 64, 128, 128, num_heads=4, group=2, causal=True, window=2, prefix=64, queries=512),
    Case(1500, 150, 80, 25, num_heads=2, causal=True, window=1, prefix=3, mask="some", pad="pre", queries=777),
    Case(4999, 16, 64, 64, causal=True, window=3, mask="bias", queries=1),
    Case(700, 64, 32, 32, causal=True, window=0, prefix=300, mask="some", queries=600),  # part of the prefix
    Case(60, 64, 64, 64, causal=True, mask="some", queries=20),  # one block
)
CHOSEN = (
    Case(1001, 39, 64, 64, num_heads=3, causal=True, window=1, chosen=3, queries=333),
    Case(2048, 64, 128, 128, num_heads=4, group=2, causal=True, window=2, prefix=64, chosen=8, queries=500),
    Case(8200, 32, 128, 128, num_heads=2, group=2, causal=True, window=1, chosen=5, layout="packed", queries=4100),
    Case(2050, 64, 256, 256, num_heads=2, group=2, causal=True, window=0, chosen=2, queries=130),
    Case(3000, 16, 64, 64, chosen=4, causal=True, window=1, mask="some", pad="pre", queries=2999),
    Case(5000, 64, 25, 80, chosen=4, causal=True, window=1, prefix=5, mask="bias", queries=65),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FAR, ids=str)
def test_far_fields(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen(case: Case, dtype: torch.dtype) -> None:
    check_with_choice(case, dtype, "cuda")


@pytest.mark.parametrize("layout", ["packed", "transposed", "unaligned"])
def test_layouts(layout: str) -> None:
    check_with_choice(replace(CHOSEN[1], layout=layout), torch.bfloat16, "cuda")


@pytest.mark.parametrize("case", [FAR[1], CHOSEN[0], CHOSEN[1], CHOSEN[4]], ids=str)
def test_no_output_depends_on_a_later_token_and_calls_repeat(case: Case) -> None:
    """Bit for bit, the choice of blocks included."""
    q, k, v, mask = tensors(case, torch.bfloat16, "cuda")
    found = through_operator(case, q, k, v, mask)
    assert torch.equal(through_operator(case, q, k, v, mask), found)
    rows = q.shape[2]
    for kept in (1, rows // 3, rows // 2 + 5, rows - 2):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            later = x[:, :, x.shape[2] - rows + kept :]
            later.copy_(5 * torch.randn_like(later))
        assert torch.equal(through_operator(case, *others, mask)[:, :, :kept], found[:, :, :kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pieces_of_a_prompt_give_exact_attention_where_all_blocks_are_chosen(dtype: torch.dtype) -> None:
    n, options = 2000, {"block_size": 64, "window": 1, "prefix": 64, "chosen": 40, "causal": True}
    q, k, v = (torch.randn(1, heads, n, 128, device="cuda", dtype=dtype) for heads in (4, 2, 2))
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    for begin, end in ((0, 30), (30, 700), (700, 701), (701, 1984), (1984, n)):
        found = monarch_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], **options)
        close = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), exact[:, :, begin:end], rtol=close, atol=close)


@pytest.mark.parametrize("cached", [6000, 6013])
def test_keys_beyond_the_last_are_never_read(cached: int) -> None:
    """As in a cache that is allocated for more tokens, and is not filled yet."""
    options = {"block_size": 64, "window": 1, "prefix": 64, "chosen": 4, "causal": True}
    rows = 500
    q = torch.randn(2, 4, rows, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.full((2, 2, 9000, 128), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for x in (k, v):
        x[:, :, : cached + rows] = torch.randn_like(x[:, :, : cached + rows])
    views = [x[:, :, : cached + rows] for x in (k, v)]
    found = monarch_attention(q, *views, **options)
    assert torch.isfinite(found).all()
    assert torch.equal(found, monarch_attention(q, *(x.contiguous() for x in views), **options))


def test_a_compiled_model_serves_pieces_at_any_place() -> None:
    form = {"causal": True, "block_size": 64, "window": 1, "chosen": 4, "prefix": 0}

    def attend(q, k, v):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    compiled = torch.compile(attend, backend="monarch", options={"policy": "always", "strict": True, **form})
    for rows, keys in ((500, 3000), (700, 3700), (700, 4413)):
        q, k, v = (torch.randn(1, h, n, 64, device="cuda").bfloat16() for h, n in ((4, rows), (2, keys), (2, keys)))
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, k, v), monarch_attention(q, k, v, **form))


def test_a_cuda_graph_replays_the_choice() -> None:
    """Blocks are chosen on the device, without waiting for the host: a captured call follows its inputs."""
    check_replay_of_choice(CHOSEN[1])
