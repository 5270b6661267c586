"""Token axes that look like a grid and are none, or are not proven to be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.grids import DIM, Attention, Patches, attend, from_windows, grids_of, into_windows
from torch import Tensor, nn

from monarch_compile.passes.elements.token_grid import NoGrid


class Net(nn.Module):
    """What a near miss may use; its tokens `x` are a 6 x 6 grid, and `i` is the image of 48 x 48 pixels."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.step, self.patches, self.attention = step, Patches(), Attention()
        self.cls, self.mixer = nn.Parameter(torch.randn(2, 1, DIM)), nn.Linear(36, 36)
        self.table, self.latents = nn.Parameter(torch.randn(36, DIM)), nn.Parameter(torch.randn(2, 36, DIM))
        self.narrow, self.single = nn.Conv1d(DIM, DIM, 3, padding=1), nn.Conv2d(DIM, DIM, 1)
        self.wide = nn.Conv2d(DIM, DIM, 3, padding=1)
        self.register_buffer("order", torch.randperm(36))

    def forward(self, image: Tensor, *more: Tensor) -> Tensor:
        x = self.step(self, self.patches(image), image, *more)
        return attend(x, x, x)


def _drop(n: Net, x: Tensor) -> Tensor:
    """MAE: a random part of the patches."""
    noise = torch.rand(2, 36)
    kept = noise.argsort(1)[:, :9]
    return x.gather(1, kept[..., None].expand(-1, -1, DIM))


def _merged(x: Tensor) -> Tensor:
    """Token merging: the best matches of every other token are averaged."""
    a, b = x[:, ::2], x[:, 1::2]
    best = (a @ b.mT).argmax(-1)
    return b.scatter_reduce(1, best[..., None].expand(-1, -1, DIM), a, "mean")


def _written(n: Net, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = x[:, :-1]
    return y


def _written_beside_a_token(n: Net, x: Tensor) -> Tensor:
    return torch.cat([n.cls, _written(n, x)], 1)


def _added_in_place(n: Net, x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(x.flip(1))
    return y


def _view_written(n: Net, x: Tensor) -> Tensor:
    y = x.contiguous()
    y.view(2, 4, 9, DIM).copy_(x.reshape(2, 9, 4, DIM).transpose(1, 2))
    return y


def _filled(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, :18], y[:, 18:] = x[:, 18:], x[:, :18]
    return y


def _filled_by_index(n: Net, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, n.order] = x
    return y


def _filled_twice(x: Tensor) -> Tensor:
    """One half of the features from another order."""
    y = torch.empty_like(x)
    y[..., 0::2], y[..., 1::2] = x[..., 0::2], x.flip(1)[..., 1::2]
    return y


def _shift(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], x[:, :1]], 1)


def _grouped_points(n: Net, i: Tensor) -> Tensor:
    """PointNet++: (b, c, points, neighbours), through convolutions of 1 x 1."""
    return n.single(i.flatten(1).view(2, DIM, 36, -1)[..., :4]).flatten(2).mT


def _frames(n: Net, v: Tensor) -> Tensor:
    """Two frames of an image model each, then attention over all."""
    return n.patches(v.flatten(0, 1)).reshape(1, 72, DIM)


