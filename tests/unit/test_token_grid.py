"""The grid of a token axis is found in models of images and videos, of static and of symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.grids import (
    DIM,
    SDPA,
    Attention,
    Block,
    Dit,
    Joint,
    Patches,
    Perceiver,
    Pvt,
    Video,
    Vit,
    Windows,
    attend,
    graph_of,
    grids_of,
    told,
)
from torch import Tensor, nn

from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.elements.token_grid import NoGrid, TokenGrid, token_grid
from monarch_compile.passes.graph import inputs, source_of
from tests.corpus.vision import DIFFUSERS, TEXT

IMAGE, SQUARE = (2, 3, 48, 64), (2, 3, 48, 48)
Grid = tuple[int | str, ...]


def image(*sizes: int) -> Tensor:
    return torch.randn(sizes)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], list[Grid]]] = {
    "vit": (Vit, (image(*IMAGE),), [(1, 6, 8)] * 2),
    "vit, square": (Vit, (image(*SQUARE),), [(1, 6, 6)] * 2),
    "registers": (lambda: Vit(4), (image(*IMAGE),), [(5, 6, 8)] * 2),
    "joint": (Joint, (image(*IMAGE), image(2, 7, DIM), image(2, DIM)), [(7, 6, 8)] * 2),
    "text last": (lambda: Joint(True), (image(*IMAGE), image(2, 7, DIM), image(2, DIM)), [(0, 6, 8, "then 7")] * 2),
    "windows": (Windows, (image(*IMAGE),), [(0, 2, 2), (0, 2, 2), (0, 4, 4), (0, 6, 8)]),
    "dit": (Dit, (image(*IMAGE), image(2, DIM)), [(0, 6, 8)] * 2),
    "pvt": (Pvt, (image(*IMAGE),), [(0, 3, 4)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_keys_are_a_grid(name: str) -> None:
    model, args, expected = MODELS[name]
    assert [told(found) for found in grids_of(model().eval(), *args)] == expected


@pytest.mark.parametrize("name", ["vit", "registers"])
def test_while_training(name: str) -> None:
    model, args, expected = MODELS[name]
    assert [told(found) for found in grids_of(model().train(), *args)] == expected


@pytest.mark.parametrize("name", ["vit", "vit, square", "registers", "joint", "text last", "pvt"])
def test_symbolic_sizes(name: str) -> None:
    model, args, expected = MODELS[name]
    has_text = name in ("joint", "text last")
    found = _with_static_text(model()) if has_text else grids_of(model().eval(), *args, dynamic=True)
    assert [(x.prefix, len(x.axes)) for x in found if isinstance(x, TokenGrid)] == [(x[0], 2) for x in expected]
    assert [x.suffix for x in found] == [7 * (name == "text last")] * len(expected)
    for grid in found:
        for axis in grid.axes:
            assert isinstance(axis.size, torch.SymInt)
            assert str(axis.node.meta["val"].shape[axis.dim]) == str(axis.size)


def _with_static_text(model: nn.Module) -> list[Any]:
    _, args, _ = MODELS["joint"]
    torch._dynamo.mark_dynamic(args[0], 2)
    torch._dynamo.mark_dynamic(args[0], 3)
    return grids_of(model.eval(), *args)


def test_a_video_has_three_axes_and_a_text_has_none() -> None:
    args = torch.randn(1, 3, 3, 8, 12), torch.randn(1, 7, DIM)
    own, text, last = grids_of(Video().eval(), *args)
    assert told(own) == told(last) == (0, 3, 4, 6)
    assert told(text) == "the token axis is no known grid: it comes from an argument of the graph"
    own, text, last = grids_of(Video().eval(), *args, dynamic=True)
    assert [len(own.axes), len(last.axes), type(text)] == [3, 3, NoGrid]


def test_an_axis_of_one_is_none() -> None:
    own, _, last = grids_of(Video().eval(), torch.randn(1, 3, 1, 8, 12), torch.randn(1, 7, DIM))
    assert told(own) == told(last) == (0, 4, 6)


def test_a_size_is_read_before_it_is_needed() -> None:
    """Whichever attention is asked first."""
    graph, layouts = graph_of(Windows(), image(*IMAGE)), Layouts()
    sites = [node for node in graph.nodes if node.target is SDPA]
    for site in sites[::-1]:
        found = token_grid(inputs(site)[1], -2, layouts)
        assert isinstance(found, TokenGrid)
        assert all(axis.node < site for axis in found.axes if axis.node is not None)


def test_a_mask_that_is_given_says_nothing() -> None:
    step = lambda n, i: n.patches(i[0]).masked_fill(i[1][..., None], 0)  # noqa: E731
    (found,) = grids_of(Net(step), (image(*IMAGE), torch.rand(2, 48) > 0.5))
    assert told(found) == (0, 6, 8)


def test_queries_and_keys_may_have_different_grids() -> None:
    assert [told(found) for found in grids_of(Pvt(), image(*IMAGE), of=0)] == [(0, 6, 8)]


def test_learned_queries_are_no_grid() -> None:
    read, written = grids_of(Perceiver(), image(*IMAGE), of=0)
    assert isinstance(read, NoGrid)
    assert told(written) == (0, 6, 8)
    read, written = grids_of(Perceiver(), image(*IMAGE))
    assert told(read) == (0, 6, 8)
    assert isinstance(written, NoGrid)


def test_the_source_is_the_line_that_flattens() -> None:
    found, _ = grids_of(Vit(), image(*IMAGE))
    assert "flatten" in str(found.source.target)
    assert source_of(found.source).startswith("grids.py:")


def test_each_way_to_ask() -> None:
    """The same layouts for many questions, or new ones; dims from the front or from the back."""
    graph = graph_of(Vit(), image(*IMAGE))
    first, *_ = (node for node in graph.nodes if node.target is SDPA)
    k = inputs(first)[1]
    assert told(token_grid(k, 2)) == told(token_grid(k, -2)) == (1, 6, 8)
    assert isinstance(token_grid(k, 0), NoGrid)
    assert isinstance(token_grid(k, 3), NoGrid)


class Net(nn.Module):
    """Patches, then whatever is given, then attention to it."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.step, self.patches, self.attention, self.block = step, Patches(), Attention(), Block()
        self.cls, self.table = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(48, DIM))
        self.wide = nn.Conv2d(DIM, DIM, 3, padding=1)
        self.batch_norm, self.relu = nn.BatchNorm2d(DIM), nn.ReLU(inplace=True)

    def forward(self, image: Tensor) -> Tensor:
        x = self.step(self, image)
        return attend(x, x, x)


