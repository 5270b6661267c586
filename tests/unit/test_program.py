"""A program as data: what launches, allocates and counts read off it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.attention.work import monarch_cost
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.emitters import emitter
from monarch_compile.codegen.program import Buffer, Program, Tiles, extent
from monarch_compile.errors import CodegenError

BASE = MonarchAttention(2, 4, 4, 4096, 4096, 64, 64, torch.float16, Form(64), 0.125)
FORMS = {
    "one iteration": BASE,
    "shared keys": BASE.changed(num_kv_heads=2),
    "mean start": BASE.changed(num_iters=2, init="mean"),
    "three iterations": BASE.changed(num_iters=3, dtype=torch.float32),
    "a window in stage 1": BASE.changed(window=1),
    "unequal lengths": BASE.changed(seq_len_q=1024),
}


def program(ir: MonarchAttention) -> Program:
    schedule = replace(EMITTER.choose_schedule(ir, (9, 0)), exchange=ir.form.num_iters > 1)
    return EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule))


def sizes(ir: MonarchAttention) -> dict[str, int]:
    heads = {"heads": ir.batch * ir.num_heads, "num_heads": ir.num_heads, "num_kv_heads": ir.num_kv_heads}
    lengths = {"seq_len_q": ir.seq_len_q, "seq_len_k": ir.seq_len_k}
    return {"batch": ir.batch, **heads, **lengths, "num_blocks": ir.num_blocks, "block_q": ir.block_size_q}


@pytest.mark.parametrize("name", FORMS)
def test_kernels_move_the_bytes_that_the_cost_model_counts(name: str) -> None:
    """Two lists of what crosses memory: that of the kernels, and `stages.STAGES`."""
    ir = FORMS[name]
    moved = program(ir).bytes_moved(sizes(ir))
    if ir.form.init == "mean":  # reads all queries and writes a mean of each offset, in a kernel that costs little
        mean = program(ir).kernels[0]
        moved -= Program((mean,), ()).bytes_moved(sizes(ir))
        read = program(ir).kernels[1].reads[0]
        moved += ir.batch * ir.num_heads * (ir.num_blocks - 1) * ir.block_size_q * ir.head_dim * read.dtype.itemsize
    assert moved == monarch_cost(ir).bytes


def test_every_buffer_is_given_or_written_before_it_is_read() -> None:
    given = {"q", "k", "v", "key_mask", "rows"}
    for name, ir in FORMS.items():
        for mask in MaskKind:
            found = program(ir.changed(mask=mask))
            held = set(given)
            for kernel in found.kernels:
                assert {buffer.name for buffer in (*kernel.reads, *kernel.updates)} <= held, (name, kernel.name)
                held |= {buffer.name for buffer in kernel.writes}
            assert held.issuperset(found.outputs)


def test_a_program_is_a_value() -> None:
    one, other = program(BASE), program(BASE.changed(batch=3, seq_len_q=8192, seq_len_k=8192))
    assert one == program(BASE)
    assert hash(one) == hash(program(BASE))
    assert one != other, "the number of blocks chooses the tiles"
    assert repr(one).startswith("Program(kernels=(Kernel(family='attention', name='monarch_summarize', ")


def test_sizes_by_name_and_in_tiles() -> None:
    assert extent("n", {"n": 5}) == 5
    assert extent(7, {}) == 7
    assert extent(Tiles("n", 4), {"n": 5}) == 2
    assert extent(Tiles("n", 1), {"n": 5}) == 5
    with pytest.raises(KeyError):
        extent("n", {})


def test_a_dim_of_one_is_read_by_stride_zero() -> None:
    mean = Buffer("x", torch.float32, ("heads", 1, 16), (("x_head", 0), ("x_block", 1)))
    assert dict(mean.stride_values((16, 16, 1))) == {"x_head": 16, "x_block": 0}


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(CodegenError, match="no kernels for family 'wavelets'; families are attention"):
        emitter("wavelets")
