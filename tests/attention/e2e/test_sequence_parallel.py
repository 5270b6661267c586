"""Attention over a sequence that lies on several ranks: the same numbers and gradients as one process gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from monarch_compile.attention.form import Form
from monarch_compile.attention.parallel import by_heads, by_offsets
from monarch_compile.attention.parallel.spread import Spread, even_block_size
from monarch_compile.attention.reference import reference
from monarch_compile.backend import monarch
from monarch_compile.distributed import sequence_parallel
from monarch_compile.errors import ConfigError, InputError
from tests.support.block import Block
from tests.support.interpreter import interpreted  # noqa: F401
from tests.support.ranks import RANKS, Pool, pool_of_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

MASKS = (None, "padding", "bias")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool_of_ranks(str(tmp_path_factory.mktemp("ranks"))) as found:
        yield found


def mesh_of(mesh: Any, world: int) -> Any:
    """All four ranks, or two of them."""
    return mesh._flatten("all") if world == 4 else mesh["own"]


def tensors(seed: int, sizes: tuple[int, ...], masked: str | None) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and, where it is learned, a bias, that want gradients; and the key mask."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, seq_len, dim, value_dim = sizes
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    found = [torch.randn(batch, h, seq_len, d, generator=generator) for h, d in shapes]
    leaves = [x.requires_grad_() for x in found]
    if masked == "bias":
        bias = torch.randn(batch, seq_len, generator=generator).requires_grad_()
        return [*leaves, bias], bias
    return leaves, torch.rand(batch, seq_len, generator=generator) > 0.3 if masked == "padding" else None


def compare(mesh: Any, world: int, seed: int, sizes: tuple[int, ...], options: dict[str, Any], extra: Any) -> None:
    """One case: output and gradients of the rank's piece against the reference of the whole sequence."""
    method, masked, causal = extra
    leaves, key_mask = tensors(seed, sizes, masked)
    form = Form(**options)
    weight = torch.randn(sizes[0], sizes[1], sizes[3], sizes[5], generator=torch.Generator().manual_seed(seed + 1))
    expected = reference(*leaves[:3], key_mask, scale=0.3, causal=causal, **vars(form))
    grads = torch.autograd.grad((expected * weight).sum(), leaves)
    parallel = sequence_parallel(mesh_of(mesh, world), seq_len=sizes[3], method=method, **options)
    own = [parallel.shard(x.detach(), 1 if x.ndim == 2 else 2).requires_grad_() for x in leaves]
    mask = own[3] if masked == "bias" else None if key_mask is None else parallel.shard(key_mask, 1)
    mask = None if mask is None else mask[:, None, None, :]
    grouped = {"enable_gqa": True} if sizes[1] != sizes[2] else {}
    with parallel:
        output = F.scaled_dot_product_attention(*own[:3], mask, scale=0.3, is_causal=causal, **grouped)
    found = torch.autograd.grad((output * parallel.shard(weight, 2)).sum(), own)
    torch.testing.assert_close(output, parallel.shard(expected, 2), **TOLERANCE)
    for x, y in zip(found, grads, strict=True):
        torch.testing.assert_close(x, parallel.shard(y, 1 if y.ndim == 2 else 2), **TOLERANCE)


def random_case(seed: int) -> tuple[Any, ...]:
    """Sizes, options and what else of a random case."""
    draw = random.Random(seed)
    world, method = draw.choice((2, 4)), draw.choice(("heads", "offsets"))
    group, kv_heads = draw.choice((1, 2)), draw.choice((4, 8) if method == "heads" else (1, 2, 3))
    sizes = (draw.choice((1, 2)), group * kv_heads, kv_heads, draw.randint(9, 90), draw.choice((5, 8)), 6)
    window = draw.choice((None, 0, 1, 2, 5))
    options: dict[str, Any] = {"block_size": draw.randint(1, 12), "window": window, "prefix": draw.choice((0, 0, 1, 5))}
    options["prefix_at_end"] = bool(options["prefix"]) and draw.random() < 0.5
    causal = False
    if method == "heads":
        causal = draw.random() < 0.3 and not options["prefix_at_end"]
        options["num_iters"] = 1 if causal else draw.choice((1, 2))
    return world, seed, sizes, options, (method, draw.choice(MASKS), causal)


