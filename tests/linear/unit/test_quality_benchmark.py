"""The benchmark of compressed models: rows that say what they are, equal parameters, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.linear import quality
from benchmarks.linear.pretrained import Pretrained


def tiny() -> Pretrained:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    mixing = torch.linspace(0.02, 1, 16) * torch.randn(16, 16)
    inputs = torch.randn(60, 5, 16) @ mixing
    calls = [((part,), {}) for part in inputs.split(10)]
    return Pretrained(model, calls[:4], calls[4:], 40, 20, "random numbers")


METHODS = ["low rank", "low rank, data-aware", "monarch", "monarch, data-aware", "monarch, retrained"]


def test_rows_are_measured_once_and_told_beside_plain_low_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "MODELS", {"tiny": tiny})
    path = tmp_path / "found.json"
    quality.run(["tiny"], [0.5], METHODS[:2], 3, path)
    content = quality.run(["tiny"], [0.5], METHODS, 3, path)
    assert [row["method"] for row in content["rows"]] == METHODS
    errors = {row["method"]: row["error"] for row in content["rows"]}
    assert errors["low rank, data-aware"] < errors["low rank"]
    assert errors["monarch, retrained"] < errors["monarch"]
    assert [row["steps"] for row in content["rows"]] == [0, 0, 0, 0, 3]
    assert capsys.readouterr().out.count("low rank: error") == 1
    table = quality.markdown(content["rows"])
    assert "### tiny: random numbers; fitted on 40, judged on 20" in table
    assert f"| low rank | {errors['low rank']:.3f} (1.00) |" in table


def test_low_rank_keeps_the_share_that_it_is_given() -> None:
    pretrained = tiny()
    for with_calls in (False, True):
        model = quality.low_rank(pretrained, 0.5, with_calls=with_calls)
        for layer in (model[0], model[2]):  # type: ignore[index]
            rank = int(torch.linalg.matrix_rank(layer.weight, rtol=1e-5))
            assert rank == 5
            assert rank * (16 + 32) <= 0.5 * 16 * 32


def test_rows_of_another_number_of_steps_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MODELS", {"tiny": tiny})
    path = tmp_path / "found.json"
    for steps in (2, 3):
        content = quality.run(["tiny"], [0.5], ["monarch", "monarch, retrained"], steps, path)
    assert [(row["method"], row["steps"]) for row in content["rows"]] == [("monarch", 0), ("monarch, retrained", 3)]


def test_low_rank_of_a_layer_that_no_call_reaches_is_that_of_its_weight() -> None:
    pretrained = tiny()
    pretrained.model.add_module("3", nn.Linear(16, 16))
    pretrained.model.forward = lambda x: pretrained.model[0](x)  # type: ignore[index,method-assign]
    found, plain = (quality.low_rank(pretrained, 0.5, with_calls=with_calls) for with_calls in (True, False))
    assert torch.equal(found[3].weight, plain[3].weight)  # type: ignore[index]
