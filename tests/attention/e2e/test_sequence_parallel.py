"""Attention over a sequence that lies on several ranks: the same numbers and gradients as one process gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.attention.reference import reference
from monarch_compile.distributed import sequence_parallel
from tests.support.ranks import Pool, pool_of_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

MASKS = (None, "padding", "bias")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool_of_ranks(str(tmp_path_factory.mktemp("ranks"))) as found:
        yield found


def mesh_of(mesh: Any, world: int) -> Any:
    """All four ranks, or two of them."""
    return mesh._flatten("all") if world == 4 else mesh["own"]


def tensors(seed: int, sizes: tuple[int, ...], masked: str | None) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and, where it is learned, a bias, that want gradients; and the key mask."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, seq_len, dim, value_dim = sizes
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    found = [torch.randn(batch, h, seq_len, d, generator=generator) for h, d in shapes]
    leaves = [x.requires_grad_() for x in found]
    if masked == "bias":
        bias = torch.randn(batch, seq_len, generator=generator).requires_grad_()
        return [*leaves, bias], bias
    return leaves, torch.rand(batch, seq_len, generator=generator) > 0.3 if masked == "padding" else None


def compare(mesh: Any, world: int, seed: int, sizes: tuple[int, ...], options: dict[str, Any], extra: Any) -> None:
    """One case: output and gradients of the rank's piece against the reference of the whole sequence."""
    method, masked, causal = extra
    leaves, key_mask = tensors(seed, sizes, masked)
    form = Form(**options)
    weight = torch.randn(sizes[0], sizes[1], sizes[3], sizes[5], generator=torch.Generator().manual_seed(seed + 1))
    expected = reference(*leaves[:3], key_mask, scale=0.3, causal=causal, **vars(form))
    grads = torch.autograd.grad((expected * weight).sum(), leaves)
    parallel = sequence_parallel(mesh_of(mesh, world), seq_len=sizes[3], method=method, **options)
    own = [parallel.shard(x.detach(), 1 if x.ndim == 2 else 2).requires_grad_() for x in leaves]
    mask = own[3] if masked == "bias" else None if key_mask is None else parallel.shard(key_mask, 1)
    mask = None if mask is None else mask[:, None, None, :]
    grouped = {"enable_gqa": True} if sizes[1] != sizes[2] else {}
    with parallel:
        output = F.scaled_dot_product_attention(*own[:3], mask, scale=0.3, is_causal=causal, **grouped)
    found = torch.autograd.grad((output * parallel.shard(weight, 2)).sum(), own)
    torch.testing.assert_close(output, parallel.shard(expected, 2), **TOLERANCE)
    for x, y in zip(found, grads, strict=True):
        torch.testing.assert_close(x, parallel.shard(y, 1 if y.ndim == 2 else 2), **TOLERANCE)


def random_case(seed: int) -> tuple[Any, ...]:
    """Sizes, options and what else of a random case."""
    draw = random.Random(seed)
    world, method = draw.choice((2, 4)), draw.choice(("heads", "offsets"))
    group, kv_heads = draw.choice((1, 2)), draw.choice((4, 8) if method == "heads" else (1, 2, 3))
    sizes = (draw.choice((1, 2)), group * kv_heads, kv_heads, draw.randint(9, 90), draw.choice((5, 8)), 6)
    window = draw.choice((None, 0, 1, 2, 5))
    options: dict[str, Any] = {"block_size": draw.randint(1, 12), "window": window, "prefix": draw.choice((0, 0, 1, 5))}
    options["prefix_at_end"] = bool(options["prefix"]) and draw.random() < 0.5
    causal = False
    if method == "heads":
        causal = draw.random() < 0.3 and not options["prefix_at_end"]
        options["num_iters"] = 1 if causal else draw.choice((1, 2))
    return world, seed, sizes, options, (method, draw.choice(MASKS), causal)


@pytest.mark.parametrize("start", range(0, 60, 10))
def test_random_cases_equal_one_process(pool: Pool, start: int) -> None:
    for seed in range(start, start + 10):
        case = random_case(seed)
        try:
            pool.run(compare, *case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None
