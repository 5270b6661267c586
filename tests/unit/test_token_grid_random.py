"""Random programs that move pixels about: where a grid is claimed, each token's pixel is where the grid says.

The image holds the coordinates of its pixels, so that they can be read off the tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.grids import graph_of
from torch import Tensor
from torch.fx import Interpreter

from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.elements.token_grid import TokenGrid, token_grid

HEIGHT, WIDTH = 4, 6
Step = Callable[[Tensor], Tensor]
NOWHERE = -1.0
"""The coordinate of a token that is no pixel."""


def _transposed(r: random.Random, x: Tensor) -> Step:
    order = r.sample(range(x.dim()), x.dim())
    return lambda x: x.permute(order)


def _regrouped(r: random.Random, x: Tensor) -> Step:
    """A reshape to the same sizes with neighbours joined, or one cut, or to any sizes."""
    sizes = list(x.shape)
    choice = r.random()
    if choice < 0.5 and len(sizes) > 2:
        at = r.randrange(len(sizes) - 1)
        sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
    elif choice < 0.85:
        at = r.randrange(len(sizes))
        part = r.choice([d for d in range(1, sizes[at] + 1) if sizes[at] % d == 0])
        sizes[at : at + 1] = [part, sizes[at] // part]
    else:
        left, sizes = math.prod(sizes), []
        while left > 1:
            sizes.append(r.choice([d for d in range(2, left + 1) if left % d == 0]))
            left //= sizes[-1]
    return lambda x: x.reshape(sizes)


def _sliced(r: random.Random, x: Tensor) -> Step:
    dim = r.randrange(x.dim())
    start, step = r.randrange(min(3, x.shape[dim])), r.choice([1, 1, 1, 2])
    return lambda x: x[(slice(None),) * dim + (slice(start, None, step),)]


def _joined(r: random.Random, x: Tensor) -> Step:
    dim, number, is_behind = r.randrange(x.dim()), r.randrange(1, 3), r.random() < 0.4
    sizes = [number if d == dim else size for d, size in enumerate(x.shape)]
    return lambda x: torch.cat([torch.full(sizes, NOWHERE), x][:: -1 if is_behind else 1], dim)


def _rolled(r: random.Random, x: Tensor) -> Step:
    dim = r.randrange(x.dim())
    return lambda x: x.roll(1, dim)


def _padded(r: random.Random, x: Tensor) -> Step:
    pads = [0] * (2 * r.randrange(x.dim())) + [r.randrange(2), r.randrange(2)]
    return lambda x: F.pad(x, pads, value=NOWHERE)


def _taken(r: random.Random, x: Tensor) -> Step:
    dim = r.randrange(x.dim())
    place = r.randrange(x.shape[dim])
    return lambda x: x.select(dim, place)


def _indexed(r: random.Random, x: Tensor) -> Step:
    dim = r.randrange(x.dim())
    order = r.sample(range(x.shape[dim]), x.shape[dim])
    return lambda x: x.index_select(dim, torch.tensor(order))


def _widened(r: random.Random, x: Tensor) -> Step:
    dim = r.randrange(x.dim() + 1)
    return lambda x: x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:])


def _repeated(r: random.Random, x: Tensor) -> Step:
    dim = r.randrange(x.dim())
    times = [2 if d == dim else 1 for d in range(x.dim())]
    return lambda x: x.repeat(times)


def _repeated_each(r: random.Random, x: Tensor) -> Step:
    """Each place as often, or some left out and others twice."""
    dim = r.randrange(x.dim())
    if r.random() < 0.5:
        times = r.choice([1, 2, 3])
        return lambda x: x.repeat_interleave(times, dim)
    counts = [2, *(r.randrange(3) for _ in range(x.shape[dim] - 1))]
    return lambda x: x.repeat_interleave(torch.tensor(counts), dim, output_size=sum(counts))


def _outer(r: random.Random, x: Tensor) -> Step:
    """A line, or all, with ones: first or last."""
    number, op = r.choice([1, 2, 3]), r.choice([torch.outer, torch.ger])
    dim, is_line, is_first = r.randrange(x.dim()), r.random() < 0.5, r.random() < 0.5

    def step(x: Tensor) -> Tensor:
        line = x.movedim(dim, -1).flatten(0, -2)[0] if is_line else x.flatten()
        ones = torch.ones(number)
        return op(line, ones) if is_first else op(ones, line)

    return step


def _with_its_flip(r: random.Random, x: Tensor) -> Step:
    dim, at = r.randrange(x.dim()), r.randrange(x.dim() + 1)
    return lambda x: torch.stack([x, x.flip(dim)], at)


MAKERS = [*[_transposed] * 4, *[_regrouped] * 7, _sliced, _sliced, *[_joined] * 3, _rolled, _padded]
MAKERS += [_taken, _indexed, _widened, _repeated, _repeated_each, _repeated_each, _outer, _with_its_flip]


def _program(seed: int) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """An image through a convolution that copies it, then random steps."""
    r = random.Random(seed)
    x, steps, names = torch.zeros(2, 1, HEIGHT, WIDTH), [], []
    for _ in range(r.randrange(2, 9)):
        maker = r.choice(MAKERS)
        if not 1 < x.dim() < 7 or not 1 < x.numel() < 400:
            break
        steps.append(maker(r, x))
        names.append(maker.__name__)
        x = steps[-1](x)

    def run(image: Tensor) -> Tensor:
        y = F.conv2d(image, F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1)), padding=1)
        for step in steps:
            y = step(y)
        return y + 0

    return run, names


def _values(graph: Any, image: Tensor) -> dict[Any, Tensor]:
    """What each node of the graph holds, of an image."""
    held: dict[Any, Tensor] = {}

    class Keep(Interpreter):
        def run_node(self, n: Any) -> Any:
            held[n] = super().run_node(n)
            return held[n]

    given = [image if n.meta["val"].shape == image.shape else None for n in graph.find_nodes(op="placeholder")]
    Keep(graph.owning_module).run(*given)
    return held


def _follows(rows: Tensor, columns: Tensor, jumps: int) -> bool:
    """Whether coordinates of (grid, ...) tokens are those of rows and columns, each at one distance.

    Where padding was, there is no coordinate; a roll, of padded rows too, makes up to `jumps` jumps.
    """
    for line, across in ((rows, 1), (columns, 0)):
        first = line.amax(across, keepdim=True)
        if not bool(((line == first) | (line == NOWHERE) | (first == NOWHERE)).all()):
            return False
        steps = first.squeeze(across).diff(dim=0)
        for ends, step in zip(first.squeeze(across).unbind(-1), steps.unbind(-1), strict=True):
            known = step[(ends[1:] != NOWHERE) & (ends[:-1] != NOWHERE)]
            if len(known) and int((known != known.mode().values).sum()) > jumps:
                return False
    return True


def _is_right(found: TokenGrid, coordinates: tuple[Tensor, Tensor], dim: int, jumps: int) -> bool:
    """Whether the tokens along a dim are a grid behind or before other tokens, at each place of the other dims."""
    sizes = [int(axis.size) for axis in found.axes]
    y, x = (
        c.movedim(dim, 0)[found.prefix : len(c.movedim(dim, 0)) - found.suffix].reshape(*sizes, -1) for c in coordinates
    )
    return len(sizes) == 2 and (_follows(y, x, jumps) or _follows(x, y, jumps))


@pytest.mark.parametrize("number", [80, pytest.param(800, marks=pytest.mark.nightly)])
def test_claims_of_random_programs(number: int) -> None:
    _check(range(number))


def _check(seeds: range) -> None:
    images = [
        torch.arange(size, dtype=torch.float32).view(shape).expand(2, 1, HEIGHT, WIDTH).contiguous()
        for size, shape in ((HEIGHT, (-1, 1)), (WIDTH, (1, -1)))
    ]
    claims = 0
    for seed in seeds:
        program, names = _program(seed)
        jumps = names.count("_rolled") + 2 * names.count("_padded")
        graph, layouts = graph_of(program, images[0]), Layouts()
        rows, columns = (_values(graph, image) for image in images)
        for node in (n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)):
            for dim in range(node.meta["val"].dim()):
                found = token_grid(node, dim, layouts)
                if isinstance(found, TokenGrid):
                    claims += 1
                    assert _is_right(found, (rows[node], columns[node]), dim, jumps), (seed, names, node.name, dim)
    assert claims > len(seeds) / 20, "hardly any of these programs has a grid: the test says nothing"
