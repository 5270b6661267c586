"""Run a model with something else at the sites that the passes would lower: how forms are compared in place.

A captured and lowered graph is interpreted node by node, and each site calls back. Nothing is compiled, so that one
capture serves every form.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from monarch_compile.calls import Launcher
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.errors import ConfigError, MonarchError, PlanError
from monarch_compile.family import SiteCall, family

if TYPE_CHECKING:
    from monarch_compile.passes.pipeline import Rewrite


Behaviour = Callable[[Any], Tensor]
"""What a `SiteCall` gives."""


def monarch(call: SiteCall) -> Tensor:
    """The form that the options ask for."""
    return call.monarch()


def exact(call: SiteCall) -> Tensor:
    """What the site computes where it is not lowered."""
    return call.exact()


@dataclass(eq=False)
class Switch:
    """What the sites of every graph of a model call: to be changed between runs."""

    behaviour: Behaviour = monarch


@dataclass(eq=False)
class Probe:
    """A Dynamo backend that runs the passes on each graph and interprets the result, its sites calling `switch`.

    Without a switch each graph runs as it was. `rewrites` are the passes' results, `failures` the errors that left
    graphs as they were. `interpreter` makes what runs a graph, a `SiteInterpreter` where it is None.
    """

    config: MonarchConfig
    switch: Switch | None = None
    rewrites: list[Rewrite] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    launcher: Launcher | None = None
    interpreter: Callable[[GraphModule, Switch], Interpreter] | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph's callable."""
        from monarch_compile.passes.pipeline import rewrite

        unchanged: Callable[..., Any] = gm.forward
        try:
            result = rewrite(gm, example_inputs, self.config, self.launcher)
        except (ConfigError, PlanError):
            raise
        except Exception as error:  # the backend falls back on the same error, and so does this
            self.failures.append(f"graph {len(self.rewrites) + len(self.failures)}: {error!r}")
            return unchanged
        self.rewrites.append(result)
        return (
            unchanged if self.switch is None else (self.interpreter or SiteInterpreter)(result.after, self.switch).run
        )


class SiteInterpreter(Interpreter):
    """Runs a lowered graph eagerly; each lowered site of a family that approximates calls the switch."""

    def __init__(self, gm: GraphModule, switch: Switch) -> None:
        super().__init__(gm)
        self._switch = switch

    def run_node(self, n: Node) -> Any:
        """As the interpreter's own, except for lowered sites."""
        from monarch_compile.passes.capture.enclosed import is_opened
        from monarch_compile.passes.frontends import frontends
        from monarch_compile.passes.graph import SITE_NAME

        if is_opened(n):
            return self._run_call(n)
        own = next((x for x in frontends() if n.target in (x.op, x.trained_op)), None)
        forms = None if own is None else family(own.family).forms
        if own is None or forms is None:
            return super().run_node(n)
        arguments, _ = self.fetch_args_kwargs_from_env(n)
        output = self._switch.behaviour(forms.call(n.meta[SITE_NAME], arguments))
        result = own.laid_out(output).copy_(output)  # as the graph was traced
        return result if n.target is own.op else (result,)

    def _run_call(self, n: Node) -> Any:
        """A call of an op that runs bodies, in which there may be sites too."""
        target: Any = n.target
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def interpreted(body: GraphModule) -> Callable[..., Any]:
            return SiteInterpreter(body, self._switch).run

        return target(*pytree.tree_map_only(GraphModule, interpreted, args), **kwargs)


def with_attention(
    model: Callable[..., Any], attention: Behaviour, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """`model`, eager, with `attention` in place of every site that the backend would lower under `options`.

    For controls and for forms that the backend does not have; what it is given is the `SiteCall` of the family.
    """
    config, _ = parse_options(options)
    return capture(model, Probe(config, Switch(attention)))


def capture(model: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`model` under torch.compile with `backend` and static shapes, independent of any compilation of the user's.

    The code object is a new one: Dynamo caches by code object.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    inner = uncompiled(model)
    fresh = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    compiled: Callable[..., Any] = torch.compile(fresh, backend=backend, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import BackendCompilerFailed

        try:
            return compiled(*args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, MonarchError):  # ours, without Dynamo's wrapping
                raise failure.inner_exception from None
            raise

    return call


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """What was given to torch.compile, for a model that is compiled already."""
    inner = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
    return uncompiled(inner) if inner is not None else model


def size_hints(gm: GraphModule) -> dict[str, int]:
    """The value that each symbolic size in `gm` had in the call."""
    values = (node.meta.get("val") for node in gm.graph.nodes)
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    return {str(size): int(size.node.hint) for size in sizes if isinstance(size, torch.SymInt) and size.node.has_hint()}
