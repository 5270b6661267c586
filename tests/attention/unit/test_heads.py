"""Fewer key heads than query heads: keys and values are taken as they are before they are repeated, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.spellings import SHARED, inputs
from support.capture import run_passes
from torch import Tensor

from monarch_compile.attention.op import ATTENTION_OP
from monarch_compile.attention.reference import reference

NO_GROUP = ("tiled", "keys_tiled_values_repeated")
OPTIONS = {"block_size": 5, "num_iters": 2, "init": "mean", "window": 0, "prefix": 2}


COPYING = {"aten.expand.default", "aten.repeat.default", "aten.repeat_interleave.self_int", "aten.clone.default"}


def _above(node: Any) -> set[Any]:
    """A node and all that it is computed from."""
    return {node}.union(*(_above(x) for x in node.all_input_nodes))


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)


@pytest.mark.parametrize("name", sorted(set(SHARED) - set(NO_GROUP)))
def test_keys_and_values_are_not_repeated(name: str) -> None:
    output, (result,) = run_passes(SHARED[name], *inputs())
    (decision,) = result.decisions
    assert decision.ir is not None
    assert decision.code == "lowered"
    assert decision.ir.group == (3 if "one_head" in name else 2)
    (site,) = (n for n in result.after.graph.nodes if n.target is ATTENTION_OP)
    assert decision.q_shape[1] == decision.k_shape[1] * decision.ir.group == decision.v_shape[1] * decision.ir.group
    assert not {str(n.target) for n in _above(site.args[1]) | _above(site.args[2])} & COPYING
    torch.testing.assert_close(output, SHARED[name](*inputs()), rtol=1e-5, atol=1e-5)


def test_the_op_computes_what_repeated_keys_give() -> None:
    """With real blocks, against the float64 reference of the repeated form."""
    q, k, v = (torch.randn(2, heads, 23, 4) for heads in (4, 2, 2))
    fn = lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v), scale=0.4)  # noqa: E731
    output, (result,) = run_passes(fn, q, k, v, **OPTIONS)
    assert [d.ir.num_kv_heads for d in result.decisions] == [2]
    wide = reference(*(x.double() for x in (q, repeated(k), repeated(v))), scale=0.4, **OPTIONS)
    torch.testing.assert_close(output, wide.float(), rtol=1e-5, atol=1e-5)


def _next_head(x: Tensor) -> Tensor:
    return repeated(x).roll(1, 1)


def _other_features(x: Tensor) -> Tensor:
    return x[:, :, None].expand(2, 2, 2, 23, 4).reshape(2, 2, 23, 2, 4).permute(0, 1, 3, 2, 4).reshape(2, 4, 23, 4)


def _repeated_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], 1)


NO_REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "next_head": _next_head,
    "rows_and_heads_mixed": _other_features,
    "one_after_another": _repeated_rows,
    "tiled": lambda x: x.repeat(1, 2, 1, 1),
    "scaled_between": lambda x: repeated(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None],
    "flipped": lambda x: repeated(x).flip(1),
}


@pytest.mark.parametrize("name", NO_REPEATS)
@pytest.mark.parametrize("both", [True, False])
def test_what_is_no_repeat_of_neighbours_keeps_its_heads(name: str, both: bool) -> None:
    q, k, v = (torch.randn(2, heads, 23, 4) for heads in (4, 2, 2))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ NO_REPEATS[name](k).mT, -1) @ (NO_REPEATS[name](v) if both else repeated(v))

    output, (result,) = run_passes(fn, q, k, v)
    assert [(d.code, d.ir.group) for d in result.decisions] == [("lowered", 1)]
    torch.testing.assert_close(output, fn(q, k, v), rtol=1e-5, atol=1e-5)


def test_a_write_between_the_repeat_and_its_use_is_seen() -> None:
    """The repeat was a copy: what it was copied from may be written to, but not read again."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = repeated(k), repeated(v)
        k.mul_(2.0)
        return F.scaled_dot_product_attention(q, keys, values)

    given: tuple[Any, ...] = tuple(torch.randn(2, heads, 23, 4) for heads in (4, 2, 2))
    own = tuple(x.clone() for x in given)
    output, (result,) = run_passes(fn, *given)
    assert [d.code for d in result.decisions] == ["mutation"]
    torch.testing.assert_close(output, fn(*own))
    torch.testing.assert_close(given, own)


def test_gradients_reach_the_shared_keys() -> None:
    given = [torch.randn(2, heads, 23, 4, requires_grad=True) for heads in (4, 2, 2)]
    found = torch.autograd.grad(run_passes(SDPA, *given)[0].square().sum(), given)
    expected = torch.autograd.grad(SDPA(*given).square().sum(), given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def SDPA(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
