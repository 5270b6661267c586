"""The compiled kernels of causal attention and of chosen blocks on a CUDA device against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.attention.kernel.chosen import check_replay_of_choice, check_with_choice, with_choice
from tests.attention.kernel.problems import DTYPES, Case, check, tensors, through_operator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CAUSAL = (
    Case(1001, 39, 64, 64, num_heads=3, causal=True, window=1),
    Case(2048, 64, 128, 128, num_heads=4, group=2, causal=True, window=2, prefix=64),
    Case(1500, 150, 80, 25, num_heads=2, causal=True, window=1, prefix=3, mask="some", pad="pre"),
    Case(4999, 16, 64, 64, causal=True, window=3, mask="bias"),
)
CHOSEN = (
    Case(1001, 39, 64, 64, num_heads=3, causal=True, window=1, chosen=3),
    Case(2048, 64, 128, 128, num_heads=4, group=2, causal=True, window=2, prefix=64, chosen=8),
    Case(8200, 32, 128, 128, num_heads=2, group=2, causal=True, window=1, chosen=5, layout="packed"),
    Case(2050, 64, 256, 256, num_heads=2, group=2, causal=True, window=0, chosen=2),
    Case(3000, 16, 64, 64, chosen=4, window=1, mask="some"),
    Case.tiled((61, 67), (8, 8), 64, 64, window=1, window_shape="plus", prefix=5, chosen=4),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_causal(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen(case: Case, dtype: torch.dtype) -> None:
    check_with_choice(case, dtype, "cuda")


@pytest.mark.parametrize("case", [CAUSAL[1], CHOSEN[0], CHOSEN[1]], ids=str)
def test_no_output_depends_on_a_later_token_and_calls_repeat(case: Case) -> None:
    q, k, v, mask = tensors(case, torch.bfloat16, "cuda")
    found = through_operator(case, q, k, v, mask)
    assert torch.equal(through_operator(case, q, k, v, mask), found)
    for last in (case.seq_len // 3, case.seq_len // 2 + 5, case.seq_len - 2):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, last + 1 :] = 5 * torch.randn_like(x[:, :, last + 1 :])
        assert torch.equal(through_operator(case, *others, mask)[:, :, : last + 1], found[:, :, : last + 1])


@pytest.mark.parametrize("group", [4, 8])
def test_heads_that_share_keys_share_their_blocks(group: int) -> None:
    case = Case(8200, 64, 128, 128, num_heads=8, group=group, causal=True, window=1, prefix=64, chosen=8, batch=1)
    _, taken = with_choice(case, *tensors(case, torch.bfloat16, "cuda"))
    by_key_head = taken.unflatten(1, (-1, group))
    assert torch.equal(by_key_head, by_key_head[:, :, :1].expand_as(by_key_head))
    check_with_choice(case, torch.bfloat16, "cuda")


def test_a_cuda_graph_replays_the_choice() -> None:
    """Blocks are chosen on the device: a captured call follows its inputs."""
    check_replay_of_choice(CHOSEN[1])