@pytest.mark.parametrize("start", range(0, 40, 10))
def test_random_cases_equal_one_process(pool: Pool, start: int) -> None:
    for seed in range(start, start + 10):
        case = random_case(seed)
        try:
            pool.run(compare, *case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


def train_compiled(mesh: Any, method: str) -> tuple[int, int]:
    """A compiled block on each rank's piece, against the block on the whole sequence; graphs and graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    compile_fx.compile_fx = lambda gm, inputs, config_patches=None: aot_eager(gm, inputs)
    model, pair = Block(num_heads=4), mesh["own"]
    x = torch.randn(2, 61, 24, generator=torch.Generator().manual_seed(0))
    expected = model.by_reference(x, block_size=8, window=1, prefix=3)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    parallel = sequence_parallel(pair, seq_len=61, block_size=8, prefix=3, method=method)
    run: Any = torch.compile(model, backend=monarch, fullgraph=True)
    with parallel:
        for _ in range(2):
            output = run(parallel.shard(x, 1))
    torch.testing.assert_close(output, parallel.shard(expected, 1), **TOLERANCE)
    torch.testing.assert_close(parallel.gather(output, 1), expected, **TOLERANCE)
    output.square().sum().backward()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.distributed.all_reduce(parameter.grad, group=pair.get_group())
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("method", ["heads", "offsets"])
def test_compiled_models_run_in_the_context(pool: Pool, method: str) -> None:
    assert pool.run(train_compiled, method) == [(1, 0)] * RANKS


def attending_functions() -> dict[str, Any]:
    """Functions of (1, 2, 16, 8) that compute attention otherwise than by scaled_dot_product_attention."""
    heads = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    aten = torch.ops.aten
    return {
        "multi-head": lambda x: heads(x[0], x[0], x[0])[0],
        "encoder": lambda x: layer(x[0]),
        "aten": lambda x: aten.scaled_dot_product_attention(x, x, x),
        "overload": lambda x: aten.scaled_dot_product_attention.default(x, x, x),
        "flash on a CPU": lambda x: aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0],
        "its formula": lambda x: torch._scaled_dot_product_attention_math(x, x, x)[0],
    }


def attend_inside_of_functions(mesh: Any) -> None:
    parallel, x = sequence_parallel(mesh_of(mesh, 4)), torch.randn(1, 2, 16, 8)
    for name, function in attending_functions().items():
        with pytest.raises(InputError, match="own tokens alone"), parallel, torch.no_grad():
            print(name, function(x))
        with pytest.raises(Exception), parallel, torch.no_grad():  # noqa: B017, PT011 (Dynamo may have its own reason)
            print(name, torch.compile(function, backend="eager")(x))


def test_attention_of_a_piece_alone_is_refused(pool: Pool) -> None:
    pool.run(attend_inside_of_functions)


def infer_by_default(mesh: Any) -> None:
    """Equal pieces, block size and method left to the context: whole blocks of the pieces."""
    x = torch.randn(1, 3, 4 * 60, 8, generator=torch.Generator().manual_seed(0))
    parallel = sequence_parallel(mesh_of(mesh, 4))
    own = parallel.shard(x, 2)
    with parallel:
        found = F.scaled_dot_product_attention(own, own, own)
    expected = reference(x, x, x, scale=8**-0.5, block_size=15, window=1)
    torch.testing.assert_close(found, parallel.shard(expected, 2), **TOLERANCE)


def test_equal_pieces_need_no_options(pool: Pool) -> None:
    pool.run(infer_by_default)


def gradients_of_whole(mesh: Any) -> None:
    """A loss of what `gather` gives counts once for each rank."""
    parallel = sequence_parallel(mesh_of(mesh, 4), seq_len=21, block_size=4, prefix=1)
    own = parallel.shard(torch.arange(21.0), 0).requires_grad_()
    (parallel.gather(own, 0) ** 2).sum().backward()
    torch.testing.assert_close(own.grad, 2 * RANKS * own.detach())


def test_gathered_tensors_give_the_gradients_of_all_ranks(pool: Pool) -> None:
    pool.run(gradients_of_whole)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dropout": ({}, {"dropout_p": 0.5}, "no dropout"),
    "causal by offsets": ({"method": "offsets"}, {"is_causal": True}, "no causal mask"),
    "heads": ({"method": "heads"}, {}, "3 and 3 heads over 4 ranks"),
    "mean start": ({"init": "mean"}, {}, "by heads: 3 and 3 heads over 4 ranks; by offsets: it needs num_iters=1"),
    "general mask": ({}, {"attn_mask": torch.zeros(16, 16)}, "masks of keys"),
    "another piece": ({"seq_len": 80}, {}, "rank 0 of 4 must hold 20 tokens"),
    "prefix": ({"prefix": 1}, {}, "give seq_len"),
}


def refused(mesh: Any, name: str) -> str:
    """What a call raises that attention over several ranks cannot be."""
    options, arguments, _ = CALLS[name]
    x = torch.randn(1, 3, 16, 8)
    try:
        with sequence_parallel(mesh_of(mesh, 4), **{"block_size": 4, **options}):
            F.scaled_dot_product_attention(x, x, x, **arguments)
    except InputError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_cannot_be_shared_raises_on_all_ranks(pool: Pool, name: str) -> None:
    found = pool.run(refused, name)
    assert CALLS[name][2] in found[0]
    assert "nothing" not in found


def wrong_options(mesh: Any, options: dict[str, Any]) -> str:
    try:
        sequence_parallel(mesh if options.pop("whole mesh", False) else mesh_of(mesh, 4), **options)
    except ConfigError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"colour": 1}, "found colour"),
        ({"method": "luck"}, "found method 'luck'"),
        ({"block_size": 0}, "block_size"),
        ({"whole mesh": True}, "a mesh of one dim"),
    ],
)
def test_wrong_options_are_named(pool: Pool, options: dict[str, Any], said: str) -> None:
    assert all(said in text for text in pool.run(wrong_options, options))


def other_options(mesh: Any) -> str:
    try:
        sequence_parallel(mesh_of(mesh, 4), block_size=4 + (torch.distributed.get_rank() == 2))
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_other_options_on_a_rank_are_named(pool: Pool) -> None:
    said = "sequence_parallel must be the same on all ranks; 'block_size' is 4 on rank 0, 5 on rank 2"
    assert pool.run(other_options) == [said] * RANKS


@given(
    st.integers(1, 500),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(0, 30),
    st.booleans(),
)
def test_each_token_is_on_one_rank(rest: int, ranks: int, block_size: int, prefix: int, at_end: bool) -> None:
    spread = Spread(rest + prefix, ranks, block_size, prefix, at_end)
    sizes = [spread.tokens_of(rank) for rank in range(ranks)]
    assert sum(sizes) == spread.seq_len
    assert [spread.start_of(rank) for rank in range(ranks)] == [sum(sizes[:rank]) for rank in range(ranks)]
    assert max(spread.rest_of(rank) for rank in range(ranks)) <= spread.places
    assert spread.has_empty_places == (rest < ranks * spread.places)


@given(st.integers(1, 300), st.integers(1, 40))
def test_even_blocks_fill_a_piece(piece: int, most: int) -> None:
    try:
        size = even_block_size(piece, most)
    except InputError:
        assert all(piece % size for size in range(-(-min(piece, most) // 2), min(piece, most) + 1))
    else:
        assert piece % size == 0
        assert size <= most


def test_a_spread_of_nonsense_raises() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Spread(8, 0, 4)
    with pytest.raises(InputError, match="prefix must be below"):
        Spread(8, 2, 4, 8)


def infer_in_turns(mesh: Any, seq_len: int, options: dict[str, Any], sends: int, bounds: dict[str, int]) -> None:
    """Heads of a rank, grouped, in turns, so many of which are sent from where they lie."""
    from unittest import mock

    leaves, key_mask = tensors(5, (2, 24, 12, seq_len, 8, 6), "padding")
    q, k, v = (x.detach() for x in leaves)
    expected = reference(q, k, v, key_mask, scale=0.3, window=1, **options)
    parallel = sequence_parallel(mesh_of(mesh, 4), seq_len=seq_len, method="heads", **options)
    own = [parallel.shard(x, 2).contiguous() for x in (q, k, v)]
    spread = Spread(seq_len, 4, options["block_size"], options.get("prefix", 0))
    mask = parallel.shard(key_mask, 1)[:, None, None, :]
    assert by_heads.turns_of(own[0], own[1], spread, 4) == 1
    with (
        mock.patch.multiple(by_heads, LEAST_BYTES=1, LEAST_MESSAGE=1, **bounds),
        mock.patch.object(by_heads, "_send_in_place", wraps=by_heads._send_in_place) as sent,
        parallel,
    ):
        assert by_heads.turns_of(own[0], own[1], spread, 4) == (1 if bounds else 3)
        output = F.scaled_dot_product_attention(*own, mask, scale=0.3, enable_gqa=True)
    assert sent.call_count == sends
    torch.testing.assert_close(output, parallel.shard(expected, 2), **TOLERANCE)


@pytest.mark.parametrize(
    ("seq_len", "options", "sends", "bounds"),
    [
        (45, {"block_size": 5, "prefix": 2}, 0, {}),
        (40, {"block_size": 5}, 3, {}),
        (40, {"block_size": 5}, 1, {"MOST_TURNS": 1}),
        (40, {"block_size": 5}, 3, {"MOST_TURNS": 1, "LONG_HEAD": 1}),
    ],
)
def test_heads_in_turns_equal_one_process(
    pool: Pool, seq_len: int, options: dict[str, Any], sends: int, bounds: dict[str, int]
) -> None:
    pool.run(infer_in_turns, seq_len, options, sends, bounds)


def infer_on_kernels(mesh: Any, world: int, sizes: tuple[int, ...], options: dict[str, Any], masked: bool) -> None:
    """Stages by kernels, in Triton's interpreter, and exchanges between them."""
    import os
    from unittest import mock

    leaves, key_mask = tensors(3, sizes, "padding" if masked else None)
    q, k, v = (x.detach() for x in leaves)
    expected = reference(q, k, v, key_mask, scale=0.3, **options)
    parallel = sequence_parallel(mesh_of(mesh, world), seq_len=sizes[3], method="offsets", **options)
    mask = None if key_mask is None else parallel.shard(key_mask, 1)[:, None, None, :]
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch.object(by_offsets, "place_has_kernels", return_value=True),
        parallel,
    ):
        own = [parallel.shard(x, 2) for x in (q, k, v)]
        output = F.scaled_dot_product_attention(*own, mask, scale=0.3, enable_gqa=sizes[1] != sizes[2])
    torch.testing.assert_close(output, parallel.shard(expected, 2), **TOLERANCE)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("world", "sizes", "options", "masked"),
    [
        (2, (1, 2, 2, 24, 16, 16), {"block_size": 4, "window": 1}, False),
        (4, (2, 2, 1, 37, 16, 25), {"block_size": 3, "window": 1, "prefix": 2}, True),
        (4, (1, 1, 1, 30, 16, 16), {"block_size": 6, "window": None}, False),
    ],
)
def test_kernels_of_several_ranks_equal_one_process(
    pool: Pool, world: int, sizes: tuple[int, ...], options: dict[str, Any], masked: bool
) -> None:
    pool.run(infer_on_kernels, world, sizes, options, masked)
