"""Images and points under a known homography, by which matches are judged; points are pixels (x, y)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

TILT = 0.15
ZOOM, TURN, INNER_TILT = 0.7, 20.0, 0.05


def random_homography(height: int, width: int, seed: int) -> Tensor:
    """A (3, 3) float64 map of pixels (x, y, 1): each corner of an image moves by up to `TILT` of its sides."""
    corners = _corners(height, width)
    return homography(corners, corners + np.random.default_rng(seed).uniform(-TILT, TILT, (4, 2)) * (width, height))


def inner_homography(height: int, width: int, seed: int) -> Tensor:
    """A (3, 3) float64 map whose inverse takes an image's corners to corners inside it: a copy has no black border.

    The copy shows `ZOOM` of the sides, turned by up to `TURN` degrees, each corner off by up to `INNER_TILT` of them.
    """
    random = np.random.default_rng(seed)
    corners, sides = _corners(height, width), np.array([width, height])
    angle = np.deg2rad(random.uniform(-TURN, TURN))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inside = sides * (ZOOM * (corners / sides - 0.5) @ turn.T + 0.5 + random.uniform(-INNER_TILT, INNER_TILT, (4, 2)))
    return homography(inside, corners)


def homography(corners: np.ndarray, moved: np.ndarray) -> Tensor:
    """The (3, 3) float64 map of pixels (x, y, 1) that takes four points (4, 2) to four others."""
    rows = []
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
    return torch.from_numpy(np.append(np.linalg.solve(np.array(rows), moved.ravel()), 1).reshape(3, 3))


def project(points: Tensor, homography: Tensor) -> Tensor:
    """(n, 2) points (x, y) through a homography."""
    mapped = torch.cat([points.double(), torch.ones(len(points), 1)], -1) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]


def warped(image: Tensor, homography: Tensor) -> Tensor:
    """The image (channels, height, width) whose pixel homography(p) is pixel p of `image`; black outside."""
    height, width = image.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = project(torch.stack([columns.flatten(), rows.flatten()], -1), homography.inverse())
    grid = (2 * points / torch.tensor([width - 1, height - 1]) - 1).reshape(1, height, width, 2)
    return nn.functional.grid_sample(image[None], grid.to(image.dtype), align_corners=True)[0]


def _corners(height: int, width: int) -> np.ndarray:
    return np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
