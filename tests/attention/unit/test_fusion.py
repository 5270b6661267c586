"""Which exact sites are kept from Inductor's own fusion, without Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from support.misread import DIVIDED, FUSED, MISREAD, given
from torch import Tensor

from monarch_compile.passes.attention import fusion
from monarch_compile.passes.pipeline import Rewrite


def passed(fn: Any, *args: Any, **options: Any) -> Rewrite:
    """The rewriting, whose graph gives what the function gives."""
    with torch.no_grad():
        output, (result,) = run_passes(fn, *args, policy="never", dynamic=False, **options)
        torch.testing.assert_close(output, fn(*args))
    return result


@pytest.mark.parametrize("name", MISREAD)
def test_what_would_be_misread_is_kept_apart(name: str) -> None:
    result = passed(MISREAD[name], *given())
    assert result.num_protected == 1
    assert result.before is not result.after


@pytest.mark.parametrize("name", FUSED)
def test_what_is_read_rightly_is_left_as_it_is(name: str) -> None:
    result = passed(FUSED[name], *given())
    assert len(result.decisions) == 1
    assert result.num_protected == 0


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("name", DIVIDED)
def test_another_divisor_is_kept_apart_from_patterns_that_fix_it(
    name: str, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "_patterns_fix_the_scale", lambda: fixed)
    assert passed(DIVIDED[name], *given()).num_protected == fixed


@pytest.mark.parametrize("name", FUSED)
def test_the_usual_divisor_is_left_to_patterns_that_fix_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_patterns_fix_the_scale", lambda: True)
    assert passed(FUSED[name], *given()).num_protected == 0


@pytest.mark.parametrize(("order", "apart"), [((1, 2, 0, 3), 1), ((0, 2, 1, 3), 0)])
def test_sdpa_of_tensors_that_are_turned_oddly_is_kept_apart(order: tuple[int, ...], apart: int) -> None:
    """Where SDPA is computed by matrix products, these are matched, too."""
    x = torch.randn(8, 3, 2, 4)
    causal = passed(lambda x: F.scaled_dot_product_attention(*[x.permute(order)] * 3, is_causal=True), x)
    assert causal.num_protected == apart


def test_a_lowered_site_is_not_kept_apart() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return (k @ q.mT).softmax(-2).mT @ v

    _, (result,) = run_passes(fn, *given())
    assert (result.num_lowered, result.num_protected) == (1, 0)
    assert passed(fn, *given()).num_protected == 1
