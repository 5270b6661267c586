"""The quality benchmark on images: weights from ONNX, warps, matches of patches, the picture, the driver's variants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the benchmark's tasks need transformers")

from benchmarks.quality import __main__ as driver
from benchmarks.quality import chosen, dinov2, photographs, stamps, warps
from benchmarks.quality.results import own_digest
from benchmarks.quality.task import TASKS, TaskUnavailable
from benchmarks.quality.variants import VARIANTS
from examples.images import picture
from examples.images.onnx_weights import read_onnx
from monarch_compile.attention.reference import reference


def varint(value: int) -> bytes:
    high, low = divmod(value, 128)
    return bytes([low + 128]) + varint(high) if high else bytes([low])


def message(field: int, content: bytes | str | int) -> bytes:
    """A field of protobuf: an integer, or bytes with their length."""
    if isinstance(content, int):
        return varint(field << 3) + varint(content)
    data = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor_message(name: str, x: np.ndarray, packed: bool, kind: int = 1) -> bytes:
    dims = message(1, b"".join(map(varint, x.shape))) if packed else b"".join(message(1, n) for n in x.shape)
    return dims + message(2, kind) + message(8, name) + message(9, x.tobytes())


@pytest.mark.parametrize("packed", [False, True])
def test_an_onnx_file_gives_its_float_tensors_and_what_products_use_them(tmp_path, packed):
    weight = np.arange(300, dtype="<f4").reshape(150, 2)
    node = (
        message(1, "x")
        + message(1, "onnx::MatMul_7")
        + message(2, "y")
        + message(3, "/fc/MatMul")
        + message(4, "MatMul")
    )
    fixed = varint(9 << 3 | 5) + b"abcd" + varint(10 << 3 | 1) + b"abcdefgh"  # fields of fixed size are stepped over
    graph = fixed + message(1, node) + message(5, tensor_message("onnx::MatMul_7", weight, packed))
    graph += message(5, tensor_message("shape", np.array([1], dtype="<i8"), packed, kind=7))
    (tmp_path / "model.onnx").write_bytes(message(1, 8) + message(7, graph))
    found = read_onnx(tmp_path / "model.onnx")
    assert list(found.tensors) == ["onnx::MatMul_7"]
    assert torch.equal(found.product("/fc/MatMul"), torch.from_numpy(weight.T.copy()))
    assert [(node.op, node.inputs) for node in found.nodes] == [("MatMul", ("x", "onnx::MatMul_7"))]


def test_what_is_no_protobuf_is_told(tmp_path):
    (tmp_path / "model.onnx").write_bytes(varint(7 << 3 | 3))
    with pytest.raises(ValueError, match="wire type 3"):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("seed", range(8))
def test_a_copy_without_borders_shows_the_inside_of_a_photograph(seed):
    warp = warps.inner_homography(60, 80, seed)
    corners = torch.tensor([[0.0, 0.0], [80.0, 0.0], [80.0, 60.0], [0.0, 60.0]])
    inside = warps.project(corners, warp.inverse())
    assert (inside > 0).all()
    assert (inside < torch.tensor([80.0, 60.0])).all()
    copy = warps.warped(torch.ones(1, 60, 80), warp)
    assert copy.min() > 0.999
    assert (inside - corners).norm(dim=-1).min() > 5  # and it is no mere copy


def test_a_patch_of_a_copy_is_where_the_truth_says():
    side = 10
    image = torch.zeros(1, side * dinov2.PATCH, side * dinov2.PATCH)
    image[0, 6 * dinov2.PATCH : 7 * dinov2.PATCH, 4 * dinov2.PATCH : 5 * dinov2.PATCH] = 1  # the patch at (4, 6)
    warp = warps.inner_homography(*image.shape[1:], seed=3)
    brightness = nn.functional.avg_pool2d(warps.warped(image, warp)[None], dinov2.PATCH)[0, 0].flatten()
    place = dinov2.patches_of_copy(side, warp)[brightness.argmax()]
    assert (place - torch.tensor([4, 6])).abs().max() < 1


def test_patches_match_at_the_truth_and_nowhere_else():
    photograph = torch.eye(16)
    places = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], -1).double()
    assert dinov2.matched(photograph, photograph, places) == 1
    assert dinov2.matched(photograph.flip(0), photograph, places.flip(0)) == 1
    assert dinov2.matched(photograph, photograph, places + 2) == 0
    other = photograph.clone()
    other[0] = photograph[15]
    assert dinov2.matched(other, photograph, places) == pytest.approx(15 / 16)


class Shifted(nn.Module):
    """Features of the images' own pixels: the class token's, then 16 patches'; `shift` is added to the patches'."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, images):
        patches = nn.functional.unfold(images, dinov2.PATCH, stride=dinov2.PATCH).mT
        return torch.cat([patches[:, :1], patches + self.shift], 1)


