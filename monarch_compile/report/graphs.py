"""FX graphs as networkx graphs, and windows of them drawn as SVG: what a report shows of a rewrite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from jinja2 import Environment
from torch.fx import Graph, Node

MAX_NODES = 28
CHAR, LINE, PAD, GAP_X, GAP_Y = 6.7, 15, 9, 16, 30


def to_networkx(graph: Graph, prefix: str, others: Iterable[str] = (), *, after: bool = False) -> nx.DiGraph:
    """`graph` with a node for each FX node, keyed `prefix/name`, with attributes target, shape and role.

    `others` are the node names of the graph on the other side of the rewrite: a node missing there is "replaced"
    (before) or "new" (after); the operator of a lowered site is "monarch".
    """
    known = set(others)
    result = nx.DiGraph()
    for node in graph.nodes:
        role = _role(node, known, after)
        result.add_node(f"{prefix}/{node.name}", name=node.name, target=_target(node), shape=_shape(node), role=role)
        result.add_edges_from((f"{prefix}/{used.name}", f"{prefix}/{node.name}") for used in node.all_input_nodes)
    return result


def _role(node: Node, known: set[str], after: bool) -> str:
    if "monarch_compile" in str(node.target):
        return "monarch"
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "output":
        return "output"
    if known and node.name not in known:
        return "new" if after else "replaced"
    return "op"


def _target(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target) if node.op != "output" else "output"
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "")
    return (name or str(node.target)).removesuffix(".default")


def _shape(node: Node) -> str:
    value: Any = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def site_windows(before: nx.DiGraph, after: nx.DiGraph, key: str) -> tuple[nx.DiGraph, nx.DiGraph]:
    """What surrounds the node `key` of `before`, there and in `after`: the replaced nodes, their inputs and users."""
    if key not in before:
        return nx.DiGraph(), nx.DiGraph()
    replaced = {n for n, role in before.nodes(data="role") if role == "replaced"}
    core = _component(before, replaced, {key}) if key in replaced else _upstream(before, key, depth=6)
    window = _bordered(before, core)
    border = window - core if key in replaced else window
    added = {n for n, role in after.nodes(data="role") if role in ("new", "monarch")}
    touching = {n for b in border if b in after for n in (*after.successors(b), *after.predecessors(b)) if n in added}
    matching = _bordered(after, _component(after, added, touching)) if touching else {n for n in window if n in after}
    return before.subgraph(window), after.subgraph(matching)


def _component(graph: nx.DiGraph, allowed: set[str], start: set[str]) -> set[str]:
    """Nodes of `allowed` connected to `start` through `allowed`."""
    inner = graph.subgraph(allowed)
    reached = [nx.node_connected_component(inner.to_undirected(as_view=True), n) for n in start if n in inner]
    return set().union(*reached) if reached else set(start)


def _upstream(graph: nx.DiGraph, key: str, depth: int) -> set[str]:
    found = nx.single_source_shortest_path_length(graph.reverse(copy=False), key, cutoff=depth)
    return set(list(found)[: MAX_NODES // 2])


def _bordered(graph: nx.DiGraph, core: set[str]) -> set[str]:
    """`core` with its direct inputs and users, inputs first where there are too many."""
    inputs = [p for n in sorted(core) for p in graph.predecessors(n) if p not in core]
    users = [s for n in sorted(core) for s in graph.successors(n) if s not in core]
    room = max(MAX_NODES - len(core), 0)
    return core | set(list(dict.fromkeys([*inputs, *users]))[:room])


@dataclass(frozen=True)
class Box:
    """A node placed on the canvas: left, top, width, height in pixels."""

    x: float
    y: float
    w: float
    h: float
    lines: tuple[str, ...]
    role: str


SVG = """\
<svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}" role="img">
{%- for d in edges %}<path class="edge" d="{{ d }}"/>{% endfor %}
{%- for b in boxes %}
<g class="node {{ b.role }}"><rect x="{{ b.x }}" y="{{ b.y }}" width="{{ b.w }}" height="{{ b.h }}" rx="6"/>
{%- for line in b.lines %}<text x="{{ b.x + b.w / 2 }}" y="{{ b.y + 17 + 15 * loop.index0 }}"
 {%- if loop.index0 %} class="shape"{% endif %}>{{ line }}</text>{% endfor %}</g>
{%- endfor %}
</svg>"""


def to_svg(graph: nx.DiGraph) -> str:
    """`graph` (acyclic) drawn top down in layers, one for each topological generation; "" where it is empty."""
    if not graph:
        return ""
    boxes, width, height = _layout(graph)
    edges = [_curve(boxes[a], boxes[b]) for a, b in graph.edges]
    template = Environment(autoescape=True).from_string(SVG)
    return template.render(width=round(width), height=round(height), boxes=list(boxes.values()), edges=edges)


def _layout(graph: nx.DiGraph) -> tuple[dict[str, Box], float, float]:
    layers = _layers(graph)
    sizes = {n: _size(graph.nodes[n]) for n in graph}
    widths = [sum(sizes[n][0] for n in layer) + GAP_X * (len(layer) - 1) for layer in layers]
    total = max(widths) + 2 * GAP_X
    boxes: dict[str, Box] = {}
    y = 4.0
    for layer, width in zip(layers, widths, strict=True):
        x = (total - width) / 2
        for n in layer:
            w, h, lines = sizes[n]
            boxes[n] = Box(round(x, 1), y, round(w, 1), h, lines, graph.nodes[n]["role"])
            x += w + GAP_X
        y += max(sizes[n][1] for n in layer) + GAP_Y
    return boxes, total, y - GAP_Y + 6


def _layers(graph: nx.DiGraph) -> list[list[str]]:
    """Generations of the graph, inputs moved down next to their first user, each ordered by its neighbours above."""
    level = {n: i for i, layer in enumerate(nx.topological_generations(graph)) for n in layer}
    for n in level:
        if not graph.in_degree(n) and graph.out_degree(n):
            level[n] = min(level[s] for s in graph.successors(n)) - 1
    layers: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for n in sorted(graph, key=lambda n: (level[n], n)):
        layers[level[n]].append(n)
    place: dict[str, float] = {}
    for layer in layers:
        layer.sort(key=lambda n: _barycentre(place, list(graph.predecessors(n))))
        place.update({n: (i + 0.5) / len(layer) for i, n in enumerate(layer)})
    return [layer for layer in layers if layer]


def _barycentre(place: dict[str, float], neighbours: list[str]) -> float:
    known = [place[n] for n in neighbours if n in place]
    return sum(known) / len(known) if known else 0.5


def _size(data: dict[str, Any]) -> tuple[float, int, tuple[str, ...]]:
    lines = tuple(_short(text) for text in (data["target"], data["shape"]) if text)
    return max(map(len, lines), default=4) * CHAR + 2 * PAD, len(lines) * LINE + PAD, lines


def _short(text: str, limit: int = 34) -> str:
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


def _curve(a: Box, b: Box) -> str:
    x1, y1, x2, y2 = a.x + a.w / 2, a.y + a.h, b.x + b.w / 2, b.y
    bend = max((y2 - y1) / 2, 12)
    return f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
