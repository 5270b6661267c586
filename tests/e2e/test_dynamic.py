"""Symbolic lengths and batches: what is computed at a size never depends on which sizes came before."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.config import MonarchConfig
from monarch_compile.passes.pipeline import rewrite
from tests.support.block import Block, key_padding

EDGE = 1280  # of the CPU's block sizes with a window: 16 below, 32 from here on
LENGTHS = (40, 64, 71, 100, 1279, 1280, 1281, 1312, 2000)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would go to Inductor goes through AOTAutograd alone."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    with torch.no_grad():
        yield


MODEL = Block().eval()


def expected(x: Tensor, visible: Tensor | None = None, **options: Any) -> Tensor:
    """Monarch attention at the block size of the table."""
    block_size = auto_block_size(x.shape[1], "cpu", 1, int(options.get("prefix", 0)))
    return MODEL.by_reference(x, visible, block_size=block_size, **options)


def inputs(seq_len: int, batch: int = 2, *, masked: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * batch + seq_len)
    x = torch.randn(batch, seq_len, 24, generator=generator)
    return [x, key_padding(batch, seq_len)] if masked else [x]


def compiled(dynamic: bool | None = True, **options: object) -> Callable[..., Tensor]:
    """The model compiled anew, with fresh caches."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(MODEL, backend="monarch", fullgraph=True, dynamic=dynamic, options=options)


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "key_padding"])
@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.nightly)], ids=["rising", "falling"])
def test_every_length_gets_the_block_size_of_the_table(masked: bool, order: int) -> None:
    call = compiled(policy="always")
    for seq_len in LENGTHS[::order]:
        given = inputs(seq_len, masked=masked)
        torch.testing.assert_close(call(*given), expected(*given), rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["exact"] == 0
    assert num_graphs() == 2


def test_twenty_lengths_take_one_compilation_a_range() -> None:
    call = compiled(policy="always")
    lengths = list(range(33, EDGE, 120))[:10] + list(range(EDGE, 2600, 130))[:10]
    random.Random(0).shuffle(lengths)
    for seq_len in lengths:
        call(*inputs(seq_len))
    assert len(set(lengths)) == 20
    assert num_graphs() == 2


@pytest.mark.parametrize(
    "dynamic", [None, pytest.param(True, marks=pytest.mark.nightly), False], ids=["automatic", "dynamic", "static"]
)
def test_no_answer_depends_on_the_order_of_the_calls(dynamic: bool | None) -> None:
    """Dynamo compiles the first length alone, and a range with the second: all must agree on each length."""
    for lengths in itertools.permutations((100, 500, 1500)):
        call = compiled(dynamic, policy="auto", block_size="auto")
        for seq_len in (*lengths, lengths[0]):
            given = inputs(seq_len)
            exact = MODEL(*given)
            wanted = expected(*given) if seq_len == 1500 else exact
            torch.testing.assert_close(call(*given), wanted, rtol=1e-5, atol=1e-5)
            assert (wanted is exact) or not torch.allclose(wanted, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.nightly)], ids=["automatic", "dynamic"])
def test_a_symbolic_batch_and_a_batch_of_one(dynamic: bool | None) -> None:
    call = compiled(dynamic, policy="always")
    for batch, seq_len in itertools.product((1, 2, 5, 1), (70, 1300)):
        given = inputs(seq_len, batch, masked=True)
        torch.testing.assert_close(call(*given), expected(*given), rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["exact"] == 0


@pytest.mark.parametrize("dims", [(1,), (0,), (0, 1)], ids=["length", "batch", "both"])
def test_dims_that_are_marked_dynamic(dims: Sequence[int]) -> None:
    call = compiled(None, policy="always")
    sizes = {"batch": (2, 3, 7) if 0 in dims else (1,), "seq_len": (40, 71, 1279) if 1 in dims else (71,)}
    for batch, seq_len in itertools.product(*sizes.values()):
        given = inputs(seq_len, batch)
        for tensor, dim in itertools.product(given, dims):
            torch._dynamo.mark_dynamic(tensor, dim)
        torch.testing.assert_close(call(*given), expected(*given), rtol=1e-5, atol=1e-5)
    assert num_graphs() == 1


@pytest.mark.nightly
def test_options_beside_the_block_size_hold_for_every_length() -> None:
    options = {"num_iters": 2, "init": "mean", "pad": "pre", "prefix": 3}
    call = compiled(policy="always", **options)
    for seq_len in (64, 71, 1300):
        given = inputs(seq_len, masked=True)
        torch.testing.assert_close(call(*given), expected(*given, **options), rtol=1e-5, atol=1e-5)
    assert num_graphs() == 2


def test_min_seq_len_holds_for_every_length() -> None:
    call = compiled(policy="always", min_seq_len=50)
    for seq_len in (40, 60, 49, 50):
        given = inputs(seq_len)
        wanted = MODEL(*given) if seq_len < 50 else expected(*given)
        torch.testing.assert_close(call(*given), wanted, rtol=1e-5, atol=1e-5)
    assert num_graphs() == 2


@pytest.mark.parametrize("options", [{"policy": "never"}, {"policy": "always", "block_size": 8}], ids=str)
def test_no_guard_is_taken_where_the_outcome_does_not_hang_on_the_length(options: dict[str, object]) -> None:
    call = compiled(**options)
    for seq_len in (40, 64, 71, 1300, 2000):
        call(*inputs(seq_len))
    assert num_graphs() == 1


def test_a_length_that_only_the_data_tells_stays_exact() -> None:
    reports = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        reports.append(rewrite(gm, example_inputs, MonarchConfig(policy="always")))
        return reports[-1].after.forward

    def kept(x: Tensor, keep: Tensor) -> Tensor:
        x = x[keep]
        torch._check(x.shape[0] >= 2)
        return MODEL(x[None])

    x, keep = torch.randn(40, 24), torch.arange(40) > 7
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        output = torch.compile(kept, backend=backend, fullgraph=True)(x, keep)
    torch.testing.assert_close(output, kept(x, keep))
    assert [d.code for d in reports[0].decisions] == ["data_dependent"]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("attend", [sdpa, pytest.param(by_hand, marks=pytest.mark.nightly)])
def test_separate_inputs_share_their_length(attend: Callable[..., Tensor]) -> None:
    """Dynamo gives each a symbol of its own, and had one number for all of them when it compiled the first length."""
    torch._dynamo.reset()
    counters.clear()
    call = torch.compile(attend, backend="monarch", options={"policy": "always", "block_size": 8})
    for batch, seq_len in ((1, 120), (1, 200), (3, 200), (1, 71), (4, 90)):
        q, k, v = torch.randn(3, batch, 2, seq_len, 16).unbind()
        torch.testing.assert_close(call(q, k, v), monarch_attention(q, k, v, block_size=8), rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["exact"] == 0
    for lengths in ((90, 200, 200), (200, 90, 90)):  # in truth of other lengths
        q, k, v = (torch.randn(1, 2, n, 16) for n in lengths)
        torch.testing.assert_close(call(q, k, v), attend(q, k, v), rtol=1e-5, atol=1e-5)