def test_the_judge_tells_an_exact_model_from_another():
    image = torch.rand(3, 4 * dinov2.PATCH, 4 * dinov2.PATCH, generator=torch.Generator().manual_seed(0))
    judge = dinov2.Judge(Shifted(), [dinov2.make_view(image, seed=0)])
    exact, other = judge.evaluate(Shifted()), judge.evaluate(Shifted(0.5))
    assert (exact["patch_error"], exact["cosine"], exact["class_error"]) == (0, 1, 0)
    assert other["patch_error"] > 0.1
    assert other["cosine"] < 1
    assert other["class_error"] == 0


def test_neighbours_label_what_is_like_them():
    labels = torch.arange(8) // 4
    features = nn.functional.one_hot(labels, 8).float() + 0.1 * torch.eye(8)
    assert stamps.labelled_rightly(features, labels, 3) == 1
    assert stamps.labelled_rightly(features, torch.arange(8), 3) == 0
    moved = features.clone()
    moved[0] = features[5]
    assert stamps.labelled_rightly(moved, labels, 3) == pytest.approx(7 / 8)
    ties = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])  # one vote for each of two: the more similar counts
    assert stamps.labelled_rightly(ties, torch.tensor([0, 0, 1]), 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("labels", "expected"), [([0] * 6 + [1] * 6, 1), ([0, 1] * 6, 0)])
def test_stamps_are_judged_by_their_features(labels, expected):
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.rand(3, 2 * dinov2.PATCH, 2 * dinov2.PATCH, generator=generator) for _ in range(2)]
    images = [(kind + n / 50)[None] for kind in kinds for n in range(6)]
    judge = stamps.Judge(Shifted(), [stamps.Labelled(x, label) for x, label in zip(images, labels, strict=True)])
    assert judge.evaluate(Shifted()) == {"class_knn": expected, "patches_knn": expected, "class_error": 0}


def test_missing_stamps_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(stamps, "STAMPS", tmp_path)
    with pytest.raises(TaskUnavailable, match="apt-get install tuxpaint-stamps-default"):
        stamps.load()
    assert not set(stamps.KINDS) & set(stamps.CALIBRATION)


