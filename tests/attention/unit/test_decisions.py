"""Policy "auto" against what was measured: the form that the cost model chooses is the faster one, or nearly so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks.speed.problems import AutoForm, Problem
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import auto_block_size, exact_wins
from monarch_compile.attention.work import predict
from monarch_compile.cost.devices import Device, device_for

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
CLOSE = 1.1
"""A choice may lose this factor against the other form."""
FORMS = {"monarch": Form(1), "window": Form(1, window=1), "prefix": Form(1, window=1, prefix=4)}
EXACT = ("cudnn", "flash")


@dataclass(frozen=True)
class Measured:
    """One row: what was attended to how, with which block size, and the median ms of exact and of Monarch attention."""

    gpu: str
    ir: MonarchAttention
    exact_ms: float
    monarch_ms: float

    def __str__(self) -> str:
        groups = self.ir.form
        more = "" if self.ir.form.num_iters == 1 else f"-t{self.ir.form.num_iters}"
        return f"{self.ir.batch}x{self.ir.seq_len_k}-w{groups.window}p{groups.prefix}{more}"


def recorded() -> list[Measured]:
    """Every row of every committed GPU table, each Monarch form of it."""
    return [*_first_table(), *(m for path in sorted(RESULTS.glob("speed_*.json")) for m in _verdicts(path))]


def _verdicts(path: Path) -> Iterator[Measured]:
    """What `monarch-compile bench speed` wrote on a GPU that the cost model describes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    gpu = content["environment"].get("gpu")
    if gpu is None or device_for("cuda", gpu).ceiling is None:
        return
    for verdict in content["verdicts"]:
        if verdict["is_right"] is not None:
            ir = AutoForm(**verdict["form"]).ir(Problem(**verdict["problem"]), device_for("cuda", gpu))
            yield Measured(gpu, ir, verdict["exact_ms"], verdict["monarch_ms"])


def _first_table() -> list[Measured]:
    content = json.loads((RESULTS / "h200_attention.json").read_text(encoding="utf-8"))
    gpu, dtype, dim = content["environment"]["gpu"], getattr(torch, content["dtype"]), content["head_dim"]
    found = []
    for row in content["rows"]:
        batch, seq_len = row["batch"], row["seq_len"]
        for name, form in FORMS.items():
            block = auto_block_size(seq_len, "cuda", form.window, form.prefix)
            sizes = batch, 12, 12, seq_len, seq_len, dim, dim
            ir = MonarchAttention(*sizes, dtype, replace(form, block_size=block), dim**-0.5)
            found.append(Measured(gpu, ir, min(row[exact][1] for exact in EXACT), row[name][1]))
    return found


def chooses_well(measured: Measured, device: Device) -> bool:
    chosen, other = measured.exact_ms, measured.monarch_ms
    ir = measured.ir
    if exact_wins(ir, device, auto=True, batch=ir.batch, seq_len=ir.seq_len_k) is None:
        chosen, other = other, chosen
    return chosen <= CLOSE * other


@pytest.mark.parametrize("measured", recorded(), ids=str)
def test_auto_takes_the_form_that_was_measured_faster(measured: Measured) -> None:
    device = device_for("cuda", measured.gpu)
    prediction = predict(measured.ir, device)
    predicted = f"predicted {prediction.exact_s * 1e3:.4f} against {prediction.monarch_s * 1e3:.4f} ms"
    assert chooses_well(measured, device), f"{predicted}; measured {measured.exact_ms} against {measured.monarch_ms} ms"


def test_the_table_has_rows_that_either_form_wins() -> None:
    """Else a cost model that always says the same would pass."""
    gains = [m.exact_ms / m.monarch_ms for m in recorded()]
    assert min(gains) < 1 / CLOSE
    assert max(gains) > CLOSE


def test_block_sizes_are_those_that_were_measured() -> None:
    content = json.loads((RESULTS / "h200_attention.json").read_text(encoding="utf-8"))
    found = ((m.ir, m.ir.form) for m in _first_table())
    chosen = {(ir.batch, ir.seq_len_k, replace(form, block_size=1)): form.block_size for ir, form in found}
    for row in content["rows"]:
        shape = row["batch"], row["seq_len"]
        assert chosen[(*shape, FORMS["monarch"])] == row["block_size"]
        assert chosen[(*shape, FORMS["window"])] == row["window_block_size"]
