"""From the graph Dynamo hands over to pre-dispatch ATen, where every spelling of attention is visible and SSA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp import autocast_mode
from torch.autograd import grad_mode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from monarch_compile.errors import LoweringError
from monarch_compile.passes.capture import bodies, subclasses
from monarch_compile.passes.capture.enclosed import is_enclosing
from monarch_compile.passes.capture.fastpath import opened
from monarch_compile.passes.capture.replay import Calls
from monarch_compile.passes.graph import WEIGHT, modules_of, placeholders
from monarch_compile.passes.memory import must_be_kept

UNTRACEABLE = {
    "_enter_dual_level": "forward-mode differentiation (torch.func.jvp)",
    "_register_hook_trampoline": "a gradient hook under compiled autograd",
}
"""Calls, by name, that tracing would run unrecorded: what they begin would not end, and what they add would be lost."""
INFERENCE_MODE: dict[object, Callable[[bool], bool]] = {
    grad_mode._enter_inference_mode: lambda is_on: not is_on,
    grad_mode._exit_inference_mode: lambda before: before,
}
"""What make_fx runs unrecorded, and the grad mode that it leaves: all that a compiled graph knows of inference mode."""
CARRIED_META = ("tensor_dict", "grapharg", "example_value", "stack_trace", "nn_module_stack", WEIGHT)


def to_aten(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Retrace `gm` to pre-dispatch ATen with the metadata that Inductor reads from Dynamo's graph kept.

    Without that metadata CUDA graphs would treat parameters as inputs that move.
    """
    context = TracingContext.try_get()
    fake_mode = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
    if fake_mode is None:
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_fakify(x, fake_mode, context) for x in example_inputs]
    with fake_mode, preserve_node_meta():
        run = _Retrace(gm, Held(lambda x: _fakify(x, fake_mode, context))).run
        trace = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)
        try:
            traced = trace(*fakes)
        except Exception as error:
            transform = _function_transform(gm)
            if transform is None or isinstance(error, LoweringError):
                raise
            raise LoweringError(f"a function transform cannot be traced ({transform})") from error
    _require_no_fake_constants(traced)
    _carry_metadata(gm, traced)
    traced.graph.eliminate_dead_code(must_be_kept)
    return traced


class Held:
    """Tensors that a graph holds by itself, such as the parameters that an optimizer's step writes to.

    Each becomes one node, whose value is fake: ops that are traced on the tensor itself would change it.
    """

    def __init__(self, fakify: Callable[[Tensor], Tensor]) -> None:
        self._fakify = fakify
        self._known: dict[tuple[Any, int], Tensor] = {}

    def fake(self, name: str, held: Tensor) -> Tensor:
        """The fake tensor for `held`, which is `name` of the traced module too, if that name is free."""
        mode = get_proxy_mode()
        if mode is None:
            return held
        tracer: Any = mode.tracer
        key = tracer, id(held)
        if key not in self._known:
            name = tracer.get_fresh_qualname(name) if hasattr(tracer.root, name) else name
            setattr(tracer.root, name, held)
            proxy = tracer.create_proxy("get_attr", name, (), {})
            made = track_tensor_tree(self._fakify(held), proxy, constant=None, tracer=tracer)
            self._known[key] = made
        return self._known[key]