def _by_hand(n: Net, i: Tensor) -> Tensor:
    x = n.patches(i)
    q, k, v = n.attention.q(x), *n.attention.kv(x).split(DIM, -1)
    return x + (q @ k.transpose(1, 2) / 3).softmax(-1) @ v


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _filled(n: Net, i: Tensor) -> Tensor:
    x = n.patches(i)
    x.mul_(2).add_(n.table)
    return x


def _part_added(n: Net, i: Tensor) -> Tensor:
    x = n.patches(i)
    x[:, ::2].add_(n.cls)
    return x


def _even_and_odd(n: Net, i: Tensor) -> Tensor:
    """Rotary embedding as diffusers writes it for Wan."""
    x = n.patches(i)
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] - x[..., 1::2]
    out[..., 1::2] = x[..., 0::2] + x[..., 1::2]
    return out.type_as(x)


def _token_written(n: Net, i: Tensor) -> Tensor:
    """What is written to is a token beside the grid."""
    tokens = n.cls.expand(2, 3, DIM).clone()
    tokens[:, :1] = tokens[:, 1:2].flip(0)
    return torch.cat([n.patches(i), tokens], 1)


def _patchify(i: Tensor) -> Tensor:
    x = i.reshape(2, 3, 6, 8, 8, 8).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(2, 48, 192)


