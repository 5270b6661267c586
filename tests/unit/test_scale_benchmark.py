"""The benchmark of several GPUs: what it predicts, and what it measures, without a clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import compile_fx

from benchmarks.models.problems import TINY_DIT, TINY_VIT
from benchmarks.scale import __main__ as scale
from benchmarks.scale import measure
from benchmarks.scale.simulate import GPUS, TOKENS, Attention, best_block_size, limits, rows
from monarch_compile.attention.parallel import costs
from monarch_compile.attention.parallel.costs import METHODS, cost_of, method_of
from monarch_compile.cost.devices import DEVICES
from monarch_compile.cost.links import FABRICS, fabric_of
from monarch_compile.errors import InputError
from tests.support.ranks import RANKS, Pool, pool_of_ranks

RESULTS = Path(scale.__file__).parents[1] / "results"
H100, NVLINK = DEVICES["h100"], FABRICS["nvlink"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool_of_ranks(str(tmp_path_factory.mktemp("ranks"))) as found:
        yield found


def test_the_simulation_says_where_it_stops_scaling(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    scale.main(["--simulate", str(path)])
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())["rows"]
    assert [(row["tokens"], row["gpus"]) for row in found] == [(tokens, gpus) for tokens in TOKENS for gpus in GPUS]
    assert all(f"{tokens} tokens: at least 50% of linear up to" in printed for tokens in TOKENS)
    assert "nan" not in printed


def test_predictions_are_sound() -> None:
    found = rows(Attention(), H100, NVLINK)
    for row in found:
        assert row["total_s"] >= max(row["compute_s"], row["send_s"])
        if row["gpus"] == 1:
            assert row["send_s"] == row["sent"] == 0
            assert row["speedup"] == pytest.approx(1.0)
        else:
            assert 0 < row["speedup"] < row["gpus"]
            assert row["sent"] > 0
    by_gpus = {(row["tokens"], row["gpus"]): row for row in found}
    longest = TOKENS[-1]
    assert by_gpus[longest, 64]["speedup"] > 4 * by_gpus[TOKENS[0], 64]["speedup"]
    assert by_gpus[longest, 64]["memory"] < by_gpus[longest, 1]["memory"] / 16
    assert len(limits(found)) == len(TOKENS)


def test_summaries_send_four_numbers_a_feature() -> None:
    """By offsets: q, a and y and, back, the result, in 16 bits, and c and logsumexps; half of them to another rank."""
    tokens = 2**18
    ir = Attention().ir(tokens, 256).changed(window=None)
    cost = cost_of(ir, 2, H100, NVLINK, "offsets")
    numbers = 12 * tokens // 2
    assert cost.sent == numbers * (4 * 64 * 2 + 8) // 2


def test_heads_are_shared_only_where_they_divide() -> None:
    ir = Attention(heads=12).ir(2**16, 128)
    assert method_of(ir, 5, H100, NVLINK) == "offsets"
    with pytest.raises(InputError, match="12 and 12 heads over 5 ranks"):
        method_of(ir, 5, H100, NVLINK, "heads")
    assert method_of(ir.changed(num_iters=2), 4, H100, NVLINK) == "heads"
    with pytest.raises(InputError, match="method must be one of"):
        method_of(ir, 4, H100, NVLINK, "luck")


def test_few_key_heads_make_heads_cheaper() -> None:
    ir = Attention(heads=32).ir(2**18, 256).changed(num_kv_heads=4)
    one, other = (cost_of(ir, 4, H100, NVLINK, method) for method in METHODS)
    assert one.sent < other.sent
    assert method_of(ir, 4, H100, NVLINK) == "heads"


def test_a_fabric_sends_slower_between_hosts() -> None:
    assert NVLINK.all_to_all_s(1e9, 1) == NVLINK.send_s(1e9, 1) == 0
    assert NVLINK.all_to_all_s(1e9, 8) < NVLINK.all_to_all_s(1e9, 16)
    assert NVLINK.send_s(1e8, 8) < NVLINK.send_s(1e8, 16)
    with pytest.raises(InputError, match="fabric must be one of"):
        fabric_of("cuda", "rope")


def timed(call: Any, inputs: Any, *, graphs: bool) -> tuple[dict[str, float], Any]:
    """As `measure._timed`, without a clock."""
    assert not graphs
    return {"ms": 1.0, "memory": 1.0}, call()


def measure_without_a_clock(mesh: Any) -> dict[str, Any]:
    """A row of the measurements, on a CPU."""
    with mock.patch.object(measure, "_timed", timed):
        return measure.measured(Attention(heads=4, head_dim=8, dtype=torch.float32), 2048, mesh["own"])


def measure_a_model_without_a_clock(mesh: Any, place: int) -> dict[str, Any]:
    eager = mock.patch.object(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    with mock.patch.object(measure, "_timed", timed), eager:
        return measure.model_measured((TINY_VIT, TINY_DIT)[place], 256, mesh["own"], torch.float32)


@pytest.mark.parametrize("place", [0, 1], ids=["vit", "dit"])
def test_a_model_on_all_ranks_gives_what_it_gives_on_one(pool: Pool, place: int) -> None:
    for row in pool.run(measure_a_model_without_a_clock, place):
        assert row["shared"]["error"] < 1e-5


@pytest.mark.parametrize("name", ["scale_h200", "scale_graphs_h200"])
def test_predictions_are_near_what_two_gpus_took(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LONG_HEAD", 2**40)  # these runs took turns of two heads
    found = json.loads((RESULTS / f"{name}.json").read_text())
    for row in found["rows"]:
        for method in METHODS:
            ir = Attention(row["num_heads"], row["head_dim"]).ir(row["tokens"], row["block_size"])
            cost = cost_of(ir, found["gpus"], DEVICES["h200"], NVLINK, method)
            predicted_s = cost.total_s if found["clock"] == "graph" else cost.called_s
            assert predicted_s * 1e3 == pytest.approx(row[method]["ms"], rel=0.12)


def test_both_ways_are_right_where_they_are_measured(pool: Pool) -> None:
    found = pool.run(measure_without_a_clock)
    assert len(found) == RANKS
    for row in found:
        assert row["block_size"] == best_block_size(Attention(4, 8, torch.float32), 2048, DEVICES["cpu"])
        for method in METHODS:
            assert row[method]["error"] < 1e-5
            assert row[method]["predicted_ms"] > 0
    assert scale._cells(found[0])[0][:2] == ["2048", "one"]
