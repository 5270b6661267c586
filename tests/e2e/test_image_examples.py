"""The demo's part on images: the picture, packages that are missing, the real DINOv2 where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the examples need transformers")
pytest.importorskip("PIL", reason="photographs need pillow")

from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from examples import demo
from examples.images import demo as images
from examples.images.picture import GAP, HEAD, SIZE, read_square, sheet, titled, write_picture
from examples.packages import PackagesMissing, installed_file
from examples.setting import EXACT, Setting


def missing(name: str):
    def run(*_):
        raise PackagesMissing(f"no {name} here")

    return run


def test_a_file_of_an_installed_package_is_found():
    assert "numpy" in str(installed_file("numpy", "numpy/__init__.py"))
    with pytest.raises(PackagesMissing, match=r"no-such-package is not installed: run 'pip install"):
        installed_file("no-such-package", "a.jpg")
    with pytest.raises(PackagesMissing, match=r"package numpy has no a\.jpg"):
        installed_file("numpy", "a.jpg")


def test_a_part_without_its_packages_leaves_the_others(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(demo, "whisper_part", missing("Whisper"))
    monkeypatch.setattr(images, "images_part", missing("photograph"))
    monkeypatch.setattr(demo, "attention_part", ran.append)
    assert demo.main(["--device", "cpu"]) == 2
    assert ran == [torch.device("cpu")]
    out = capsys.readouterr().out
    assert "whisper: no Whisper here" in out
    assert "images: no photograph here" in out
    assert demo.main(["--device", "cpu", "--part", "attention"]) == 0


def test_pillow_is_asked_for(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(PackagesMissing, match="pip install pillow"):
        images.images_part(torch.device("cpu"), tmp_path / "x.png")


def test_settings_are_told_by_their_options():
    assert EXACT.spelled == "-"
    assert Setting("x", {"grid": None, "prefix": 1}).spelled == "grid=None, prefix=1"
    assert [setting.options for setting in images.SETTINGS][:2] == [None, {"policy": "auto"}]


def photograph_file(path: Path) -> Path:
    """Dark on the left, light on the right; wider than it is high."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = 200
    Image.fromarray(pixels).save(path)
    return path


def test_the_middle_of_a_photograph_is_read(tmp_path: Path):
    square = read_square(photograph_file(tmp_path / "a.png"), 20)
    assert square.shape == (3, 20, 20)
    assert square[:, :, :9].max() < 0.1 < 0.7 < square[:, :, 11:].min()


def test_a_picture_has_titles_over_its_columns(tmp_path: Path):
    page = sheet([[torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]])
    write_picture(titled(page, ["one", "two"]), tmp_path / "folder" / "x.png")
    found = np.asarray(Image.open(tmp_path / "folder" / "x.png").convert("RGB"))
    assert found.shape == (SIZE + HEAD, 2 * SIZE + GAP, 3)
    assert found[HEAD:, :SIZE].max() == 0
    for column in (slice(SIZE), slice(SIZE, None)):
        assert found[:HEAD, column].min() < 128, "no title"


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_part_compares_features_and_saves_them(monkeypatch, tmp_path: Path, capsys, is_broken: bool):
    config = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14, "image_size": 56}
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**config)).eval()
    monkeypatch.setattr(images, "read_dinov2", lambda path: model)
    monkeypatch.setattr(images, "installed_file", lambda *_: photograph_file(tmp_path / "a.png"))
    monkeypatch.setattr(images, "SIDE", 4)
    broken = lambda run: lambda x: run(x) + is_broken  # noqa: E731
    monkeypatch.setattr(Setting, "compile", lambda self, run: run if self.options is None else broken(run))
    with torch.no_grad():
        images.images_part(torch.device("cpu"), tmp_path / "x.png")
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith(("inductor  ", "monarch  "))]
    changes = [line[-4] for line in lines]
    assert changes[0] == "0.000"
    assert (changes[1] == "0.000") is not is_broken
    assert "2 attention sites, the first: a grid of 4 x 4 tokens after 1 token" in out
    width = Image.open(tmp_path / "x.png").width
    assert width == 4 * (SIZE + GAP) - GAP
