"""Ways to compute a layer: dense, the plain spelling by Inductor, and the operator, as it chooses and form by form."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.linear.problems import Inputs, Problem
from monarch_compile.linear import forms
from monarch_compile.linear.ir import DENSE, FUSED, KERNEL_FORMS, MONARCH, SPLIT, STAGED
from monarch_compile.linear.op import LINEAR_OP

DENSE_LAYER, INDUCTOR, OURS = "dense", "inductor", "operator"
MOST_SPLIT = 64
"""Tokens up to which the form for few tokens is timed."""

Forward = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Subject:
    """A way to compute. prepare: makes the forward pass of a problem. form: what the operator is asked for."""

    name: str
    prepare: Callable[[Problem], Forward]
    form: str = ""


def monarch(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x (tokens, in) by two batched products, as models spell it; factors as the operator takes them."""
    blocks, outs, rank, width = first.shape
    z = torch.bmm(x.reshape(-1, blocks, width).transpose(0, 1), first.reshape(blocks, outs * rank, width).mT)
    z = z.reshape(blocks, -1, outs, rank).permute(2, 1, 0, 3).reshape(outs, -1, blocks * rank)
    return torch.bmm(z, second.reshape(outs, -1, blocks * rank).mT).transpose(0, 1).reshape(x.shape[0], -1)


def blast(x: Tensor, first: Tensor, second: Tensor, coupling: Tensor) -> Tensor:
    """x (tokens, in) by BLAST's three products, as its authors spell them."""
    blocks, _, width = first.shape
    y = torch.bmm(x.reshape(-1, blocks, width).transpose(0, 1), first.mT)
    z = (y.unsqueeze(0) * coupling.unsqueeze(2)).sum(1)
    return torch.bmm(z, second.mT).transpose(0, 1).reshape(x.shape[0], -1)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function compiled for static shapes; what Dynamo knows is forgotten first, for it has a limit."""
    torch._dynamo.reset()
    fresh = types.FunctionType(function.__code__.replace(), function.__globals__)
    made: Callable[..., Tensor] = torch.compile(fresh, dynamic=False)
    return made


def _dense(problem: Problem) -> Forward:
    return lambda given: linear(given.x, given.weight)


def _inductor(problem: Problem) -> Forward:
    if problem.kind == MONARCH:
        by_two = compiled(monarch)
        return lambda given: by_two(*given.factors[:3])
    by_three = compiled(blast)
    return lambda given: by_three(*given.factors)


def _operator(form: str, problem: Problem) -> Forward:
    def forward(given: Inputs) -> Tensor:
        y: Tensor = LINEAR_OP(*given.factors, None, "blocked", "none", form)
        return y

    return forward


def _subject(name: str, form: str) -> Subject:
    return Subject(name, functools.partial(_operator, form), form)


ALWAYS = (Subject(DENSE_LAYER, _dense), Subject(INDUCTOR, _inductor), _subject(OURS, forms.AUTO))
FORMED = {form: _subject(f"as {form}", form) for form in (SPLIT, FUSED, STAGED, DENSE)}


def subjects(problem: Problem, place: str) -> tuple[Subject, ...]:
    """What is timed on a problem: the forms only where they have kernels, on CUDA."""
    ir = problem.ir()
    own: list[Any] = list(forms.kernel_forms(ir)) if place == "cuda" else []
    if problem.tokens > MOST_SPLIT and SPLIT in own:
        own.remove(SPLIT)
    if problem.tokens >= 1024 and place == "cuda" and not problem.backward:
        own.append(DENSE)
    return (*ALWAYS, *(FORMED[form] for form in own if form in (*KERNEL_FORMS, DENSE)))
