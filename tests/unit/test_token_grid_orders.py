"""Tokens whose content another order reaches by a product or an index, and grids of two orders in one attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.grids import DIM, attend, grids_of, told
from torch import Tensor, nn

from monarch_compile.passes.elements.token_grid import NoGrid
from monarch_compile.report.explainer import explain

TOKENS, BATCH = 36, 2


def _tokens(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h * w, c)."""
    return x.flatten(2).mT


class Net(nn.Module):
    """`x`: the features of an image, (b, c, 6, 6). `mixing`: a matrix of parameters over its tokens."""

    def __init__(self, step: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.step, self.conv = step, nn.Conv2d(3, DIM, 8, 8)
        self.wide = nn.Conv2d(DIM, DIM, 3, padding=1)
        self.mixing = nn.Parameter(torch.eye(TOKENS)[torch.randperm(TOKENS)])
        self.cls = nn.Parameter(torch.randn(BATCH, 1, DIM))
        self.register_buffer("order", torch.randperm(TOKENS))

    def forward(self, image: Tensor, *more: Tensor) -> Tensor:
        found = self.step(self, self.conv(image), *more)
        q, k, v = found if isinstance(found, tuple) else (found,) * 3
        return attend(q, k, v)


def _mixed(n: Net, x: Tensor) -> Tensor:
    """Every token times a parameter, for each token that there will be: not summed yet, (b, there, here, c)."""
    return _tokens(x)[:, None] * n.mixing[:, :, None]


def _neighbours(n: Net, x: Tensor, index: Tensor) -> Tensor:
    """For each token another, which an index tells."""
    others = _tokens(x)[:, None].expand(-1, TOKENS, -1, -1)
    return others.gather(2, index[..., None, None].expand(BATCH, -1, 1, DIM))[:, :, 0]


def _overwritten(n: Net, x: Tensor) -> Tensor:
    found = _tokens(x).clone()
    found.copy_(_mixed(n, x).sum(2))
    return found


Step = Callable[..., Tensor]
OTHER_ORDERS: dict[str, Step] = {
    "summed": lambda n, x: _mixed(n, x).sum(2) + _tokens(n.wide(x)),
    "averaged": lambda n, x: _mixed(n, x).mean(2) + _tokens(n.wide(x)),
    "largest": lambda n, x: _mixed(n, x).amax(2) + _tokens(n.wide(x)),
    "largest, and where": lambda n, x: _mixed(n, x).max(2)[0] + _tokens(n.wide(x)),
    "summed and kept": lambda n, x: _mixed(n, x).sum(2, keepdim=True)[:, :, 0] + _tokens(n.wide(x)),
    "summed and written": _overwritten,
    "a mask over tokens": lambda n, x, index: ((index[:, :, None] == n.order)[..., None] * _tokens(x)[:, None]).sum(2)
        + _tokens(n.wide(x)),
    "gathered by parameters": lambda n, x: _neighbours(n, x, n.order[None]) + _tokens(n.wide(x)),
    "gathered by an argument": lambda n, x, index: _neighbours(n, x, index) + _tokens(n.wide(x)),
    "rolled as one row": lambda n, x: _tokens(x.roll(3)),
    "rolled as one row, features last": lambda n, x: x.permute(0, 2, 3, 1).contiguous().roll(5).flatten(1, 2),
}  # fmt: skip


def _image(size: int = 48) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_another_order_is_no_grid(name: str) -> None:
    step = OTHER_ORDERS[name]
    more = (torch.randint(TOKENS, (BATCH, TOKENS)),) if "argument" in name or "mask" in name else ()
    (found,) = grids_of(Net(step).eval(), _image(), *more)
    assert isinstance(found, NoGrid), vars(found)


STILL_GRIDS: dict[str, Step] = {
    "norm by hand": lambda n, x: (_tokens(x) - _tokens(x).mean(-1, True)) / _tokens(x).var(-1, keepdim=True).sqrt(),
    "gate of features": lambda n, x: _tokens(x * x.mean((2, 3), keepdim=True).sigmoid()),
    "mean of what a mask shows": lambda n, x, mask: _tokens(x)
        - (_tokens(x) * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None],
    "rolled along an axis": lambda n, x: _tokens(x.roll(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", STILL_GRIDS)
def test_sums_that_keep_a_grid(name: str) -> None:
    more = (torch.ones(BATCH, TOKENS, dtype=torch.bool),) if "mask" in name else ()
    (found,) = grids_of(Net(STILL_GRIDS[name]).eval(), _image(), *more)
    assert told(found) == (0, 6, 6)


def _windows(x: Tensor, *, inner: bool) -> Tensor:
    """(b, c, 16, 16) -> tokens of windows of 4 x 4, or of what stands at one place in each window."""
    dims = (0, 2, 4, 3, 5, 1) if inner else (0, 3, 5, 2, 4, 1)
    return x.view(BATCH, DIM, 4, 4, 4, 4).permute(dims).reshape(-1, 16, DIM)


Sites = Callable[..., tuple[Tensor, ...]]
TWO_ORDERS: dict[str, tuple[int, Sites]] = {
    "keys by columns": (48, lambda n, x: (_tokens(x), _tokens(x.mT), _tokens(x.mT))),
    "values by columns": (48, lambda n, x: (_tokens(x), _tokens(x), _tokens(x.mT))),
    "a class token before rows and columns": (
        48,
        lambda n, x: (torch.cat([n.cls, _tokens(x)], 1), *[torch.cat([n.cls, _tokens(x.mT)], 1)] * 2),
    ),
    "places in windows and places of windows": (
        128,
        lambda n, x: (_windows(x, inner=True), *[_windows(x, inner=False)] * 2),
    ),
}


@pytest.mark.parametrize("name", TWO_ORDERS)
def test_queries_and_keys_of_two_orders(name: str) -> None:
    size, step = TWO_ORDERS[name]
    with torch.no_grad():
        (site,) = explain(Net(step).eval(), _image(size), options={"policy": "always"}).sites
    assert site.ir is not None
    assert site.ir.grid is None
    assert site.ir.form.tile is None


ONE_ORDER: dict[str, tuple[Sites, tuple[int, int]]] = {
    "all by columns": (lambda n, x: (_tokens(x[:, :, :4].mT),) * 3, (6, 4)),
    "keys of a convolution": (lambda n, x: (_tokens(x), _tokens(n.wide(x)), _tokens(n.wide(x))), (6, 6)),
    "keys are pooled and larger again": (
        lambda n, x: (_tokens(x), *[_tokens(F.interpolate(F.avg_pool2d(x, 2), size=(6, 6)))] * 2),
        (6, 6),
    ),
}


@pytest.mark.parametrize("name", ONE_ORDER)
def test_queries_and_keys_of_one_order(name: str) -> None:
    step, sizes = ONE_ORDER[name]
    with torch.no_grad():
        (site,) = explain(Net(step).eval(), _image(), options={"policy": "always"}).sites
    assert site.ir is not None
    assert site.ir.grid == sizes


class FrameAndImage(nn.Module):
    """A frame of a video attends to an image: its rows are the second axis of one and the first of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.tubes, self.conv = nn.Conv3d(3, DIM, (2, 8, 8), (2, 8, 8)), nn.Conv2d(3, DIM, 8, 8)

    def forward(self, video: Tensor, image: Tensor) -> Tensor:
        k = _tokens(self.conv(image))
        return attend(_tokens(self.tubes(video)[:, :, 1]), k, k)


def test_a_frame_and_an_image_have_one_order() -> None:
    with torch.no_grad():
        (site,) = explain(
            FrameAndImage().eval(), torch.randn(BATCH, 3, 4, 48, 48), _image(), options={"policy": "always"}
        ).sites
    assert site.ir is not None
    assert site.ir.grid == (6, 6)
