"""Results that leave a graph, the function or a door lie in memory as eager's do: callers may view them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import monarch_compile
from monarch_compile.integrations import replace_sdpa
from tests.support.capture import run_passes

B, H, N, D = 2, 3, 21, 4


def _inputs(order: tuple[int, ...], heads: int = H, dim: int = D) -> Tensor:
    """(batch, heads, seq_len, dim), the dims in this order in memory."""
    sizes = (B, heads, N, dim)
    inverse = sorted(range(4), key=order.__getitem__)
    generator = torch.Generator().manual_seed(0)
    return torch.randn([sizes[dim] for dim in order], generator=generator).permute(inverse)


CONTIGUOUS, MERGED = (0, 1, 2, 3), (0, 2, 1, 3)
ORDERS = (CONTIGUOUS, MERGED, (1, 0, 2, 3), (2, 0, 1, 3), (0, 1, 3, 2))


def _sdpa(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q)


def _by_hand(q: Tensor) -> Tensor:
    return torch.softmax(q @ q.mT * 0.5, -1) @ q


PROGRAMS: tuple[Callable[[Tensor], Any], ...] = (
    _sdpa,
    _by_hand,
    lambda q: _sdpa(q) * 2,
    lambda q: _by_hand(q) * 2,
    lambda q: _sdpa(q) + q,
    lambda q: _sdpa(q).transpose(1, 2),
    lambda q: _sdpa(q).transpose(1, 2).reshape(B, N, H * D),
    lambda q: _sdpa(q)[:, :, :7],
    lambda q: torch.stack(_sdpa(q).chunk(3, 2)),
    lambda q: torch.einsum("bhij,bhjd->bihd", torch.softmax(q @ q.mT * 0.5, -1), q),
    lambda q: torch.softmax(torch.bmm(q.flatten(0, 1), q.flatten(0, 1).mT), -1) @ q.flatten(0, 1),
)


def _all(q: Tensor) -> list[Any]:
    return [program(q) for program in PROGRAMS]


def _strides(values: list[Tensor]) -> list[list[int]]:
    """Of each value, but for dims of size 1, whose strides no view asks for."""
    return [[n for size, n in zip(x.shape, x.stride(), strict=True) if size != 1] for x in values]


@pytest.mark.parametrize("order", [CONTIGUOUS, MERGED], ids=str)
@pytest.mark.parametrize("block_size", [8, 64])
def test_what_leaves_a_graph(order: tuple[int, ...], block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What AOTAutograd tells Inductor of strides is what a compiled graph returns."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    torch._dynamo.reset()
    counters.clear()
    q = _inputs(order)
    compiled = torch.compile(_all, backend="monarch", options={"policy": "always", "block_size": block_size})
    assert _strides(compiled(q)) == _strides(_all(q))
    assert counters["monarch"]["lowered"] == len(PROGRAMS)


def test_a_caller_views_what_a_compiled_module_returns() -> None:
    """At block size "auto" and at most a block of keys, the result was a slice of a padded buffer."""
    torch._dynamo.reset()
    q = _inputs(MERGED)[:, :, :13]
    found = torch.compile(_sdpa, backend="monarch", options={"policy": "always", "window": None})(q)
    expected = _sdpa(q).transpose(1, 2).view(B, 13, H * D)
    torch.testing.assert_close(found.transpose(1, 2).view(B, 13, H * D), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "order", "copies"),
    [
        (_sdpa, MERGED, 0),
        (_sdpa, CONTIGUOUS, 1),
        (lambda q: _sdpa(q).transpose(1, 2).reshape(B, N, H * D), CONTIGUOUS, 0),
        (lambda q: _sdpa(q).transpose(1, 2).reshape(B, N, H * D) * 2, CONTIGUOUS, 0),
        (lambda q: F.linear(_sdpa(q) * 2, torch.ones(D, D)), CONTIGUOUS, 0),
    ],
    ids=["as_it_is", "turned", "merged", "merged_times_2", "projected"],
)
def test_only_what_is_seen_is_copied(fn: Callable[..., Any], order: tuple[int, ...], copies: int) -> None:
    _, (rewrite,) = run_passes(fn, _inputs(order))
    assert rewrite.num_lowered == 1
    assert len([n for n in rewrite.after.graph.nodes if "clone" in str(n.target)]) == copies


@pytest.mark.parametrize("block_size", [1, 8, 64])
@pytest.mark.parametrize(
    "form",
    [{}, {"window": None}, {"pad": "pre", "init": "mean", "num_iters": 2}, {"prefix": 3}, {"prefix": N}],
    ids=str,
)
def test_the_function_gives_batch_seq_heads_dim(form: dict[str, Any], block_size: int) -> None:
    q, k = _inputs(CONTIGUOUS, heads=6), _inputs(CONTIGUOUS)
    for queries in (q, q[:, :, :5]):
        output = monarch_compile.monarch_attention(queries, k, k, block_size=block_size, **form)
        assert output.transpose(1, 2).is_contiguous()


def _calls() -> list[dict[str, Any]]:
    key_mask = torch.ones(B, 1, 1, N, dtype=torch.bool)
    masks = [{}, {"attn_mask": key_mask}, {"attn_mask": torch.zeros(B, 1, 1, N)}]
    calls = [{"query": q, "key": q, "value": q} | mask for q in map(_inputs, ORDERS) for mask in masks]
    packed = torch.randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    one, wide = _inputs(MERGED, heads=1).expand(-1, H, -1, -1), _inputs(MERGED, dim=6)
    q = _inputs(MERGED)
    shapes = [(*packed,), (one, one, one), (q, q, wide), (q[..., :1], q[..., :1], q), (q[:, :1], q[:, :1], q[:, :1])]
    grouped = {"query": _inputs(MERGED, heads=6), "key": q, "value": q, "enable_gqa": True}
    calls += [dict(zip(("query", "key", "value"), given, strict=True)) for given in shapes]
    return [*calls, grouped]


@pytest.mark.parametrize("block_size", [8, 64])
@pytest.mark.parametrize("kernels", [None, SDPBackend.MATH], ids=str)
def test_a_door_gives_the_strides_of_sdpa(block_size: int, kernels: SDPBackend | None) -> None:
    calls = _calls()
    with sdpa_kernel(kernels or [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        expected = _strides([F.scaled_dot_product_attention(**call) for call in calls])
        with replace_sdpa(policy="always", block_size=block_size, strict=True) as replaced:
            found = _strides([F.scaled_dot_product_attention(**call) for call in calls])
    assert replaced.lowered == len(calls)
    assert found == expected


class Mixer(nn.Module):
    """Attention whose result is viewed, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.out = nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(b, n, c))


def test_an_exported_program_of_a_dynamic_length_can_be_decomposed() -> None:
    model, x = Mixer().eval(), torch.randn(B, N, H * D)
    shapes = {"x": {1: torch.export.Dim("n", min=2, max=512)}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    lowered = monarch_compile.lower_exported(program, {"policy": "always", "block_size": 8, "window": None})
    decomposed = lowered.run_decompositions().module()
    for n in (N, 33):
        x = torch.randn(B, n, H * D)
        torch.testing.assert_close(decomposed(x), lowered.module()(x))
