"""What block linears cost, counted and predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from monarch_compile.cost.devices import DEVICES
from monarch_compile.errors import InputError
from monarch_compile.linear.ir import BLAST, KINDS, MONARCH, BlockLinear
from monarch_compile.linear.work import cost, dense_cost, predict, spelled_cost, times

HALF = torch.float16


def layer(kind: str, tokens: Any, rank: int = 64, **changes: Any) -> BlockLinear:
    """4096 x 4096 in 16 blocks; Monarch of rank 64 has half of the parameters."""
    sizes: dict[str, Any] = {"in_features": 4096, "out_features": 4096, "in_blocks": 16, "out_blocks": 16}
    return BlockLinear(kind=kind, tokens=tokens, rank=rank, dtype=HALF, **{**sizes, **changes})


def test_a_small_layer_is_counted_by_hand() -> None:
    ir = BlockLinear(MONARCH, 5, 8, 12, 2, 4, 3, torch.float32, bias=True)
    assert ir.parameters == 2 * 4 * 3 * 4 + 4 * 3 * 2 * 3
    assert ir.inner == 2 * 4 * 3
    assert cost(ir).flops == 2 * 5 * ir.parameters
    assert cost(ir).bytes == 4 * (5 * (8 + 12) + ir.parameters + 12)
    assert spelled_cost(ir).bytes == 4 * (5 * (8 + 4 * 24 + 3 * 12) + ir.parameters + 12)
    assert (dense_cost(ir).flops, dense_cost(ir).bytes) == (2 * 5 * 96, 4 * (5 * 20 + 96 + 12))
    blast = BlockLinear(BLAST, 5, 8, 12, 2, 4, 3, torch.float32)
    assert blast.parameters == 3 * (8 + 12 + 8)
    assert spelled_cost(blast).bytes == 4 * (5 * (8 + (1 + 4) * 6 + 2 * 12 + 36) + blast.parameters)


def test_symbolic_tokens_stay_symbols() -> None:
    found = cost(layer(MONARCH, "s0"))
    assert found.flops.subs("s0", 7) == cost(layer(MONARCH, 7)).flops
    with pytest.raises(InputError, match="s0"):
        times(layer(MONARCH, "s0"), DEVICES["h100"])
    assert times(layer(MONARCH, "s0"), DEVICES["h100"], {"s0": 7}) == times(layer(MONARCH, 7), DEVICES["h100"])


@pytest.mark.parametrize("device", ["h100", "h200", "cuda", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_gains_nothing_as_long_as_it_runs_the_same_products(kind: str, device: str) -> None:
    prediction = predict(layer(kind, 256), DEVICES[device])
    assert prediction.speedup == 1.0
    assert not prediction.pays
    assert prediction.exact_s > 0


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_two_products_lose_against_dense_with_many_tokens_and_blast_by_far(device: str) -> None:
    monarch, blast = (times(layer(kind, 8192, rank), DEVICES[device]) for kind, rank in ((MONARCH, 64), (BLAST, 1024)))
    assert 0.5 < monarch.speedup < 1.0
    assert blast.speedup < 0.5
    assert monarch.dense_s == blast.dense_s


def test_few_parameters_win_where_the_weight_is_what_is_read() -> None:
    ir = replace(layer(MONARCH, 1), rank=4)
    assert times(ir, DEVICES["h100"]).speedup > 1.0
    assert times(ir, DEVICES["cpu"]).speedup > 8
