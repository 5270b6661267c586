"""Which block linears are lowered on a CUDA device, in which form, and what the report says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import device_for
from monarch_compile.linear import forms
from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.passes.linear import choose as choosing
from monarch_compile.passes.pipeline import rewrite

BLOCKS, WIDTH = 16, 256


def monarch(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """4096 features in 16 blocks; the rank is a sixteenth of the factors' rows."""
    inner = first.shape[1]
    z = torch.bmm(x.reshape(-1, BLOCKS, WIDTH).transpose(0, 1), first.mT)
    z = z.transpose(0, 1).reshape(-1, inner, BLOCKS).permute(2, 0, 1)
    return torch.bmm(z, second.mT).transpose(0, 1).reshape(x.shape[0], -1)


def _on_cuda(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    rank: int = 64,
    dtype: torch.dtype = torch.float16,
    policy: str = "auto",
    mode: str | None = "reduce-overhead",
    has_kernels: bool = True,
) -> tuple[Any, Any]:
    """The decision, and the operator's node or None, of fake tensors that are taken for those of an H100."""
    monkeypatch.setattr(choosing, "value_of", lambda node: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(forms, "has_kernels", lambda device: has_kernels)
    monkeypatch.setattr(choosing, "installed", lambda device: device_for("cuda", "NVIDIA H100 80GB HBM3"))
    with FakeTensorMode(), torch.no_grad():
        first = torch.empty(BLOCKS, BLOCKS * rank, WIDTH, dtype=dtype)
        given = (torch.empty(tokens, 4096, dtype=dtype), first, torch.empty(first.mT.shape, dtype=dtype))
        traced = make_fx(monarch, pre_dispatch=True)(*given)
        result = rewrite(traced, given, MonarchConfig(policy=policy, mode=mode))
    (decision,) = result.decisions
    nodes = [node for node in result.after.graph.nodes if node.target is LINEAR_OP]
    return decision, nodes[0] if nodes else None


def test_auto_lowers_what_pays_and_names_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    decision, node = _on_cuda(monkeypatch, 8192, rank=32)
    assert decision.code == "lowered"
    assert "it runs as staged" in decision.reason
    assert "x against the products as they are spelled" in decision.reason
    assert node.args[7] == "auto"


def test_always_asks_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    decision, node = _on_cuda(monkeypatch, 3, policy="always")
    assert decision.code == "lowered"
    assert node.args[7] == "kernels"
    assert "dense" not in decision.reason
    assert "products" not in decision.reason.partition(";")[0]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"policy": "never"}, "policy_never"),
        ({"has_kernels": False}, "no_gain"),
        ({"dtype": torch.float64}, "no_gain"),
        ({"mode": None}, "cost_exact_wins"),
    ],
)
def test_what_stays(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: str) -> None:
    decision, node = _on_cuda(monkeypatch, 4, **changes)
    assert (decision.status, decision.code) == ("exact", code)
    assert node is None
