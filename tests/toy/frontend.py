"""The toy in a graph: one spelling, one check, and its operator in the place of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from monarch_compile.config import MonarchConfig
from monarch_compile.decision import EXACT, LOWERED, Decision
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.frontends import Frontend
from monarch_compile.passes.graph import aten, dim_of, dtype_of, inputs, same_shape, shape_of
from monarch_compile.passes.safety import Footprint, Order, write_between
from monarch_compile.passes.state import Choice, RefusedSite, kept_exact
from monarch_compile.passes.surroundings import Surroundings
from monarch_compile.refusal import Refusal
from tests.toy.family import FAMILY, Gate


@dataclass(frozen=True)
class GateRegion:
    """x * sigmoid(x) + y."""

    anchor: Node
    x: Node
    y: Node
    inside: tuple[Node, ...]


def _read(node: Node) -> GateRegion | None:
    if node.target is not aten.add.Tensor or node.kwargs or len(inputs(node)) != 2:
        return None
    product, y = inputs(node)
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor or len(product.users) != 1:
        return None
    x, sigmoid = inputs(product)
    if not isinstance(sigmoid, Node) or sigmoid.target is not aten.sigmoid.default or inputs(sigmoid) != (x,):
        return None
    return GateRegion(node, x, y, (sigmoid, product, node)) if len(sigmoid.users) == 1 else None


def find(gm: GraphModule) -> list[Any]:
    """Every toy of a graph, in its order."""
    found: list[Any] = []
    for node in gm.graph.nodes:
        region = _read(node)
        if region is not None and dtype_of(node) is not torch.float32:
            found.append(RefusedSite(node, Refusal("dtype", f"dtype {dtype_of(node)}", node)))
        elif region is not None and same_shape(region.x, node) and len(shape_of(node)) == 2:
            found.append(region)
    return found


def choose(
    site: GateRegion | RefusedSite, name: str, config: MonarchConfig, around: Surroundings, layouts: Layouts
) -> Choice:
    """Lower it where nothing is written meanwhile, and the plan and the policy want it."""
    base = Decision("toy", name, EXACT, "match", "", "", site.anchor.name, dtype=dtype_of(site.anchor))
    if isinstance(site, RefusedSite):
        return Choice(kept_exact(base, "match", site.refusal))
    footprint = Footprint(site.anchor, site.inside, (site.x, site.y))
    written = write_between(footprint, Order.of(site.anchor.graph))
    if written is not None:
        return Choice(kept_exact(base, "legality", Refusal("mutation", *written)))
    if config.plan is not None and config.plan.has(name) and config.plan.site(name, ()).form is None:
        return Choice(kept_exact(base, "cost", Refusal("plan_exact", "the plan keeps it exact")))
    if config.policy == "never":
        return Choice(kept_exact(base, "cost", Refusal("policy_never", "policy is 'never'")))
    rows, columns = map(dim_of, shape_of(site.anchor))
    ir = Gate(rows, columns, torch.float32)
    gain = FAMILY.predict(ir, None, None, None).speedup
    decision = Decision("toy", name, LOWERED, "lowered", "lowered", "fused", site.anchor.name, ir=ir)
    return Choice(decision, site, ir, frozenset(site.inside), gain)


def lower(choice: Choice) -> Node:
    """The operator in the place of the addition."""
    region = choice.region
    with region.anchor.graph.inserting_before(region.anchor):
        op = region.anchor.graph.call_function(torch.ops.monarch_toy.gate.default, (region.x, region.y))
    op.meta = dict(region.anchor.meta)
    region.anchor.replace_all_uses_with(op)
    region.anchor.graph.erase_node(region.anchor)
    return op


FRONTEND = Frontend(
    family="toy",
    op=torch.ops.monarch_toy.gate.default,
    num_tensors=2,
    laid_out=lambda x: x.new_empty(x.shape),
    find=find,
    choose=choose,
    lower=lower,
)