STEPS: dict[str, tuple[Callable[[Net, Tensor], Tensor], Grid]] = {
    "view": (lambda n, i: n.patches.conv(i).view(2, DIM, 48).permute(0, 2, 1), (0, 6, 8)),
    "channels last": (lambda n, i: n.patches.conv(i).permute(0, 2, 3, 1).reshape(2, -1, DIM), (0, 6, 8)),
    "einsum": (lambda n, i: torch.einsum("bchw,cd->bhwd", n.patches.conv(i), n.table[:DIM]).flatten(1, 2), (0, 6, 8)),
    "columns first": (lambda n, i: n.patches.conv(i).transpose(2, 3).flatten(2).mT, (0, 8, 6)),
    "batch norm": (lambda n, i: n.batch_norm(n.patches.conv(i)).flatten(2).mT, (0, 6, 8)),
    "relu in place": (lambda n, i: n.relu(n.wide(n.patches.conv(i))).flatten(2).mT, (0, 6, 8)),
    "wide convolution": (lambda n, i: (n.patches.conv(i) + n.wide(n.patches.conv(i))).flatten(2).mT, (0, 6, 8)),
    "pooled": (lambda n, i: F.avg_pool2d(n.patches.conv(i), 2).flatten(2).mT, (0, 3, 4)),
    "upsampled": (lambda n, i: F.interpolate(n.patches.conv(i), scale_factor=2.0).flatten(2).mT, (0, 12, 16)),
    "padded": (lambda n, i: F.pad(n.patches.conv(i), (1, 1, 2, 0)).flatten(2).mT, (0, 8, 10)),
    "cropped": (lambda n, i: n.patches.conv(i)[:, :, 1:5, :7].flatten(2).mT, (0, 4, 7)),
    "merged": (lambda n, i: n.patches.conv(i)[:, :, ::2, 1::2].flatten(2).mT, (0, 3, 4)),
    "rolled": (lambda n, i: torch.roll(n.patches.conv(i), (1, 2), (2, 3)).flatten(2).mT, (0, 6, 8)),
    "attention by hand": (_by_hand, (0, 6, 8)),
    "norm by hand": (lambda n, i: _rms(n.patches(i)), (0, 6, 8)),
    "split heads and back": (lambda n, i: n.patches(i).unflatten(2, (2, 4)).transpose(1, 2).mT.mT.transpose(1, 2)
                             .flatten(2), (0, 6, 8)),
    "class token off": (lambda n, i: torch.cat([n.cls.expand(2, 3, DIM), n.patches(i)], 1)[:, 3:], (0, 6, 8)),
    "two of three off": (lambda n, i: torch.cat([n.cls.expand(2, 3, DIM), n.patches(i)], 1)[:, 2:], (1, 6, 8)),
    "negative start": (lambda n, i: torch.cat([n.cls.expand(2, 3, DIM), n.patches(i)], 1)[:, -49:], (1, 6, 8)),
    "class token at the end": (lambda n, i: torch.cat([n.patches(i), n.cls.expand(2, 3, DIM)], 1), (0, 6, 8, "then 3")),
    "taken off at the end": (lambda n, i: torch.cat([n.patches(i), n.cls.expand(2, 3, DIM)], 1)[:, :-3], (0, 6, 8)),
    "two of three off at the end": (lambda n, i: torch.cat([n.patches(i), n.cls.expand(2, 3, DIM)], 1)[:, :49],
                                    (0, 6, 8, "then 1")),
    "split off at the end": (lambda n, i: torch.cat([n.patches(i), n.cls.expand(2, 3, DIM)], 1).split([48, 3], 1)[0],
                             (0, 6, 8)),
    "tokens on both sides, some off": (lambda n, i: torch.cat([n.cls.expand(2, 1, DIM), n.patches(i),
                                       n.cls.expand(2, 3, DIM)], 1)[:, 1:-1], (0, 6, 8, "then 2")),
    "a token at the end that was written to": (_token_written, (0, 6, 8, "then 3")),
    "joined twice at the end": (lambda n, i: torch.cat([torch.cat([n.patches(i), n.cls.expand(2, 3, DIM)], 1),
                                n.cls.expand(2, 1, DIM)], 1), (0, 6, 8, "then 4")),
    "table of positions": (lambda n, i: n.patches(i) + F.embedding(torch.arange(48), n.table), (0, 6, 8)),
    "a mean of all": (lambda n, i: n.patches(i) - n.patches(i).mean(1, keepdim=True), (0, 6, 8)),
    "flat rows": (lambda n, i: torch.mm(n.patches(i).reshape(96, DIM), n.table[:DIM]).view(2, 48, DIM), (0, 6, 8)),
    "addmm": (lambda n, i: torch.addmm(n.cls[0, 0], n.patches(i).reshape(96, DIM), n.table[:8]).view(2, -1, DIM),
              (0, 6, 8)),
    "activations": (lambda n, i: F.hardswish(F.logsigmoid(F.silu(n.patches(i)))), (0, 6, 8)),
    "in place": (_filled, (0, 6, 8)),
    "rotary into memory": (_even_and_odd, (0, 6, 8)),
    "patchify": (lambda n, i: _patchify(i), (0, 6, 8)),
    "patchify of a padded image": (lambda n, i: _patchify(F.pad(i, (8, -8, 8, -8))), (0, 6, 8)),
    "unshuffle": (lambda n, i: F.pixel_unshuffle(i, 8).flatten(2).mT, (0, 6, 8)),
    "unfold": (lambda n, i: F.unfold(i, 8, stride=8).mT, (0, 6, 8)),
    "unfold of a dim": (lambda n, i: i.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 48, -1),
                        (0, 6, 8)),
    "rolled as windows are": (lambda n, i: n.patches.conv(i).view(2, DIM, 6, 4, 2).roll(1, 2).permute(0, 3, 2, 4, 1)
                              .reshape(8, 12, DIM), (0, 6, 2)),
    "features repeated": (lambda n, i: n.patches(i).repeat_interleave(2, 2)[..., ::2], (0, 6, 8)),
    "images repeated": (lambda n, i: n.patches(i).repeat_interleave(3, dim=0, output_size=6), (0, 6, 8)),
    "images repeated by numbers": (lambda n, i: n.patches(i).repeat_interleave(torch.tensor([1, 2]), 0, output_size=3),
                                   (0, 6, 8)),
    "a table of repeated positions": (lambda n, i: n.patches(i) + n.table[::2].repeat_interleave(2, 0), (0, 6, 8)),
    "outer product of positions": (lambda n, i: n.patches(i) * torch.outer(n.table[:, 0], i[0, 0, 0, :DIM]), (0, 6, 8)),
    "one token repeated": (lambda n, i: n.patches(i) + n.patches(i).mean(1, True).repeat_interleave(48, 1), (0, 6, 8)),
    "a mask of tokens": (lambda n, i: n.patches(i) * (torch.rand(2, 48, 1) > 0.5), (0, 6, 8)),
    "added in place, a part": (_part_added, (0, 6, 8)),
    "bands": (lambda n, i: n.patches(i).reshape(6, 16, DIM), (0, 2, 8)),
    "every other row and column": (lambda n, i: n.patches.conv(i).view(2, DIM, 3, 2, 4, 2).permute(0, 3, 5, 2, 4, 1)
                                   .reshape(8, 12, DIM), (0, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_keep_a_grid(name: str) -> None:
    step, expected = STEPS[name]
    (found,) = grids_of(Net(step).eval(), image(*IMAGE))
    assert told(found) == expected


def test_windows_without_a_dim_of_their_own_have_no_node() -> None:
    (found,) = grids_of(Net(STEPS["unfold"][0]), image(*IMAGE))
    assert [axis.node for axis in found.axes] == [None, None]
    assert isinstance(grids_of(Net(STEPS["unfold"][0]), image(*IMAGE), dynamic=True)[0], NoGrid)


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}
TRANSFORMERS: dict[str, tuple[Grid, dict[str, Any]]] = {
    "ViT": ((1, 6, 6), {}),
    "DeiT": ((2, 6, 6), {}),
    "Dinov2": ((1, 6, 6), {}),
    "Dinov2WithRegisters": ((5, 6, 6), {}),
    "SiglipVision": ((0, 6, 6), {}),
    "CLIPVision": ((1, 6, 6), {}),
    "Beit": ((1, 6, 6), {}),
    "VideoMAE": ((0, 2, 6, 6), {"num_frames": 4, "tubelet_size": 2}),
}


def _from_transformers(name: str) -> Callable[[Tensor], Any]:
    transformers = pytest.importorskip("transformers")
    options = {**TINY, **TRANSFORMERS[name][1]}
    if not name.startswith("Dino"):
        options["intermediate_size"] = 48
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="sdpa")
    model = getattr(transformers, f"{name}Model")(config).eval()
    return lambda x: model(pixel_values=x)[0]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name: str) -> None:
    pixels = image(2, 4, 3, 48, 48) if name == "VideoMAE" else image(*SQUARE)
    assert [told(found) for found in grids_of(_from_transformers(name), pixels)] == [TRANSFORMERS[name][0]] * 2


@pytest.mark.parametrize("name", ["Dinov2WithRegisters", "SiglipVision"])
def test_models_of_transformers_of_symbolic_sizes(name: str) -> None:
    found = grids_of(_from_transformers(name), image(2, 3, 48, 48), dynamic=True)
    assert [x.prefix for x in found] == [TRANSFORMERS[name][0][0]] * 2
    assert all(isinstance(axis.size, torch.SymInt) for x in found for axis in x.axes)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_transformers_of_diffusers(name: str) -> None:
    pytest.importorskip("diffusers")
    model, given = DIFFUSERS[name].make(name)
    graph, expected = graph_of(model, *given), DIFFUSERS[name].grid
    sites = [node for node in graph.nodes if node.target is SDPA]
    shapes = {node: [x.meta["val"].shape for x in inputs(node)[:2]] for node in sites}
    own = [node for node, (q, k) in shapes.items() if q == k and k[-2] != TEXT]  # not those of the text alone
    found = [told(token_grid(inputs(node)[1], -2)) for node in own]
    assert found
    for one in found:
        assert expected in one if isinstance(expected, str) else one == expected, found
