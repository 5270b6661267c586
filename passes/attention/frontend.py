"""The frontend of attention."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from monarch_compile.attention.op import ATTENTION_OP, ATTENTION_WITH_LSE_OP
from monarch_compile.passes.attention.anchors import is_no_attention
from monarch_compile.passes.attention.choose import FAMILY, choose
from monarch_compile.passes.attention.fusion import keep_from_fusion, may_be_misread
from monarch_compile.passes.attention.heads import share_heads
from monarch_compile.passes.attention.lower import as_op_gives, lower
from monarch_compile.passes.attention.match import find_sites
from monarch_compile.passes.attention.operands import hoist_scales, without_copies
from monarch_compile.passes.attention.region import AttentionRegion, Site
from monarch_compile.passes.attention.softmaxes import softmaxes_of
from monarch_compile.passes.capture.enclosed import all_graphs, copy_graph
from monarch_compile.passes.frontends import Frontend
from monarch_compile.passes.state import Choice, Pass, State


def _hoist_scales(state: State) -> str:
    return f"{state.on_each_graph(hoist_scales)} scales moved behind a reshape"


def _find(gm: GraphModule) -> list[Site]:
    """Every site, its operands taken before copies and before heads are repeated."""
    found = find_sites(gm)
    return [share_heads(without_copies(site)) if isinstance(site, AttentionRegion) else site for site in found]


def _lower(choice: Choice) -> Node:
    return lower(choice.region, choice.details, choice.ir, trains=choice.decision.calls.trains)


def _keep_from_fusion(state: State) -> str:
    graphs = {gm.graph for gm in all_graphs(state.graph)}
    pairs = list(state.of_family(FAMILY))
    stay = [site.anchor for site, choice in pairs if not choice.lowers and site.anchor.graph in graphs]
    anchors = {site.anchor for site, _ in pairs}
    softmaxes = {node: found for graph in graphs for node, found in softmaxes_of(graph).items()}
    others = [node for node, softmax in softmaxes.items() if node not in anchors and is_no_attention(softmax)]
    misread = [anchor for anchor in (*stay, *others) if may_be_misread(anchor, softmaxes.get(anchor))]
    if misread and state.before is None:
        state.before = copy_graph(state.graph)
    for anchor in misread:
        keep_from_fusion(anchor)
    state.num_protected += len(misread)
    return f"{len(misread)} softmaxes kept from Inductor's fusion"


FRONTEND = Frontend(
    family=FAMILY,
    op=ATTENTION_OP,
    trained_op=ATTENTION_WITH_LSE_OP,
    num_tensors=4,
    laid_out=lambda x: as_op_gives(x, x.shape),
    find=_find,
    choose=choose,
    lower=_lower,
    prepare=(Pass("hoist_scales", _hoist_scales),),
    finish=(Pass("keep_from_fusion", _keep_from_fusion),),
)