class _Retrace(Interpreter):
    """Runs a graph for make_fx, with its autocast regions in force.

    make_fx records that a region begins and ends but does not enter it, so that dtypes inside would be untrue.
    """

    def __init__(self, gm: GraphModule, held: Held, calls: Calls | None = None) -> None:
        super().__init__(gm)
        self._held = held
        self._calls = Calls() if calls is None else calls
        self._keeps_dtensors = subclasses.makes_dtensors(gm.graph)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; autocast and function transforms are as they were when this returns or raises."""
        for node in self.graph.nodes:
            if getattr(node.target, "__name__", "") in UNTRACEABLE:
                raise LoweringError(f"{UNTRACEABLE[node.target.__name__]} cannot be traced")
        self._entered: list[Any] = []
        depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._entered:
                self._exit()
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)

    def run_node(self, n: Node) -> Any:
        """Run a node, which is noted: a call that is kept as it is keeps the node's metadata."""
        self._node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the graph holds by itself; a tensor as a fake one."""
        value = super().get_attr(target, args, kwargs)
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self._held.fake(str(target), value) if is_real else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a node; entering and leaving autocast also happens for real, unrecorded."""
        body = bodies.opened(target, args)
        if body is not None:
            return self._of(body).run(*args[1:])
        if bodies.is_kept(target):
            return bodies.keep(self._node, target, args, kwargs)
        if target in INFERENCE_MODE:
            return self._switched(INFERENCE_MODE[target](*args))
        if is_enclosing(target):
            args = pytree.tree_map_only(GraphModule, lambda body: self._of(body).run, args)
        result = self._call(super().call_function, opened(target, args) or target, args, kwargs)
        if target is autocast_mode._enter_autocast:
            with torch._C.DisableTorchFunction():
                self._entered.append(autocast_mode._enter_autocast(*args))
        elif target is autocast_mode._exit_autocast:
            self._exit()
        return result

    def _switched(self, enabled: bool) -> bool:
        """Switch grad mode, on record; returns what it was."""
        before = torch.is_grad_enabled()
        super().call_function(torch._C._set_grad_enabled, (enabled,), {})
        return before

    def _of(self, body: GraphModule) -> _Retrace:
        return _Retrace(body, self._held, self._calls)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a node."""
        return self._call(super().call_method, target, args, kwargs)

    def _call(self, trace: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `trace` gives: traced, or recorded like a call before it."""
        if subclasses.is_kept(target, args, kwargs, keeps_dtensors=self._keeps_dtensors):
            return subclasses.keep(self._node, args, kwargs, lambda: trace(target, args, kwargs))
        return self._calls.run(target, args, kwargs, lambda: trace(target, args, kwargs))

    def _exit(self) -> None:
        with torch._C.DisableTorchFunction():
            autocast_mode._exit_autocast(self._entered.pop())  # type: ignore[no-untyped-call]


def _function_transform(gm: GraphModule) -> Node | None:
    """What enters a function transform (vmap, torch.func.grad), or is called inside of one."""
    calls = gm.graph.nodes
    return next((n for n in calls if str(getattr(n.target, "__module__", "")).startswith("torch._functorch")), None)


def _require_no_fake_constants(traced: GraphModule) -> None:
    """A tensor that tracing lost sight of (inside vmap or grad, for one) would be a constant without a value."""
    for node in traced.graph.nodes:
        held = getattr(traced, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(held, FakeTensor) or _is_transformed(held) or _is_transformed(node.meta.get("val")):
            raise LoweringError(f"a value inside a function transform cannot be traced ({node.op} {node.target})")
        if is_enclosing(node.target):
            for body in modules_of(node).values():
                _require_no_fake_constants(body)


def _is_transformed(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def _fakify(x: Any, fake_mode: FakeTensorMode, context: TracingContext | None) -> Any:
    """The input as a fake tensor with Dynamo's own symbols, which are found by the input's source.

    Without it, sizes that Dynamo gave symbols would get new symbols, and Dynamo could not write guards for those.
    """
    if not isinstance(x, torch.Tensor) or (isinstance(x, FakeTensor) and x.fake_mode is fake_mode):
        return x
    symbolic = context.tensor_to_context.get(x) if context is not None else None  # type: ignore[no-untyped-call]
    if symbolic is None:
        return fake_mode.from_tensor(x, static_shapes=True)
    return fake_mode.from_tensor(x, source=symbolic.tensor_source, symbolic_context=symbolic)


def _carry_metadata(source: GraphModule, target: GraphModule) -> None:
    for old, new in zip(placeholders(source), placeholders(target), strict=True):
        for key in CARRIED_META:
            if key in old.meta:
                new.meta[key] = old.meta[key]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    target.meta.update(source.meta)
    if hasattr(source, "_param_name_to_source"):
        target._param_name_to_source = source._param_name_to_source
    for name in [n for n in target._buffers if n.startswith("_tensor_constant")]:
        constant = target._buffers.pop(name)
        setattr(target, name, constant)
