"""Never silently wrong, memory: writes in place, aliases, and results that lie elsewhere than eager's.

With block_size=1 Monarch attention is exact, so a lowered program has to agree with eager too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from support.soundness import LOWERED, Program, agrees, attend, make_inputs, result_as_kernels_leave_it  # noqa: F401
from torch import Tensor

INF = float("inf")

# ---- writes ----------------------------------------------------------------------------------------------------------


def _constant_written_by_another_name(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scale = torch.tensor(2.0)
    alias = scale.detach()
    scale.mul_(3)
    return attend(q @ k.mT * alias, v)


def _constant_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scale = torch.tensor(2.0)
    scale.mul_(3)
    return attend(q @ k.mT * scale, v)


def _scores_written_by_another_name(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    view = scores.swapaxes(0, 1).swapaxes(0, 1)
    scores.add_((1 - m.float())[:, None, None] * -1e9)
    return attend(view, v), attend(q @ k.mT, v)


def _query_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    x = q * 2
    scores = x.swapaxes(0, 0) @ k.mT
    x.zero_()
    return attend(scores, v)


def _scores_written_for_nobody(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT
    probs = scores.softmax(-1)
    scores.mul_(2)
    result = probs @ v
    probs.mul_(2)
    return result


def _scores_written_and_returned(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    probs = scores.softmax(-1)
    return probs @ v, scores.mul_(2)


def _list_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    x, y = q * 1, k * 1
    torch._foreach_mul_([x, y], 2.0)
    return attend(x @ y.mT, v)


def _copy_outlives_a_write(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    x = q * 1
    y = (x * 0.5).reshape(6, 7, 4)
    x[0].mul_(3)
    return attend(y @ k.reshape(6, 7, 4).mT, v.reshape(6, 7, 4)), x


def _mask_written_by_another_name(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    place = torch.arange(7)
    view = place.expand_as(place)
    place.sub_(3)
    return attend((q @ k.mT).masked_fill(view < 0, -INF), v)


def _mask_written_after(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    hidden = ~m
    scores = (q @ k.mT).masked_fill(hidden[:, None, None], -INF)
    hidden.zero_()
    return attend(scores, v)


def _mask_written_before(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    m.logical_not_()
    m.logical_not_()
    return attend((q @ k.mT).masked_fill(~m[:, None, None], -INF), v)


def _written_with_out(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    mask, view = torch.zeros(7, 7), None
    view = mask.view(7, 7)
    torch.mul(torch.full((7, 7), -1e9), 1, out=mask)
    return attend(q @ k.mT + view.tril(-1), v)


WRITES: dict[Program, list[str]] = {
    _constant_written_by_another_name: ["mutation"],
    _constant_written: [LOWERED],
    _scores_written_by_another_name: ["scores_view", LOWERED],
    _query_written: ["mutation"],
    _scores_written_for_nobody: [LOWERED],
    _scores_written_and_returned: ["scores_reused"],
    _list_written: ["mutation"],
    _copy_outlives_a_write: ["mutation"],
    _mask_written_by_another_name: ["mutation"],
    _mask_written_after: ["mutation"],
    _mask_written_before: [LOWERED],
    _written_with_out: ["mutation"],
}


@pytest.mark.parametrize("fn", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_writes(fn: Program) -> None:
    assert agrees(fn) == WRITES[fn]


# ---- the result: it has other strides than eager's -------------------------------------------------------------------


def _view_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    y = attend(q @ k.mT, v)
    y.view(6, 28).add_(1.0)
    return y


def _copy_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    y = attend(q @ k.mT, v)
    merged = y.transpose(1, 2).reshape(2, 7, 12)
    merged.add_(1.0)
    return y * 1, merged


def _descendant_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    y = attend(q @ k.mT, v) * 2
    y.flatten(0, 1).flatten(1).mul_(2)
    return y


def _viewed_before_a_write(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    y = attend(q @ k.mT, v)
    view = y.view(6, 28)
    y.add_(q)
    return view * 1


RESULTS: dict[str, Program] = {
    "view_written": _view_written,
    "copy_written": _copy_written,
    "descendant_written": _descendant_written,
    "viewed_before_a_write": _viewed_before_a_write,
    "view_as": lambda q, k, v, m: attend(q @ k.mT, v).view_as(torch.empty(6, 28)) * 1,
    "next_query": lambda q, k, v, m: attend(attend(q @ k.mT, v) @ k.mT, v),
    "next_everything": lambda q, k, v, m: F.scaled_dot_product_attention(
        *[F.scaled_dot_product_attention(q, k, v)] * 3
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_uses_of_the_result(name: str) -> None:
    assert set(agrees(RESULTS[name])) == {LOWERED}


def test_as_strided_after_other_ops_is_noticed() -> None:
    assert agrees(lambda q, k, v, m: (attend(q @ k.mT, v) * 2).as_strided((2, 3), (84, 28))) == ["as_strided"]


def test_a_returned_result_has_the_strides_of_eager() -> None:
    """Code after a graph break may view what it got."""
    q, k, v, _ = make_inputs()
    output, (result,) = run_passes(lambda q, k, v: attend(q @ k.mT, v), q, k, v)
    assert result.num_lowered == 1
    assert output.stride() == attend(q @ k.mT, v).stride()


def test_a_merged_and_projected_result_is_not_copied() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        x = F.linear(attend(q @ k.mT, v).transpose(1, 2).reshape(2, 7, 12), w)
        x += 1
        return x

    _, (result,) = run_passes(fn, *make_inputs()[:3], torch.randn(12, 12))
    assert result.num_lowered == 1
    assert not [n for n in result.after.graph.nodes if "clone" in str(n.target)]
