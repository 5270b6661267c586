"""Models on images and videos in the benchmark of whole models: the compiler must find their grids by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.models.architectures import Described, num_tokens
from benchmarks.models.found import grouped, in_words
from benchmarks.models.measure import Prepared
from benchmarks.models.present import markdown
from benchmarks.models.problems import DINO_L, FLUX, PRESETS, TINY_IMAGES, TINY_VIT, WAN, FoundForm, on_grid
from benchmarks.models.rotary import grid_positions, rotary_table, rotated
from monarch_compile.attention.lengths import exact_wins
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.calibration.instrument import with_attention
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.cost.devices import DEVICES
from monarch_compile.report.explainer import explain
from monarch_compile.tools import cli

NAMES = [architecture.name for architecture in TINY_IMAGES]


@pytest.fixture(params=TINY_IMAGES, ids=NAMES)
def architecture(request: pytest.FixtureRequest) -> Described:
    return request.param


def sites_of(architecture: Described, batch: int = 1) -> tuple[dict, ...]:
    torch._dynamo.reset()
    given = architecture.inputs(batch, num_tokens(architecture), "cpu", torch.float32)
    with torch.no_grad():
        report = explain(architecture.model("cpu", torch.float32), *given, options={"policy": "always"})
    return grouped(report.sites)


def test_every_layer_is_lowered_on_the_grid_that_is_found(architecture: Described) -> None:
    lowered, *others = sites_of(architecture, batch=2)
    assert (lowered["number"], lowered["status"]) == (architecture.depth, "lowered")
    assert (lowered["prefix"], lowered["grid"]) == (architecture.prefix, architecture.grid)
    assert len(lowered["tile"]) == len(architecture.grid)
    assert [(group["number"], group["code"]) for group in others] == (
        [(architecture.depth, "cross_attention")] if architecture.name.startswith("wan") else []
    )


def test_an_attention_that_is_broken_shows_in_the_error(architecture: Described) -> None:
    prepared = Prepared.of(on_grid(architecture, 1, "float32"), "cpu")

    def error(attention) -> float:
        torch._dynamo.reset()
        with torch.no_grad():
            found = with_attention(prepared.model, attention, {"policy": "always"})(*prepared.inputs)
        return relative_error(prepared.reference, found)

    assert error(AttentionCall.exact) < 1e-5
    assert 1e-4 < error(AttentionCall.monarch) < error(lambda call: torch.zeros_like(call.exact()))


def test_what_is_measured() -> None:
    preset = PRESETS["images"]
    assert [str(problem) for problem in preset.problems] == [
        *("dinov2-s 1x4097", "dinov2-s 4x4097", "dinov2-l 1x4097", "dinov2-l 4x4097"),
        *("dit-xl/2 1x4096", "flux-6 1x4608", "wan-4 1x32760"),
    ]
    heads = {p.architecture.name: (p.architecture.num_heads, p.architecture.head_dim) for p in preset.problems}
    assert list(heads.values()) == [(6, 64), (16, 64), (16, 72), (24, 128), (12, 128)]
    for architecture in (FLUX, WAN):
        assert sum(architecture.rotary_dims) == architecture.head_dim
    assert PRESETS["tiny-images"].problems[0].architecture is TINY_IMAGES[0]


def test_attention_alone_has_the_form_that_the_compiler_finds(architecture: Described) -> None:
    ir = FoundForm("auto").ir(on_grid(architecture, 1, "float32"), DEVICES["cpu"])
    lowered = sites_of(architecture)[0]
    assert (ir.grid, ir.form.prefix, ir.form.tile) == (lowered["grid"], lowered["prefix"], lowered["tile"])
    assert (ir.form.window, ir.seq_len_q) == (lowered["window"], num_tokens(architecture))


@pytest.mark.parametrize(("side", "pays"), [(32, False), (48, False), (64, True), (128, True)])
def test_a_text_of_512_tokens_is_worth_its_price_from_large_images_on(side: int, pays: bool) -> None:
    ir = FoundForm("auto").ir(on_grid(replace(FLUX, grid=(side, side)), 1), DEVICES["h100"])
    assert ir.form.prefix == 512
    assert (exact_wins(ir, DEVICES["h100"], auto=True, batch=1, seq_len=ir.seq_len_k) is None) is pays


def test_inputs_of_another_number_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="dinov2-l has 4097 tokens, its prefix among them; found 4096"):
        DINO_L.inputs(1, 4096, "cpu", torch.float32)
    with pytest.raises(ValueError, match="vit-tiny has no grid"):
        num_tokens(TINY_VIT)


def test_latents_are_packed_in_patches_and_unpacked() -> None:
    model = next(a for a in TINY_IMAGES if a.name == "flux-tiny").model("cpu", torch.float32)
    latents = torch.randn(2, 16, 16, 16)
    packed = model._packed(latents)
    assert torch.equal(packed[:, 9].reshape(2, 16, 2, 2), latents[:, :, 2:4, 2:4])  # the second of the second row
    assert torch.equal(model._unpacked(packed), latents)


def test_rotation_depends_on_the_steps_between_tokens_alone() -> None:
    table = rotary_table(grid_positions(1, (3, 4), torch.device("cpu")), (4, 6))
    q, k = torch.randn(2, 1, 1, 1, 10)
    turned_q, turned_k = (rotated(x.expand(1, 1, 13, 10), table)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[0, 0], q.flatten() @ k.flatten())
    at = lambda y, x: 1 + 4 * y + x  # noqa: E731
    torch.testing.assert_close(scores[at(0, 1), at(1, 3)], scores[at(1, 0), at(2, 2)])
    assert abs(scores[at(0, 1), at(1, 3)] - scores[at(0, 1), at(2, 2)]) > 1e-3


def test_the_grid_reaches_the_results_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.models.measure._compiled", lambda model, _: lambda: model.model(*model.inputs))
    monkeypatch.setattr("benchmarks.models.measure._alone", lambda *_: (1.0, {}))
    arguments = ["--preset", "tiny-images", "--rep", "1", "--output", "x.json"]
    rows = ["flux-tiny 1x71 monarch", "wan-tiny 1x96 monarch always"]
    assert cli.main(["bench", "models", *arguments, "--rows", *rows]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["monarch auto", "monarch always", "monarch always"]
    assert [[(g["grid"], g["prefix"], g["status"]) for g in row["found"]] for row in rows] == [
        [([8, 8], 7, "exact")],
        [([8, 8], 7, "lowered")],
        [([4, 4, 6], 0, "lowered"), (None, None, "exact")],
    ]
    table = (tmp_path / "x.md").read_text()
    assert "| 2 x lowered: 1x2x71x16, grid 8 x 8 after 7, tiles 4 x 4, window 1 plus |" in table
    assert "| 2 x exact (cross_attention): 1x2x96x16 on 7 |" in table


def test_files_without_what_was_found_are_still_shown() -> None:
    problem = {"architecture": {"name": "vit", "depth": 1}, "batch": 1, "tokens": 8}
    row = {"problem": problem, "form": "exact sdpa", "times": {}, "failures": {}, "attention_ms": 1.0}
    text = markdown({"environment": {"gpu": "some GPU"}, "rows": [row]})
    assert "What the compiler found" not in text


def test_a_sequence_is_told_as_pieces() -> None:
    torch._dynamo.reset()
    given = TINY_VIT.inputs(1, 96, "cpu", torch.float32)
    with torch.no_grad():
        report = explain(TINY_VIT.model("cpu", torch.float32), *given, options={"policy": "always"})
    (group,) = grouped(report.sites)
    assert in_words(group) == "2 x lowered: 1x2x96x32, no grid, pieces of 16, window 1"
    assert "an argument" in group["blocking"]
    assert grouped([replace(site, code="other") for site in report.sites])[0]["number"] == 2
