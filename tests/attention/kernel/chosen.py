"""Kernels with chosen blocks, and what they chose, so that the reference can be given the same blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from tolerances import assert_close
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from monarch_compile.attention.chosen import attend_exactly_where_chosen
from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.groups import split_mask
from monarch_compile.attention.ir import count_blocks
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.launch import outputs, site
from monarch_compile.codegen.attention.schedule import choose_schedule
from monarch_compile.codegen.launcher import Launcher, capability_of
from tests.attention.kernel.problems import Case, tensors, through_operator

SHOWS_CHOICE = replace(EMITTER, program=lambda *given: replace(EMITTER.program(*given), outputs=("z", "taken")))


def form_of(case: Case) -> Form:
    return Form(**{name: case.options[name] for name in FORM_OPTIONS})


def with_choice(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output of the kernels, and the blocks that they chose: (batch, heads, blocks, places), -1 for blocks before
    the first query."""
    form, scale = form_of(case).simplest(is_causal=case.causal), float(str(case.options["scale"]))
    ir, mask = site(q, k, v, mask, form, scale, case.grid, causal=case.causal)
    launcher = Launcher(ir, choose_schedule(ir, capability_of(q.device)), SHOWS_CHOICE)
    with set_wrap_triton_enabled(False):
        z, taken = outputs(launcher, q, k, v, mask, case.grid)
    missing = count_blocks(k.shape[2], form.block_size, form.prefix) - taken.shape[1] if form.tile is None else 0
    taken = torch.nn.functional.pad(taken, (0, 0, missing, 0), value=-1)
    return z.transpose(1, 2), taken.view(q.shape[0], q.shape[1], *taken.shape[1:])


def check_with_choice(case: Case, dtype: torch.dtype, device: str) -> None:
    """Rounding may choose another block of nearly the same mass: with the kernels' choice the reference is near, and
    that choice is about as good as its own."""
    q, k, v, mask = tensors(case, dtype, device)
    found, taken = with_choice(case, q, k, v, mask)
    masks = (None, None) if mask is None else split_mask(mask, torch.float64)
    options = {"scale": case.options["scale"], "grid": case.grid, "causal": case.causal}
    given, form = (q.double(), k.double(), v.double(), *masks), form_of(case)
    assert_close(found, attend_exactly_where_chosen(*given, form, **options, choice=taken)[0])
    own = attend_exactly_where_chosen(*given, form, **options)[0]
    exact = attend_exactly_where_chosen(*given, replace(form, chosen=10**3), **options)[0]
    errors = [torch.linalg.vector_norm(x - exact) for x in (found.double(), own)]
    assert errors[0] <= 1.05 * errors[1] + 1e-2 * torch.linalg.vector_norm(exact)


def check_replay_of_choice(case: Case) -> None:
    """A captured CUDA graph follows its inputs: blocks are chosen anew at each replay."""
    q, k, v, mask = tensors(case, torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        through_operator(case, q, k, v, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = through_operator(case, q, k, v, mask)
    k.copy_(k.flip(2))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, through_operator(case, q, k, v, mask))
    assert torch.equal(with_choice(case, q, k, v, mask)[0], captured)
