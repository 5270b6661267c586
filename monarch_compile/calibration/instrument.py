"""Run a model with another attention at the sites that the passes would lower: how forms are compared in place.

A captured and lowered graph is interpreted node by node, and each site calls back. Nothing is compiled, so that one
capture serves every form.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from monarch_compile.attention.groups import split_mask
from monarch_compile.attention.op import ATTENTION_OP, OPTIONS
from monarch_compile.calls import Launcher
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.errors import MonarchError, PlanError

if TYPE_CHECKING:
    from monarch_compile.passes.pipeline import Rewrite


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One run of one site: q (E, H, N_q, D), k (E, H_kv, N_k, D), v (E, H_kv, N_k, D_v), key_mask (E, N_k).

    key_mask is True where a key is visible, or floating and added to the scores.
    options: those of the operator, by name (`ops.OPTIONS`).
    """

    site: str
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    options: Mapping[str, Any]

    def monarch(self, **changes: Any) -> Tensor:
        """Monarch attention with the site's options, or others."""
        options = {**self.options, **changes}
        output: Tensor = ATTENTION_OP(self.q, self.k, self.v, self.key_mask, *(options[name] for name in OPTIONS))
        return output

    def exact(self) -> Tensor:
        """Softmax attention in bounded memory; a row that sees no key gives 0."""
        mask = visible = None
        if self.key_mask is not None:
            visible, bias = split_mask(self.key_mask[:, None, None, :], self.q.dtype)
            mask = visible if bias is None else bias.masked_fill(~visible, float("-inf"))
        output = F.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            attn_mask=mask,
            scale=self.options["scale"],
            enable_gqa=self.q.shape[1] != self.k.shape[1],
        )
        if visible is None:
            return output
        return torch.where(visible.any(-1, keepdim=True), output, output.new_zeros(()))


Attention = Callable[[AttentionCall], Tensor]


def monarch(call: AttentionCall) -> Tensor:
    """The form that the options ask for."""
    return call.monarch()


def exact(call: AttentionCall) -> Tensor:
    """Softmax attention."""
    return call.exact()


@dataclass(eq=False)
class Switch:
    """What the sites of every graph of a model call: to be changed between runs."""

    attention: Attention = monarch


@dataclass(eq=False)
class Probe:
    """A Dynamo backend that runs the passes on each graph and interprets the result, its sites calling `switch`.

    Without a switch each graph runs as it was. `rewrites` are the passes' results, `failures` the errors that left
    graphs as they were.
    """

    config: MonarchConfig
    switch: Switch | None = None
    rewrites: list[Rewrite] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    launcher: Launcher | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph's callable."""
        from monarch_compile.passes.pipeline import rewrite

        unchanged: Callable[..., Any] = gm.forward
        try:
            result = rewrite(gm, example_inputs, self.config, self.launcher)
        except PlanError:
            raise
        except Exception as error:  # the backend falls back on the same error, and so does this
            self.failures.append(f"graph {len(self.rewrites) + len(self.failures)}: {error!r}")
            return unchanged
        self.rewrites.append(result)
        return unchanged if self.switch is None else SiteInterpreter(result.after, self.switch).run


class SiteInterpreter(Interpreter):
    """Runs a lowered graph eagerly; each lowered site calls the switch's attention."""

    def __init__(self, gm: GraphModule, switch: Switch) -> None:
        super().__init__(gm)
        self._switch = switch

    def run_node(self, n: Node) -> Any:
        """As the interpreter's own, except for lowered sites."""
        from monarch_compile.passes.capture.enclosed import is_opened
        from monarch_compile.passes.graph import SITE_NAME

        if is_opened(n):
            return self._run_call(n)
        if n.target is not ATTENTION_OP:
            return super().run_node(n)
        (q, k, v, key_mask, *options), _ = self.fetch_args_kwargs_from_env(n)
        call = AttentionCall(n.meta[SITE_NAME], q, k, v, key_mask, dict(zip(OPTIONS, options, strict=True)))
        output = self._switch.attention(call)
        return output.transpose(1, 2).contiguous().transpose(1, 2)  # the layout that the graph was traced with

    def _run_call(self, n: Node) -> Any:
        """A call of an op that runs bodies, in which there may be sites too."""
        target: Any = n.target
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def interpreted(body: GraphModule) -> Callable[..., Any]:
            return SiteInterpreter(body, self._switch).run

        return target(*pytree.tree_map_only(GraphModule, interpreted, args), **kwargs)


def with_attention(
    model: Callable[..., Any], attention: Attention, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """`model`, eager, with `attention` in place of every site that the backend would lower under `options`.

    For controls and for forms that the backend does not have; see `AttentionCall` for what it is given.
    """
    config, _ = parse_options(options)
    return capture(model, Probe(config, Switch(attention)))


def capture(model: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`model` under torch.compile with `backend` and static shapes, independent of any compilation of the user's.

    The code object is a new one: Dynamo caches by code object.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    inner = _uncompiled(model)
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


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """What was given to torch.compile, for a model that is compiled already."""
    inner = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
    return _uncompiled(inner) if inner is not None else model


def size_hints(gm: GraphModule) -> dict[str, int]:
    """The value that each symbolic size in `gm` had in the call."""
    values = (node.meta.get("val") for node in gm.graph.nodes)
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    return {str(size): int(size.node.hint) for size in sizes if isinstance(size, torch.SymInt) and size.node.has_hint()}
