"""Blocks that are tiles of a grid, in float64: against a form written apart, and the facts that hold of all of them."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monarch_compile.attention.candidates import forms_that_pay
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.grids import TILES, Grid
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import chosen_form
from monarch_compile.attention.reference import reference
from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import DEVICES
from monarch_compile.errors import ConfigError, InputError, IRError
from monarch_compile.family import Occurrence

EPS = 1e-10


@dataclass(frozen=True)
class Tiled:
    """One attention over a grid; mask: "none", "bool" or "bias"; a row of "hidden" sees no key."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    window: int | tuple[int, ...] | None = None
    window_shape: str = "box"
    prefix: int = 0
    num_iters: int = 1
    init: str = "identity"
    mask: str = "none"
    group: int = 1
    prefix_at_end: bool = False
    seed: int = 0

    @property
    def seq_len(self) -> int:
        return self.prefix + math.prod(self.grid)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        heads = (2 * self.group, 2, 2)
        q, k, v = (
            torch.randn(2, h, self.seq_len, d, generator=g, dtype=torch.float64)
            for h, d in zip(heads, (4, 4, 3), strict=True)
        )
        return 2 * q, k, v

    def key_mask(self) -> Tensor | None:
        g = torch.Generator().manual_seed(self.seed + 1)
        seen = torch.rand(2, self.seq_len, generator=g) > 0.3
        if self.mask == "none":
            return None
        if self.mask == "bias":
            return torch.randn(seen.shape, generator=g, dtype=torch.float64).masked_fill(~seen, float("-inf"))
        if self.mask == "hidden":
            seen[-1] = False
        return seen

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return reference(
            q,
            k,
            v,
            mask,
            block_size=math.prod(self.tile),
            scale=0.5,
            num_iters=self.num_iters,
            init=self.init,
            window=self.window,
            prefix=self.prefix,
            tile=self.tile,
            window_shape=self.window_shape,
            grid=self.grid,
            prefix_at_end=self.prefix_at_end,
        )

    def places(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(tile, place in it) of each token of the grid."""
        found = []
        for point in itertools.product(*map(range, self.grid)):
            pairs = [divmod(x, extent) for x, extent in zip(point, self.tile, strict=True)]
            found.append((tuple(b for b, _ in pairs), tuple(i for _, i in pairs)))
        return found

    def is_near(self, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
        apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
        if self.window is None:
            return False
        reaches = self.window if isinstance(self.window, tuple) else (self.window,) * len(apart)
        if any(x > reach for x, reach in zip(apart, reaches, strict=True)):
            return False
        return self.window_shape == "box" or sum(map(bool, apart)) <= 1


@st.composite
def problems(draw: st.DrawFn, min_axes: int = 2) -> Tiled:
    axes = draw(st.integers(min_axes, 3))
    longest = 7 if axes < 3 else 4
    return Tiled(
        grid=tuple(draw(st.integers(1, longest)) for _ in range(axes)),
        tile=tuple(draw(st.integers(1, 3)) for _ in range(axes)),
        window=draw(st.one_of(st.sampled_from([None, 0, 1, 2]), st.tuples(*[st.integers(0, 2)] * axes))),
        window_shape=draw(st.sampled_from(["box", "plus"])),
        prefix=draw(st.sampled_from([0, 0, 1, 5])),
        num_iters=draw(st.integers(1, 2)),
        init=draw(st.sampled_from(["identity", "mean"])),
        mask=draw(st.sampled_from(["none", "bool", "hidden", "bias"])),
        group=draw(st.sampled_from([1, 2])),
        seed=draw(st.integers(0, 2**20)),
    )


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = 0.5 * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if mask is not None:
        scores = scores + _as_bias(mask)[:, None, None]
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _as_bias(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))


def _row_by_row(p: Tiled, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """One head of one batch entry, with one iteration from the identity start, from the definition.

    A far tile is one key, seen by what the query at the row's own place in that tile sees of it.
    """
    of = p.places()
    rows = {where: q[p.prefix + n] for n, where in enumerate(of)}
    members: dict[tuple[int, ...], list[int]] = {}
    for n, (tile, _) in enumerate(of):
        members.setdefault(tile, []).append(p.prefix + n)
    out = torch.zeros(p.seq_len, v.shape[1], dtype=v.dtype)
    for row in range(p.seq_len):
        exact, logits, values = list(range(p.prefix)), [], []
        if row < p.prefix:
            exact = list(range(p.seq_len))
        else:
            own, place = of[row - p.prefix]
            for tile, keys in members.items():
                if p.is_near(own, tile):
                    exact += keys
                elif (bias[keys] > float("-inf")).any():
                    seen_by = rows.get((tile, place), torch.zeros_like(q[0]))
                    scores = 0.5 * k[keys] @ seen_by + bias[keys]
                    weights = scores.softmax(0)
                    a = 0.5 * weights @ k[keys]
                    logits.append(a @ q[row] - a @ seen_by + scores.logsumexp(0))
                    values.append(weights @ v[keys])
        logits += list(0.5 * k[exact] @ q[row] + bias[exact])
        values += list(v[exact])
        if logits:  # a row that sees no key is 0
            out[row] = torch.stack(logits).softmax(0).nan_to_num(0.0) @ torch.stack(values)
    return out


@settings(max_examples=60, deadline=None)
@given(problems())
def test_one_iteration_is_the_definition(p: Tiled) -> None:
    p = replace(p, num_iters=1, init="identity")
    q, k, v = p.tensors()
    mask = p.key_mask()
    found = p.run(q, k, v, mask)
    bias = _as_bias(torch.ones(2, p.seq_len, dtype=torch.bool) if mask is None else mask)
    for b, h in itertools.product(range(2), range(q.shape[1])):
        if math.prod(p.grid) > math.prod(p.tile):  # else one block would hold all: exact
            one = _row_by_row(p, q[b, h], k[b, h // p.group], v[b, h // p.group], bias[b])
            torch.testing.assert_close(found[b, h], one, rtol=EPS, atol=EPS)


@settings(max_examples=40, deadline=None)
@given(problems(min_axes=1), st.integers(1, 24), st.integers(1, 6))
def test_a_grid_of_one_axis_is_the_sequence_bit_for_bit(p: Tiled, length: int, size: int) -> None:
    p = replace(p, grid=(length,), tile=(size,), window=max(p.window) if isinstance(p.window, tuple) else p.window)
    q, k, v = p.tensors()
    mask = p.key_mask()
    options = {"num_iters": p.num_iters, "init": p.init, "window": p.window, "prefix": p.prefix}
    found = p.run(q, k, v, mask)
    assert torch.equal(found, reference(q, k, v, mask, block_size=size, scale=0.5, **options))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_tiles_are_pieces_of_the_tokens_in_another_order(p: Tiled) -> None:
    """On whole tiles, without a window or with a tile's own alone."""
    p = replace(p, grid=tuple(-(-n // extent) * extent for n, extent in zip(p.grid, p.tile, strict=True)))
    p = replace(p, window=p.window and 0)
    q, k, v = p.tensors()
    mask = p.key_mask()
    places = p.places()
    order = [*range(p.prefix), *(p.prefix + n for n in sorted(range(len(places)), key=places.__getitem__))]
    moved = [None if x is None else x[..., order, :] if x.ndim == 4 else x[:, order] for x in (q, k, v, mask)]
    options = {"num_iters": p.num_iters, "init": p.init, "window": p.window, "prefix": p.prefix}
    pieces = reference(*moved, block_size=math.prod(p.tile), scale=0.5, **options)
    torch.testing.assert_close(p.run(q, k, v, mask)[:, :, order], pieces, rtol=EPS, atol=EPS)


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(["tile", "window", "window along each axis"]))
def test_a_tile_or_a_window_over_the_grid_is_exact(p: Tiled, by: str) -> None:
    over = {"tile": p.tile, "window": 7, "window along each axis": tuple(range(7, 7 + len(p.grid)))}[by]
    p = replace(p, tile=p.grid) if by == "tile" else replace(p, window=over, window_shape="box")
    q, k, v = p.tensors()
    mask = p.key_mask()
    torch.testing.assert_close(p.run(q, k, v, mask), _exact(q, k, v, mask), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 2))
def test_the_same_window_along_each_axis_is_one_number_bit_for_bit(p: Tiled, reach: int) -> None:
    q, k, v = p.tensors()
    mask = p.key_mask()
    along_each = replace(p, window=(reach,) * len(p.grid)).run(q, k, v, mask)
    assert torch.equal(along_each, replace(p, window=reach).run(q, k, v, mask))


@settings(max_examples=40, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_keys_in_a_tile_does_not_matter(p: Tiled, draw: random.Random) -> None:
    """Another order in each tile, of keys, values and what is told of the keys; queries stay."""
    q, k, v = p.tensors()
    mask = p.key_mask()
    order = list(range(p.seq_len))
    for tile in {tile for tile, _ in p.places()}:
        members = [p.prefix + n for n, (own, _) in enumerate(p.places()) if own == tile]
        for place, token in zip(members, draw.sample(members, len(members)), strict=True):
            order[place] = token
    found = p.run(q, k[:, :, order], v[:, :, order], None if mask is None else mask[:, order])
    torch.testing.assert_close(found[:, :, p.prefix :], p.run(q, k, v, mask)[:, :, p.prefix :], rtol=EPS, atol=EPS)


@settings(max_examples=40, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_queries_of_whole_tiles_may_change_places_in_all_of_them_alike(p: Tiled, draw: random.Random) -> None:
    """A query is matched with those at its own place in other tiles, wherever that is."""
    p = replace(p, grid=tuple(-(-n // extent) * extent for n, extent in zip(p.grid, p.tile, strict=True)))
    q, k, v = p.tensors()
    mask = p.key_mask()
    places = p.places()
    old = list(itertools.product(*map(range, p.tile)))
    new = dict(zip(old, draw.sample(old, len(old)), strict=True))
    number = {where: p.prefix + n for n, where in enumerate(places)}
    order = [*range(p.prefix), *(number[tile, new[place]] for tile, place in places)]
    torch.testing.assert_close(p.run(q[:, :, order], k, v, mask), p.run(q, k, v, mask)[:, :, order], rtol=EPS, atol=EPS)


@settings(max_examples=40, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_transposed_grids_give_the_transposed_result(p: Tiled, draw: random.Random) -> None:
    q, k, v = p.tensors()
    mask = p.key_mask()
    axes = draw.sample(range(len(p.grid)), len(p.grid))
    other = replace(p, grid=tuple(p.grid[a] for a in axes), tile=tuple(p.tile[a] for a in axes))
    if isinstance(p.window, tuple):
        other = replace(other, window=tuple(p.window[a] for a in axes))
    tokens = torch.arange(math.prod(p.grid)).view(p.grid).permute(axes).flatten() + p.prefix
    order = [*range(p.prefix), *tokens.tolist()]
    moved = [None if x is None else x[..., order, :] if x.ndim == 4 else x[:, order] for x in (q, k, v, mask)]
    torch.testing.assert_close(other.run(*moved), p.run(q, k, v, mask)[:, :, order], rtol=EPS, atol=EPS)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_tokens_after_a_grid_are_those_before_it(p: Tiled) -> None:
    """Put first, they give the same rows, in the other order."""
    q, k, v = p.tensors()
    mask = p.key_mask()
    last = [None if x is None else x.roll(-p.prefix, 2 if x.ndim == 4 else 1) for x in (q, k, v, mask)]
    found = replace(p, prefix_at_end=True).run(*last)
    torch.testing.assert_close(found.roll(p.prefix, 2), p.run(q, k, v, mask), rtol=EPS, atol=EPS)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_rows_of_the_prefix_are_exact_and_hidden_rows_are_0(p: Tiled) -> None:
    q, k, v = p.tensors()
    mask = p.key_mask()
    found = p.run(q, k, v, mask)
    rows = slice(0, p.prefix)
    torch.testing.assert_close(found[:, :, rows], _exact(q[:, :, rows], k, v, mask), rtol=1e-12, atol=1e-12)
    if p.mask == "hidden":
        assert (found[-1] == 0).all()


GRADED = (
    Tiled((3, 2), (2, 2), window=1, window_shape="plus", prefix=1, mask="bias"),
    Tiled((3, 2), (2, 1), num_iters=2, init="mean", window=0, group=2),
    Tiled((2, 2, 3), (1, 2, 2), window=1),
    Tiled((2, 2, 3), (1, 1, 2), window=(0, 1, 1)),
    Tiled((3, 2), (2, 2), window=0, prefix=2, prefix_at_end=True, mask="bool"),
)


@pytest.mark.parametrize("p", GRADED, ids=lambda p: f"{p.grid}-{p.window}")
def test_gradients(p: Tiled) -> None:
    q, k, v = (x[:1, : x.shape[1] // 2, :, :2].clone().requires_grad_() for x in p.tensors())
    mask = p.key_mask()
    mask = None if mask is None else mask[:1]
    assert torch.autograd.gradcheck(lambda *x: p.run(*x, mask), (q, k, v))


# Options


WRONG = {
    "a grid needs a tile, and a tile a grid; found grid None and tile": {"grid": None},
    "'tile' must hold block_size 7 tokens": {"block_size": 7},
    "grid must have as many sizes as tile": {"grid": (2, 3, 4)},
    r"grid must have as many sizes as tile \(2, 2\), each at least 1; found \(24, 0\)": {"grid": (24, 0)},
    r"1 \+ 4 \* 6 = 25 tokens; found 24 queries and 24 keys": {"prefix": 1},
    r"0 \+ 4 \* 5 = 20 tokens; found 24 queries": {"grid": (4, 5)},
    "'pad' must be 'post' with a tile": {"pad": "pre"},
    r"'window' must be one number, or one for each of the 2 axes of \(2, 2\); found \(1, 0, 1\)": {"window": (1, 0, 1)},
    "'window' must be None or an int of at least 0 or 1 to 3 ints of at least 0; found": {"window": (1, -1)},
    "'window_shape' must be one of": {"window_shape": "star"},
    "found 20 queries and 24 keys": {"queries": 20},
}


@pytest.mark.parametrize("message", WRONG)
def test_the_function_names_what_is_wrong_with_a_grid(message: str) -> None:
    options = {"grid": (4, 6), "tile": (2, 2), **WRONG[message]}
    x = torch.randn(1, 1, 24, 4)
    with pytest.raises(InputError, match=message):
        monarch_attention(x[:, :, : options.pop("queries", 24)], x, x, **options)


def test_pieces_have_one_window() -> None:
    x = torch.randn(1, 1, 24, 4)
    with pytest.raises(
        InputError, match=r"'window' must be one number, or None, where blocks are no tiles; found \(1, "
    ):
        monarch_attention(x, x, x, block_size=4, window=(1, 0))


@pytest.mark.parametrize("sizes", [{"tile": (4, 4)}, {"grid": (16, 16)}, {"tile": (4, 4), "grid": (16, 16)}], ids=str)
def test_options_with_a_window_for_other_axes_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="option 'window' must be one number, or one for each of the 2 axes"):
        MonarchConfig(window=(0, 1, 1), **sizes)


def test_a_window_for_other_axes_than_those_found_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the 2 axes of \(4, 4\); found \(0, 1, 1\)"):
        chosen_form(MonarchConfig(window=[0, 1, 1]), "cpu", 257, Grid(1, (16, 16)))


def test_a_window_along_axes_leaves_pieces_as_they_are() -> None:
    config = MonarchConfig(window=(0, 1))
    assert chosen_form(config, "cpu", 257) == chosen_form(MonarchConfig(), "cpu", 257)
    form = chosen_form(config, "cpu", 257, Grid(1, (16, 16)))
    assert (form.window, form.window_shape) == ((0, 1), "box")


def test_a_grid_without_a_tile_is_refused() -> None:
    x = torch.randn(1, 1, 24, 4)
    with pytest.raises(InputError, match=r"a tile a grid; found grid \(4, 6\) and tile None"):
        monarch_attention(x, x, x, block_size=4, grid=(4, 6))


def test_the_function_is_the_reference() -> None:
    p = Tiled((4, 5), (2, 3), window=1, window_shape="plus", prefix=2)
    q, k, v = p.tensors()
    options = {"window": 1, "window_shape": "plus", "prefix": 2, "scale": 0.5}
    assert torch.equal(monarch_attention(q, k, v, grid=[4, 5], tile=[2, 3], **options), p.run(q, k, v))


@given(st.sampled_from(sorted(TILES)), st.integers(1, 10**6), st.sampled_from([0, 1, 5]), st.booleans())
def test_auto_takes_tiles_from_the_table(key: tuple[str, int], num_tokens: int, prefix: int, at_end: bool) -> None:
    kind, axes = key
    row = [row for row in TILES[key] if row.start <= num_tokens][-1]
    grid = Grid(prefix, (*[1] * (axes - 1), num_tokens), at_end)
    form = chosen_form(MonarchConfig(), kind, num_tokens + prefix, grid)
    assert (form.tile, form.window, form.window_shape, form.prefix) == (row.tile, row.window, row.window_shape, prefix)
    assert form.prefix_at_end is (at_end and prefix > 0)


@pytest.mark.parametrize(
    "options",
    [{"pad": "pre"}, {"block_size": 32}, {"tile": None}, {"prefix": 3}, {"tile": (2, 2, 2)}, {"prefix_at_end": True}],
    ids=str,
)
def test_what_asks_for_pieces_gets_them(options: dict[str, object]) -> None:
    grid = Grid(1, (16, 16))
    form = chosen_form(MonarchConfig(**options), "cpu", 257, grid)
    assert form == chosen_form(MonarchConfig(**options), "cpu", 257)
    assert form.tile is None


def test_options_beside_tiles_are_kept() -> None:
    options = {"window": 2, "window_shape": "plus", "tile": (2, 8), "num_iters": 2, "init": "mean", "prefix": 1}
    form = chosen_form(MonarchConfig(**options), "cpu", 257, Grid(1, (16, 16)))
    assert form == Form(16, 2, "mean", "post", 2, 1, (2, 8), "plus")


def test_a_tile_settles_the_size_of_a_block() -> None:
    with pytest.raises(IRError, match="'tile' must hold block_size 9 tokens"):
        Form(9, tile=(2, 4))
    assert Form(8, tile=[2, 4]) == Form(8, tile=(2, 4))
    assert Form(8, tile=(2, 4), window=1).one_axis() == Form(8, window=4)
    assert Form(8, tile=(2, 4), window=1, window_shape="plus").one_axis() == Form(8, window=2)
    assert Form(8, tile=(2, 4), window=0).one_axis().window == 0
    assert Form(8, tile=(2, 4), window=(1, 0)).one_axis() == Form(8, window=1)


VIDEO = MonarchAttention(
    *(1, 2, 2, 6 * 32 * 32, 6 * 32 * 32, 64, 64),
    torch.float16,
    form=Form(64, tile=(4, 4, 4)),
    scale=0.125,
    grid=(6, 32, 32),
)


def searched(fixed: dict[str, object], ir: MonarchAttention = VIDEO) -> set[tuple[object, str]]:
    """(window, window_shape) of the forms that calibration tries, all of which are taken to pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Occurrence, "seconds", lambda *_: (2.0, 1.0))
        forms = forms_that_pay([Occurrence(ir, ())], DEVICES["cpu"], fixed)
    assert all(form.tile is not None for form in forms)
    return {(form.window, form.window_shape) for form in forms}


def test_calibration_searches_windows_along_the_axes_of_a_video() -> None:
    isotropic = {(None, "box"), (0, "box"), (1, "box"), (1, "plus")}
    assert searched({}) == isotropic | {((0, 1, 1), "box"), ((0, 1, 1), "plus"), ((1, 0, 0), "box")}
    assert searched({"window": (0, 2, 1), "window_shape": "plus"}) == {((0, 2, 1), "plus")}
    image = VIDEO.changed(grid=(192, 32), tile=(8, 8))
    assert searched({}, image) == isotropic


def test_a_window_is_written_in_one_way() -> None:
    assert Form(8, tile=(2, 4), window=[1, 1]) == Form(8, tile=(2, 4), window=1)
    assert Form(8, tile=(2, 4), window=(0, 0)).simplest() == Form(8, tile=(2, 4))
    assert Form(8, tile=(2, 4), window=[0, 2]).arguments() == Form(8, tile=(2, 4), window=(0, 2)).arguments()
    assert Form(8, window=1).arguments()[4] == [1]
