"""Attention inside one op, and of scores in grids of places: reported, never passed over; and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph

from monarch_compile.backend import rewritten
from monarch_compile.calls import launcher_of
from monarch_compile.config import MonarchConfig
from monarch_compile.errors import LoweringError
from monarch_compile.passes.attention.hidden import NAME, SEEN, hidden_attention

aten = torch.ops.aten
BATCH, HEADS, SIDE, DIM = 2, 3, 4, 8
SEQ_LEN = SIDE * SIDE


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, SEQ_LEN, DIM, generator=generator) for _ in range(3))
    return q, k, v


def custom_op(name: str, fn: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    return torch.library.custom_op(name if "::" in name else f"monarch_hidden::{name}", fn, mutates_args=mutates)


def _three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _packed(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.unbind(0))


def _into(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    out.copy_(F.scaled_dot_product_attention(q, k, v))


def _mask(mask: Tensor) -> Tensor:
    return torch.where(mask > 0, 0.0, -torch.inf)


def _rotate(q: Tensor, k: Tensor) -> Tensor:
    return q * k


OPS = {
    "my_attention": custom_op("my_attention", _three),
    "fast_sdpa": custom_op("fast_sdpa", _three),
    "flash_attn_packed": custom_op("flash_attn_qkvpacked", _packed),
    "attn_into": custom_op("attn_into", _into, ("out",)),
    "attention_mask": custom_op("attention_mask", _mask),
    "attn_rotate": custom_op("attn_rotate", _rotate),
    "blend": custom_op("blend", _three),
    "flash_attn_3::fwd": custom_op("monarch_flash_attn_3::fwd", _three),
}
for _name, _op in OPS.items():
    _op.register_fake(
        (lambda out, *rest: None)
        if _name == "attn_into"
        else (lambda x, *rest: torch.empty_like(x[0] if x.dim() > 4 else x))
    )


def _written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    OPS["attn_into"](out, q, k, v)
    return out


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return aten._scaled_dot_product_attention_math.default(q, k, v)[0]


def _flash_for_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0]


def _vitdet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Relative positions as in ViTDet and SAM: scores of (batch, rows, columns, key rows, key columns)."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    grid = q.view(-1, SIDE, SIDE, DIM)
    rel_h = torch.einsum("bhwc,hkc->bhwk", grid, k[0].view(SIDE, SIDE, DIM))
    rel_w = torch.einsum("bhwc,wkc->bhwk", grid, k[1].view(SIDE, SIDE, DIM))
    scores = (q * DIM**-0.5) @ k.transpose(-2, -1)
    scores = scores.view(-1, SIDE, SIDE, SIDE, SIDE) + rel_h[..., None] + rel_w[..., None, :]
    return scores.view(-1, SEQ_LEN, SEQ_LEN).softmax(-1) @ v


def _key_grid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).view(BATCH, HEADS, SEQ_LEN, SIDE, SIDE) + torch.ones(SIDE, 1)
    return scores.flatten(-2).softmax(-1) @ v


def _grid_of_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = (q @ k.mT).softmax(-1).view(BATCH, HEADS, SIDE, SIDE, SIDE, SIDE)
    return torch.einsum("nbhwij,nbijc->nbhwc", probs, v.view(BATCH, HEADS, SIDE, SIDE, DIM))


def _own_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.arange(SEQ_LEN).expand(BATCH, HEADS, SEQ_LEN, -1) > 12
    return aten._masked_softmax.default(q @ k.mT, hidden, -1) @ v


REPORTED: dict[str, tuple[Callable[..., Any], str]] = {
    "math": (_math, "attention_kernel"),
    "flash_for_cpu": (_flash_for_cpu, "attention_kernel"),
    "custom": (OPS["my_attention"], "custom_op"),
    "custom_of_one": (lambda q, k, v: OPS["my_attention"](q, q, q), "custom_op"),
    "custom_sdpa": (OPS["fast_sdpa"], "custom_op"),
    "custom_packed": (lambda q, k, v: OPS["flash_attn_packed"](torch.stack([q, k, v])), "custom_op"),
    "custom_written": (_written, "custom_op"),
    "vitdet": (_vitdet, "scores_view"),
    "key_grid": (_key_grid, "scores_op"),
    "grid_of_probabilities": (_grid_of_probabilities, "probs_op"),
    "own_mask": (_own_mask, "normalisation"),
    "distances": (lambda q, k, v: (-torch.cdist(q, k)).softmax(-1) @ v, "scores_layout"),
    "cosines": (
        lambda q, k, v: F.cosine_similarity(q[..., None, :], k[:, :, None], -1).softmax(-1) @ v,
        "scores_layout",
    ),
    "namespace": (lambda q, k, v: OPS["flash_attn_3::fwd"](q, k, v), "custom_op"),
}


def _spatial_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keypoints of feature maps: the mean place under a softmax over an image."""
    maps = F.relu(F.conv2d(q, torch.ones(5, HEADS, 3, 3), padding=1))
    places = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(8.0), indexing="ij"), -1).view(-1, 2)
    return maps.flatten(2).softmax(-1) @ places


def _spatial_softmax_of_a_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    maps = F.relu(q @ k.mT)
    return maps.flatten(2).softmax(-1).view_as(maps) @ v