def test_a_picture_is_whole_and_on_white(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGBA", (4, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 8), (255, 0, 0, 255)).save(tmp_path / "red.png")
    assert (picture.read_on_white(tmp_path / "clear.png", 16) == 1).all()
    red = picture.read_on_white(tmp_path / "red.png", 16)
    assert (red[:, :, :4] == 1).all()
    assert red[:, :, 8].mean(1).tolist() == [1, 0, 0]


@pytest.mark.parametrize(("window", "shape"), [(0, "box"), (1, "plus"), (1, "box")])
def test_the_emulation_without_chosen_blocks_is_the_reference(window, shape):
    q, k, v = (torch.randn(1, 2, 36, 8, dtype=torch.float64) for _ in range(3))
    place = {"scale": 0.3, "prefix": 1, "grid": (5, 7)}
    found = chosen.attention(q, k, v, chosen.Chosen(2, window, shape), **place)
    form = {"block_size": 4, "tile": (2, 2), "window": window, "window_shape": shape}
    torch.testing.assert_close(found, reference(q, k, v, **form, **place), rtol=1e-10, atol=1e-10)
    every = chosen.attention(q, k, v, chosen.Chosen(2, window, shape, 99), **place)
    exact = (0.3 * q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(every, exact, rtol=1e-10, atol=1e-10)
    some = chosen.attention(q, k, v, chosen.Chosen(2, window, shape, 4), **place)
    assert (some - exact).norm() < (found - exact).norm()


def test_no_photograph_is_calibrated_on_and_judged_by():
    assert not {*photographs.WALLPAPERS, *photographs.SCENES} & set(photographs.CALIBRATION)
    assert min(len(set(group)) for group in (photographs.WALLPAPERS, photographs.SCENES)) >= 6
    packages = {photograph.package for photograph in photographs.SCENES + photographs.CALIBRATION}
    assert packages | {dinov2.WEIGHTS[0]} == set(TASKS["dinov2_1370"].packages)


def test_a_missing_photograph_of_debian_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "BACKGROUNDS", tmp_path)
    with pytest.raises(TaskUnavailable, match="apt-get install lomiri-wallpapers"):
        photographs.read_photograph(photographs.WALLPAPERS[0], 8)


def test_forms_of_tiles_are_for_tasks_on_a_grid_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(driver.Results, "finished", lambda self, task, variant, options: asked.append(variant) or True)
    results = driver.Results(driver.RESULTS / "none.json", {})
    for name in ("minilm", "dinov2_4097"):
        assert driver._run_task(name, VARIANTS, results, None)
    either = [variant for variant in VARIANTS if not variant.causal]
    first, second = asked[: -len(either)], asked[-len(either) :]
    assert second == [variant.name for variant in either]
    assert first == [variant.name for variant in either if not variant.on_grid]
    assert "default" not in first


def test_lengths_of_one_task_share_its_source_and_other_tasks_do_not():
    assert own_digest("dinov2_1370") == own_digest("dinov2_4097") != own_digest("minilm")


def test_components_are_the_largest_and_in_the_same_colours_for_others():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(64, 8, generator=generator) * torch.tensor([9.0, 1, 5, 1, 1, 3, 1, 1])
    basis = picture.components(reference)
    assert basis[1].abs().argmax(0).tolist() == [0, 2, 5]
    image = picture.colours(reference, basis)
    assert image.shape == (3, 8, 8)
    assert (image.min(), image.max()) == (0, 1)
    assert torch.equal(picture.colours(reference.clone(), basis), image)
    assert not torch.equal(picture.colours(reference + 1, basis), image)


def test_a_sheet_has_a_cell_for_each_image():
    page = picture.sheet([[torch.zeros(3, 8, 8), torch.ones(3, 500, 500)]])
    assert page.shape == (picture.SIZE, 2 * picture.SIZE + picture.GAP, 3)
    assert (page[:, : picture.SIZE].max(), page[:, picture.SIZE :].min()) == (0, 255)


@pytest.mark.slow
@pytest.mark.skipif(bool(TASKS["dinov2_1370"].missing()), reason="needs the packages of the images' task")
def test_every_weight_of_dinov2_is_read_and_patches_of_a_photograph_are_found_again():
    model = dinov2.read_dinov2(dinov2.package_file(*dinov2.WEIGHTS))
    deviations = {name: float(x.std()) for name, x in model.state_dict().items() if name.endswith("proj.weight")}
    assert len(deviations) == 4 * dinov2.LAYERS
    assert len(set(deviations.values())) == len(deviations)
    views = [dinov2.make_view(photographs.read_photograph(photographs.SCENES[1], 16 * dinov2.PATCH), seed=0)]
    judge = dinov2.Judge(dinov2.Features(model), views)
    assert judge.evaluate(judge.exact)["matched"] > 0.5
