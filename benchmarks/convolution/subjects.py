"""Ways to compute a long convolution: the plain spelling by several hands, the operator, and peers of users."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.convolution.problems import Inputs

BASELINE = "inductor"
OURS = ("monarch", "operator")
"""Subjects that are judged by the targets."""

Call = Callable[[], Tensor]
Convolution = Callable[..., Tensor]


class Unsupported(Exception):
    """A subject does not do what a problem asks for."""


@dataclass(frozen=True)
class Subject:
    """A way to compute; `prepare` turns inputs into a call of the forward pass, or raises."""

    name: str
    prepare: Callable[[Inputs], Call]


def plain(u: Tensor, filter: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None) -> Tensor:
    """A causal convolution as models spell it; shapes as `Problem` has them. The result has u's dtype."""
    length = u.shape[-1]
    v = u if pre_gate is None else u * pre_gate
    product = torch.fft.rfft(v.float(), 2 * length) * torch.fft.rfft(filter.float(), 2 * length)
    y: Tensor = torch.fft.irfft(product, 2 * length)[..., :length]
    if skip is not None:
        y = y + v * skip[:, None]
    y = y.to(u.dtype)
    return y if post_gate is None else y * post_gate


def operator(
    u: Tensor, filter: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None
) -> Tensor:
    """The same by the operator that sites are lowered to."""
    length = u.shape[-1]
    y: Tensor = torch.ops.monarch_compile.long_convolution(
        u, filter, skip, pre_gate, post_gate, 2 * length, length, 0, 1.0, u.dtype
    )
    return y


def compiled(function: Convolution, **options: Any) -> Convolution:
    """A function compiled for static shapes, with the `options` of torch.compile.

    What Dynamo knows is forgotten first: a limit of recompilations would send later problems to the eager form.
    """
    torch._dynamo.reset()
    counters.clear()
    fresh = types.FunctionType(function.__code__.replace(), function.__globals__)
    made: Convolution = torch.compile(fresh, dynamic=False, **options)
    return made


def _inductor(x: Inputs) -> Call:
    return functools.partial(compiled(plain), *x.tensors)


def _eager(x: Inputs) -> Call:
    return functools.partial(plain, *x.tensors)


def _operator(x: Inputs) -> Call:
    import monarch_compile.convolution.op  # noqa: F401  registers it

    return functools.partial(compiled(operator), *x.tensors)


def _monarch(x: Inputs) -> Call:
    """The plain spelling through the backend, which has to lower it."""
    from monarch_compile.backend import monarch as backend  # by name it would have to be installed

    options: Mapping[str, Any] = {"policy": "always", "strict": True}
    call = functools.partial(compiled(plain, backend=backend, options=options), *x.tensors)
    call()
    if not counters["monarch"]["lowered"]:
        raise Unsupported("the backend found no convolution to lower")
    return call


SUBJECTS = (
    Subject(BASELINE, _inductor),
    Subject("eager", _eager),
    Subject("monarch", _monarch),
    Subject("operator", _operator),
)
"""The plain spelling by Inductor, as it is, and by the backend; then the operator itself under Inductor."""


def peers(functions: Sequence[tuple[str, Convolution]]) -> tuple[Subject, ...]:
    """Users' functions f(u, filter), by name."""
    return tuple(Subject(name, functools.partial(_peer, function)) for name, function in functions)


def _peer(function: Convolution, x: Inputs) -> Call:
    if x.skip is not None or x.pre_gate is not None:
        raise Unsupported("takes neither gates nor a skip term")
    return functools.partial(function, x.u, x.filter)
