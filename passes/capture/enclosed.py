"""Bodies of cond, scan and while_loop: lowered where they stand, by what the call tells of their inputs.

The call stays as it is; each of its bodies is a graph of its own, whose inputs know what they were given where that is
the same at every run of the body. A carry and a slice of what is scanned differ from step to step: they are unknown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from monarch_compile.passes.graph import dtype_of, inputs, modules_of, placeholders, same_shape
from monarch_compile.passes.memory import writes_to_inputs

GIVEN = "monarch_compile_given"
"""Where an input of a body notes the call that runs it."""

CLOSED = "monarch_compile_closed"
"""Where a call notes why its bodies are not lowered; "" where they may be."""


@dataclass(frozen=True)
class Kind:
    """A higher-order op whose bodies are lowered: what these are, in its order, and the values that their inputs have.

    values: of the op's arguments, one for each input of a body; None where it differs from run to run.
    """

    bodies: tuple[str, ...]
    values: Callable[[tuple[Any, ...]], list[Any]]


KINDS: dict[str, Kind] = {
    "cond": Kind(("the true branch of cond", "the false branch of cond"), lambda args: [*args[3]]),
    "scan": Kind(("a step of scan",), lambda args: [*[None] * (len(args[1]) + len(args[2])), *args[3]]),
    "while_loop": Kind(
        ("the condition of while_loop", "a step of while_loop"), lambda args: [*[None] * len(args[2]), *args[3]]
    ),
}


@dataclass(frozen=True, eq=False)
class Given:
    """What the `place`-th input of a body knows: the call that runs it, and which of its bodies this is.

    path: names of the modules that hold the body, from the graph that holds all.
    """

    call: Node
    body: str
    path: str
    place: int

    @property
    def value(self) -> Any:
        """What the call gives, as passes have left it; None where it differs from run to run."""
        return KINDS[_name(self.call)].values(inputs(self.call))[self.place]


def is_enclosing(target: object) -> bool:
    """Whether a call runs bodies that are lowered where they stand."""
    return isinstance(target, HigherOrderOperator) and target.__name__ in KINDS


def given_to(node: Node) -> Given | None:
    """What an input of a body was given; None for any other node."""
    found: Given | None = node.meta.get(GIVEN) if node.op == "placeholder" else None
    return found


def given_value(node: Node) -> Node | None:
    """The node outside that an input of a body is at every run, if that is known."""
    given = given_to(node)
    value = None if given is None else given.value
    alike = isinstance(value, Node) and dtype_of(node) is dtype_of(value) is not None and same_shape(node, value)
    return value if alike else None


def enclosing(graph: Graph) -> Given | None:
    """Of which call a graph is an opened body; None for the outermost graph."""
    return next((given_to(node) for node in graph.find_nodes(op="placeholder")), None)


def place_of(graph: Graph) -> str:
    """In which body of which calls a graph stands, in words; "" for the outermost."""
    given = enclosing(graph)
    return "" if given is None else f" in {given.body}{place_of(given.call.graph)}"


def path_of(graph: Graph) -> str:
    """Names of the modules that hold an opened body, each with a slash after it; "" for the outermost graph."""
    given = enclosing(graph)
    return "" if given is None else f"{given.path}/"


def name_of(node: Node) -> str:
    """A node's name, after those of the modules that hold it: no other node in the graph or in a body has it."""
    return f"{path_of(node.graph)}{node.name}"


def open_bodies(gm: GraphModule, *, trains: bool) -> int:
    """Note on the inputs of every body that may be lowered, nested ones too, what is known; how many bodies there are.

    trains: the graph is differentiated.
    """
    found = 0
    for call in _calls(gm):
        kind, bodies = KINDS[_name(call)], modules_of(call)
        call.meta[CLOSED] = _why_closed(kind, call, trains)
        if call.meta[CLOSED]:
            continue
        for what, (name, body) in zip(kind.bodies, bodies.items(), strict=True):
            path = f"{path_of(call.graph)}{name}"
            for place, head in enumerate(placeholders(body)):
                head.meta[GIVEN] = Given(call, what, path, place)
            found += 1 + open_bodies(body, trains=trains)
    return found


def _why_closed(kind: Kind, call: Node, trains: bool) -> str:
    bodies, num_inputs = modules_of(call).values(), len(kind.values(inputs(call)))
    if len(bodies) != len(kind.bodies) or any(len(placeholders(body)) != num_inputs for body in bodies):
        return "is called in a way that is not understood"
    if any(map(writes_to_inputs, bodies)):
        return "writes to what it is given"
    # The gradients of both branches, or of a carry and the next, must lie alike in memory, which ours are not made to.
    return "is differentiated, and stays exact in training" if trains else ""


def is_opened(call: Node) -> bool:
    """Whether a call runs bodies that may be lowered."""
    return call.meta.get(CLOSED) == ""


def opened_bodies(gm: GraphModule) -> Iterator[GraphModule]:
    """The bodies of a graph's calls that may be lowered, without those in them."""
    for call in _calls(gm):
        if is_opened(call):
            yield from modules_of(call).values()


def all_graphs(gm: GraphModule) -> Iterator[GraphModule]:
    """A graph, and the bodies in it that may be lowered, each after the one that holds it."""
    yield gm
    for body in opened_bodies(gm):
        yield from all_graphs(body)


def _calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and is_enclosing(node.target)]


def _name(call: Node) -> str:
    return str(getattr(call.target, "__name__", ""))


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy that keeps nodes' metadata and shares parameters; bodies that may be lowered are copied too."""
    graph = copy.copy(gm)
    copies = {id(body): copy_graph(body) for body in opened_bodies(gm)}
    graph._modules = {name: copies.get(id(module), module) for name, module in gm._modules.items()}
    graph.graph = type(gm.graph)()
    mapping: dict[Node, Node] = {}
    result = graph.graph.graph_copy(gm.graph, mapping)
    output = next(iter(gm.graph.find_nodes(op="output")))
    graph.graph.output(result)
    new_output = next(iter(graph.graph.find_nodes(op="output")))
    new_output.meta = dict(output.meta)
    gm.graph.owning_module = gm  # copying a module makes its graph the copy's
    return graph