Step = Callable[..., Tensor]
NEAR_MISSES: dict[str, Step] = {
    "two grids": lambda n, x, i: torch.cat([x, n.patches(i.flip(3))], 1),
    "a grid with itself": lambda n, x, i: torch.cat([x, x], 1),
    "a grid and its class token, rolled": lambda n, x, i: torch.cat([x, n.cls], 1).roll(1, 1),
    "a grid and its class token, flipped": lambda n, x, i: torch.cat([x, n.cls], 1).flip(1),
    "a class token after one and before another": lambda n, x, i: torch.cat([x, n.cls, n.patches(i.flip(3))], 1),
    "after it and before it": lambda n, x, i: torch.cat([x, n.cls], 1) + torch.cat([n.cls, x], 1),
    "numbers of tokens after it": lambda n, x, i: torch.cat([x, n.cls, n.cls], 1) + torch.cat(
        [n.cls, x, n.cls], 1),
    "a part of rows, then the rest after tokens": lambda n, x, i: torch.cat([torch.cat(
        [x, n.cls], 1)[:, :30], torch.cat([x, n.cls], 1)[:, 30:].flip(1)], 1),
    "cut in front of tokens at the end": lambda n, x, i: torch.cat([x, n.cls], 1)[:, 1:],
    "cut with the tokens at the end": lambda n, x, i: torch.cat([x, n.cls], 1)[:, :-2],
    "every other before a class token": lambda n, x, i: torch.cat([x, n.cls], 1)[:, ::2],
    "suffix alone": lambda n, x, i: torch.cat([x, n.cls, n.cls], 1)[:, -2:],
    "suffix and a part of the grid": lambda n, x, i: torch.cat([x, n.cls, n.cls], 1)[:, 2:],
    "suffix for a part of the grid": lambda n, x, i: x + torch.cat([x, n.cls, n.cls], 1)[:, 2:],
    "across grid and suffix": lambda n, x, i: torch.cat([x, n.cls, n.cls, n.cls, n.cls], 1).reshape(2, 20, -1),
    "first token off, after the class token is put last": lambda n, x, i: torch.cat(
        [torch.cat([n.cls, x], 1)[:, 1:], torch.cat([n.cls, x], 1)[:, :1]], 1)[:, 1:],
    "tokens on both sides": lambda n, x, i: torch.cat([n.cls, x, n.cls], 1),
    "class token in the middle": lambda n, x, i: torch.cat([x[:, :18], n.cls, x[:, 18:]], 1),
    "two halves of a grid": lambda n, x, i: torch.cat([x[:, 18:], x[:, :18]], 1),
    "padded tokens": lambda n, x, i: F.pad(x, (0, 0, 0, 4)),
    "padded in front": lambda n, x, i: F.pad(x, (0, 0, 4, 0)),
    "permuted by a buffer": lambda n, x, i: x[:, n.order],
    "permuted at random": lambda n, x, i: x[:, torch.randperm(36)],
    "selected by index": lambda n, x, i: x.index_select(1, n.order),
    "sorted by norm": lambda n, x, i: x.gather(1, x.norm(dim=-1, keepdim=True).argsort(1).expand(-1, -1, DIM)),
    "sorted": lambda n, x, i: x.sort(1).values,
    "best of them": lambda n, x, i: x.topk(12, dim=1).values,
    "dropped at random": lambda n, x, i: _drop(n, x),
    "merged": lambda n, x, i: _merged(x),
    "flipped": lambda n, x, i: x.flip(1),
    "added to its flip": lambda n, x, i: x + x.flip(1),
    "added to a permutation": lambda n, x, i: x + x[:, n.order],
    "gated by a permutation": lambda n, x, i: x * x[:, n.order].sigmoid(),
    "shifted and added": lambda n, x, i: x + _shift(x),
    "rolled": lambda n, x, i: x.roll(1, 1),
    "all of it rolled": lambda n, x, i: x.roll(1),
    "image mirrored": lambda n, x, i: n.patches.conv(i).flip(3).flatten(2).mT,
    "image turned": lambda n, x, i: torch.rot90(n.patches.conv(i), 1, (2, 3)).flatten(2).mT,
    "added to its transpose": lambda n, x, i: (n.patches.conv(i) + n.patches.conv(i).mT).flatten(2).mT,
    "added to a convolution of its transpose": lambda n, x, i:
        (n.patches.conv(i) + n.wide(n.patches.conv(i).mT)).flatten(2).mT,
    "rows added to columns": lambda n, x, i: x + n.patches.conv(i).mT.flatten(2).mT,
    "rows and then columns": lambda n, x, i: torch.cat([n.cls, x], 1) + torch.cat(
        [n.cls, n.patches.conv(i).mT.flatten(2).mT], 1),
    "another number of tokens before": lambda n, x, i: torch.cat([n.cls, n.cls, x], 1)[:, :36] + x,
    "sliced": lambda n, x, i: torch.cat([n.cls, x], 1)[:, 1 + 3:],
    "end cut off": lambda n, x, i: torch.cat([n.cls, x], 1)[:, :-1],
    "a row cut off": lambda n, x, i: x[:, 6:],
    "every other": lambda n, x, i: x[:, ::2],
    "every other after a class token": lambda n, x, i: torch.cat([n.cls, x], 1)[:, 1::2],
    "the first of two parts": lambda n, x, i: x.chunk(2, 1)[0],
    "prefix alone": lambda n, x, i: torch.cat([n.cls, n.cls, x], 1)[:, :2],
    "interleaved": lambda n, x, i: torch.stack([x, n.patches(i.flip(3))], 2).flatten(1, 2),
    "repeated each": lambda n, x, i: x.repeat_interleave(2, 1),
    "repeated by numbers": lambda n, x, i: x.repeat_interleave(torch.tensor([2] * 36), 1, output_size=72),
    "repeated and flattened": lambda n, x, i: x.repeat_interleave(1).view(2, 36, DIM),
    "outer product with another order": lambda n, x, i: x * torch.outer(x[0, n.order, 0], n.table[0]),
    "rows repeated and added": lambda n, x, i: x + x[:, ::2].repeat_interleave(2, 1),
    "repeated": lambda n, x, i: x.repeat(1, 2, 1),
    "batch folded into tokens": lambda n, x, i: x.reshape(1, 72, DIM),
    "tokens folded with heads": lambda n, x, i: x.view(2, 36, 2, 4).transpose(1, 2).reshape(2, 72, 4),
    "tokens folded with features": lambda n, x, i: x.reshape(2, 72, 4),
    "features beside tokens": lambda n, x, i: x.mT.reshape(2, 36, DIM),
    "channels for rows": lambda n, x, i: n.patches.conv(i).flatten(1, 2).reshape(2, 48, 6),
    "channels are last, it thinks": lambda n, x, i: n.patches.conv(i).reshape(2, 36, DIM),
    "regrouped": lambda n, x, i: x.reshape(2, 4, 9, DIM).transpose(1, 2).flatten(1, 2),
    "across class token and grid": lambda n, x, i: torch.cat([n.cls, n.cls, n.cls, n.cls, x], 1).reshape(2, 20, -1),
    "wrong width": lambda n, x, i: x.reshape(2, 9, 4, DIM)[:, :, 0],
    "one row": lambda n, x, i: n.patches.conv(i).permute(0, 2, 3, 1).flatten(0, 1),
    "one column": lambda n, x, i: n.patches.conv(i).permute(0, 3, 2, 1).flatten(0, 1),
    "strip": lambda n, x, i: n.patches.conv(i)[:, :, :1].flatten(2).mT,
    "windows in order": lambda n, x, i: into_windows(n.patches.conv(i).permute(0, 2, 3, 1), 2).reshape(2, 36, DIM),
    "windows not put back": lambda n, x, i: x + into_windows(
        n.patches.conv(i).permute(0, 2, 3, 1), 2).reshape(2, 36, DIM),
    "windows put back wrong": lambda n, x, i: from_windows(
        into_windows(n.patches.conv(i).permute(0, 2, 3, 1), 2).roll(1, 0), 2, 6, 6).flatten(1, 2),
    "rows rolled in their windows": lambda n, x, i: n.patches.conv(i).view(2, DIM, 3, 2, 6).roll(1, 3).flatten(2).mT,
    "features taken by other tokens": lambda n, x, i: x.gather(2, (x[:, n.order] > 0).long()),
    "rolled twice": lambda n, x, i: x.view(2, 6, 6, DIM).roll(1, 1).flatten(1, 2).roll(1, 1),
    "windows of other sizes put back": lambda n, x, i: from_windows(
        into_windows(n.patches.conv(i).permute(0, 2, 3, 1), 2).reshape(8, 9, DIM), 3, 6, 6).flatten(1, 2),
    "rows of windows and columns in them": lambda n, x, i: n.patches.conv(i).view(2, DIM, 3, 2, 3, 2).permute(
        0, 3, 4, 2, 5, 1).reshape(12, 6, DIM),
    "inner before outer": lambda n, x, i: n.patches.conv(i).view(2, DIM, 3, 2, 6).permute(0, 3, 2, 4, 1).flatten(1, 3),
    "added tokens of an argument": lambda n, x, i, y: x + y,
    "an argument": lambda n, x, i, y: y,
    "an argument behind a grid, in rows of both": lambda n, x, i, y: torch.cat([x, y], 1).view(
        2, 2, 36, DIM).transpose(1, 2).flatten(1, 2),
    "tokens are mixed by a layer": lambda n, x, i: x + n.mixer(x.mT).mT,
    "tokens are made by a layer": lambda n, x, i: n.mixer(x.mT).mT,
    "a matrix over tokens": lambda n, x, i: n.order[None, :, None].float() * n.order.float() @ x,
    "keys in place of queries": lambda n, x, i: attend(n.latents, x, x),
    "added to learned queries' attention": lambda n, x, i: x + attend(n.latents, x, x),
    "summed up": lambda n, x, i: x.cumsum(1),
    "convolution over tokens": lambda n, x, i: n.narrow(x.mT).mT,
    "pooled tokens": lambda n, x, i: F.avg_pool1d(x.mT, 3, 1, 1).mT,
    "halved tokens": lambda n, x, i: F.avg_pool1d(x.mT, 2).mT,
    "interpolated tokens": lambda n, x, i: F.interpolate(x.mT, size=36).mT,
    "image of tokens and features": lambda n, x, i: F.interpolate(x[:, None], size=(36, DIM))[:, 0],
    "convolution over tokens and features": lambda n, x, i: n.wide(x[:, None].expand(-1, DIM, -1, -1)).flatten(2).mT,
    "points and neighbours": lambda n, x, i: _grouped_points(n, i),
    "an image without a convolution": lambda n, x, i: i.flatten(2).mT[..., :2],
    "an image through one of 1 x 1": lambda n, x, i: n.single(i.repeat(1, 3, 1, 1)[:, :DIM]).flatten(2).mT,
    "pieces of an image that are not put together": lambda n, x, i: i.view(2, 3, 6, 8, 6, 8).permute(
        0, 3, 5, 2, 4, 1).reshape(128, 36, 3)[..., :2],
    "rows of patches that stay": lambda n, x, i: i.view(2, 3, 6, 8, 48).permute(0, 2, 4, 1, 3).reshape(2, 288, 24),
    "parameters alone": lambda n, x, i: n.latents,
    "written by rows": lambda n, x, i: _written(n, x),
    "written by rows, beside a token": lambda n, x, i: _written_beside_a_token(n, x),
    "a token written to": lambda n, x, i: torch.cat([n.cls, x], 1).index_fill_(1, n.order[:3], 0),
    "added in place": lambda n, x, i: _added_in_place(n, x),
    "a view written": lambda n, x, i: _view_written(n, x),
    "filled by halves": lambda n, x, i: _filled(x),
    "filled by index": lambda n, x, i: _filled_by_index(n, x),
    "filled from two orders": lambda n, x, i: _filled_twice(x),
    "frames": lambda n, x, i, y, v: _frames(n, v),
    "frames beside features": lambda n, x, i, y, v: v.permute(0, 1, 3, 4, 2).reshape(1, -1, 6),
    "samples and features": lambda n, x, i, y: y[:, :, None].expand(-1, -1, 2, -1).flatten(1, 2),
    "one transform after another": lambda n, x, i: torch.fft.fft(x, dim=1).real,
    "triangle": lambda n, x, i: (x @ x.mT).tril() @ n.latents.flip(1) @ n.table[:DIM] + x[:, n.order],
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_grid(name: str) -> None:
    step = NEAR_MISSES[name]
    more = torch.randn(2, 36, DIM), torch.randn(1, 2, 3, 48, 48)
    net = Net(step).eval()
    found = grids_of(net, torch.randn(2, 3, 48, 48), *more[: step.__code__.co_argcount - 3])
    assert isinstance(found[-1], NoGrid), vars(found[-1])
    assert found[-1].reason


SYMBOLIC = ("a grid with itself", "class token in the middle", "regrouped", "sliced", "cut with the tokens at the end")


@pytest.mark.parametrize("name", SYMBOLIC)
def test_nor_of_symbolic_sizes(name: str) -> None:
    step: Any = NEAR_MISSES[name]
    assert isinstance(grids_of(Net(step).eval(), torch.randn(2, 3, 48, 48), dynamic=True)[-1], NoGrid)


def test_a_number_of_text_tokens_that_is_not_known_is_no_prefix() -> None:
    text = torch.randn(2, 7, DIM)
    torch._dynamo.mark_dynamic(text, 1)
    for step in (lambda n, x, i, y: torch.cat([y, x], 1), lambda n, x, i, y: torch.cat([x, y], 1)):
        (found,) = grids_of(Net(step).eval(), torch.randn(2, 3, 48, 48), text)
        assert isinstance(found, NoGrid)
        assert "not known until it runs" in found.reason


REASONS: dict[str, str] = {
    "permuted by a buffer": "by index",
    "tokens on both sides": "before a grid and after it",
    "two grids": "two grids",
    "sliced": "a part of a grid is taken",
    "an argument": "an argument of the graph",
    "sorted": "sort is not followed",
    "batch folded into tokens": "such as the batch",
    "one row": "one spatial axis",
    "written by rows": "written in place",
    "added to its flip": "not proven to lie alike",
    "tokens are made by a layer": "a linear layer",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_says_what_is_in_the_way(name: str) -> None:
    more = (torch.randn(2, 36, DIM),) * (NEAR_MISSES[name].__code__.co_argcount - 3)
    found = grids_of(Net(NEAR_MISSES[name]).eval(), torch.randn(2, 3, 48, 48), *more)
    assert REASONS[name] in found[-1].reason