def _experts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gates of a mixture of experts, whose outputs are weighed by them."""
    gates = F.linear(q, torch.ones(SIDE, DIM)).softmax(-1)
    return (gates[..., None] * torch.stack([v * n for n in range(SIDE)], -2)).sum(-2)


def _classes_on_a_grid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = F.linear(q, torch.ones(SEQ_LEN, DIM)).view(BATCH, HEADS, SIDE, SIDE, SEQ_LEN)
    return (logits + 1).view(BATCH, HEADS, SEQ_LEN, SEQ_LEN).softmax(-1).amax(-1)


def _pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = q.sum(-1).view(BATCH, HEADS, SIDE, SIDE).flatten(2).softmax(-1)
    return (weights[..., None] * v).sum(-2)


class Weighted(nn.Module):
    """Products with weights that are no layer's: (features, codes) and (codes, features), or a table of queries."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.a, self.b = (nn.Parameter(torch.ones(shape)) for shape in ((DIM, SEQ_LEN), (SEQ_LEN, DIM)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.fn(self, q, k, v)
        return out


def _gated_experts(self: Weighted, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gates = (q @ self.a[:, :SIDE]).softmax(-1)
    return torch.einsum("bhne,bhned->bhnd", gates, torch.stack([v * n for n in range(SIDE)], -2))


LEARNED_QUERIES = {
    "before": Weighted(lambda self, q, k, v: (self.b @ k.mT).softmax(-1) @ v),
    "after": Weighted(lambda self, q, k, v: (k @ self.a).mT.softmax(-1) @ v),
    "over_rows": Weighted(lambda self, q, k, v: (k @ self.a[:, :SIDE]).softmax(-2).mT @ v),
    "layer": Weighted(lambda self, q, k, v: ((self.b @ self.a[:, :DIM]) @ k.mT).softmax(-1) @ v),
}

NO_ATTENTION: dict[str, Callable[..., Any]] = {
    "codes": Weighted(lambda self, q, k, v: (q @ self.a).softmax(-1) @ self.b),
    "codes_as_rows": Weighted(lambda self, q, k, v: (q @ self.b.mT).softmax(-1) @ self.b),
    "codes_by_einsum": Weighted(
        lambda self, q, k, v: torch.einsum(
            "bhnm,md->bhnd", torch.einsum("bhnd,dm->bhnm", q, self.a).softmax(-1), self.b
        )
    ),
    "synthesizer": Weighted(lambda self, q, k, v: (q @ self.a).softmax(-1) @ v),
    "gated_experts": Weighted(_gated_experts),
    "mask_op": lambda q, k, v: OPS["attention_mask"](q),
    "rotation_op": lambda q, k, v: OPS["attn_rotate"](q, k),
    "other_op": OPS["blend"],
    "spatial_softmax": _spatial_softmax,
    "spatial_softmax_of_a_product": _spatial_softmax_of_a_product,
    "experts": _experts,
    "classes_on_a_grid": _classes_on_a_grid,
    "pooled": _pooled,
}


@torch.no_grad()
@pytest.mark.parametrize("name", REPORTED)
def test_it_is_reported(name: str) -> None:
    fn, code = REPORTED[name]
    (decision,) = decisions_of(fn, *given())
    assert (decision.status, decision.code) == ("exact", code), decision
    assert decision.reason
    assert decision.remedy
    assert decision.device == "cpu"


@torch.no_grad()
@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_none_is_not(name: str) -> None:
    assert decisions_of(NO_ATTENTION[name], *given()) == []


@torch.no_grad()
@pytest.mark.parametrize("name", LEARNED_QUERIES)
def test_learned_queries_are_attention(name: str) -> None:
    assert len(decisions_of(LEARNED_QUERIES[name], *given())) == 1


def kernels() -> list[OpOverload]:
    """Every op of torch that is named after attention, those of devices that are not here included."""
    names = torch._C._dispatch_get_all_op_names()
    found = sorted({n.partition(".")[0] for n in names if n.startswith("aten::") and NAME.search(n)})
    packets = [getattr(aten, name.removeprefix("aten::")) for name in found if "backward" not in name]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def test_every_kernel_of_torch_is_known() -> None:
    assert len(kernels()) >= 10
    for target in kernels():
        graph, value = Graph(), torch.empty(2, 3, 4, 8, device="meta")
        tensors = [graph.placeholder(a.name) for a in target._schema.arguments if str(a.type) == "Tensor"]
        node = graph.call_function(target, tuple(tensors))
        for made in (*tensors, node):
            made.meta["val"] = value
        assert (hidden_attention(node) is not None) == (target not in SEEN), target


@torch.no_grad()
def test_strict_mode_refuses_it() -> None:
    def strict(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return rewritten(gm, example_inputs, MonarchConfig(strict=True), launcher_of())

    for fn in (REPORTED["vitdet"][0], _math, OPS["my_attention"]):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="strict=True and 1 attention site cannot be lowered") as raised:
            torch.compile(fn, backend=strict, fullgraph=True)(*given())
        assert isinstance(raised.value.__cause__ or raised.value.inner_exception, LoweringError)
