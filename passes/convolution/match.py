"""Finds long convolutions: inverse transforms of products of transforms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from monarch_compile.passes.capture.bodies import WHY, bodies_of
from monarch_compile.passes.capture.enclosed import CLOSED, is_opened
from monarch_compile.passes.capture.trace import to_aten
from monarch_compile.passes.convolution.ending import Context, ending_of
from monarch_compile.passes.convolution.inputs import Taken, before_casts, taken, taken_with_gate
from monarch_compile.passes.convolution.reach import Reach
from monarch_compile.passes.convolution.region import ConvolutionRegion, Ending, Operand, Part, Site
from monarch_compile.passes.convolution.roles import Roles, roles_of
from monarch_compile.passes.convolution.spectra import Reader, Spectrum, transforms_above
from monarch_compile.passes.convolution.transforms import INVERSE, Transform, is_inverse, is_same
from monarch_compile.passes.graph import dtype_of, inputs, modules_of
from monarch_compile.passes.state import RefusedSite
from monarch_compile.refusal import Refusal, Refused


def find_sites(gm: GraphModule) -> list[Site]:
    """Every long convolution of a graph and of the bodies in it, in its order; what was not understood is refused."""
    sites: list[Site] = []
    replaced: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, HigherOrderOperator):
            sites += _inside(node)
        elif is_inverse(node):
            site = _site(node, replaced)
            sites += [] if site is None else [site]
            replaced |= {*site.replaced} if isinstance(site, ConvolutionRegion) else set()
    return _without_reused(sites)


def _inside(node: Node) -> list[Site]:
    """The convolutions in the bodies of a higher-order op: as any other where they are opened, else kept."""
    if is_opened(node):
        return [site for body in modules_of(node).values() for site in find_sites(body)]
    name = str(getattr(node.target, "__name__", node.target))
    why = f"it stands in the body of {WHY.get(name, name)}, which {node.meta.get(CLOSED) or 'is kept as it is'}"
    sites = [site for body in bodies_of(node, to_aten) for site in find_sites(body)]
    return [RefusedSite(site.anchor, Refusal("in_body", why, site.anchor)) for site in sites]


def _site(node: Node, replaced: Iterable[Node]) -> Site | None:
    """The convolution that an inverse transform ends, its refusal, or None where there is none.

    replaced: nodes after other inverse transforms that belong to their regions.
    """
    try:
        inverse = INVERSE[node.target](node)
        reader = Reader()
        spectrum = reader(inverse.source)
        if not any(len(term.factors) > 1 for term in spectrum.terms):
            return None
        _require_points(inverse, spectrum)
        return _region(inverse, spectrum, reader, replaced)
    except Refused as refused:
        return RefusedSite(node, refused.refusal) if _is_near(node, refused.refusal) else None


def _is_near(node: Node, refusal: Refusal) -> bool:
    """Whether what was refused multiplies two transforms, or one by what is no transform."""
    above = transforms_above(inputs(node)[0])
    return len(above) > 1 or (bool(above) and refusal.code in ALONE)


ALONE = frozenset({"learned_spectrum", "several_factors", "filter_per_sequence"})
"""Refusals of what has a single transform."""


def _require_points(inverse: Transform, spectrum: Spectrum) -> None:
    if inverse.axis != spectrum.axis or not is_same(inverse.points, spectrum.points):
        why = f"a spectrum of {spectrum.points} points is transformed back to {inverse.points}, or along another dim"
        raise Refused("transform_points", why, inverse.node)
    if not inverse.gives_real and not spectrum.is_whole:
        raise Refused("transform_points", "a half spectrum is transformed back as if it were whole", inverse.node)


def _region(inverse: Transform, spectrum: Spectrum, reader: Reader, replaced: Iterable[Node]) -> ConvolutionRegion:
    roles = roles_of(spectrum, inverse.source)
    reach = Reach.of(inverse.node, replaced)
    axis = roles.frame.axis
    spectra = tuple(node for node, read in reader.read.items() if _is_made_of(read, roles.u))
    rest = tuple(node for node in reader.read if node not in spectra)
    gated = _ended(inverse, roles, taken_with_gate(roles.u, axis, reach), reach)
    if not gated.serves_alone({*spectra, inverse.node}):
        gated = _ended(inverse, roles, taken(roles.u, axis, reach), reach)
    own, ending = gated.taken, gated.ending
    parts, filters_inside = _taken_parts(roles.parts, axis, reach)
    inside = (*own.inside, *rest, *spectra, *filters_inside, *ending.inside, inverse.node, ending.output)
    dtype = dtype_of(inverse.node)
    assert dtype is not None
    return ConvolutionRegion(
        anchor=inverse.node,
        u=own.operand,
        pre_gate=own.gate,
        parts=parts,
        points=spectrum.points,
        frame=roles.frame,
        ending=ending,
        inside=tuple(dict.fromkeys(inside)),
        spectra=spectra,
        dtype=torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32,
    )


@dataclass(frozen=True)
class _Gated:
    """An input, with or without a gate, and the ending that goes with it."""

    taken: Taken
    ending: Ending

    def serves_alone(self, spectra: Iterable[Node]) -> bool:
        """Whether nothing but the convolution reads what the gate makes."""
        inside = {*self.taken.inside, *spectra, *self.ending.inside, self.ending.output}
        return all(inside.issuperset(node.users) for node in self.taken.gated)


def _ended(inverse: Transform, roles: Roles, own: Taken, reach: Reach) -> _Gated:
    """The ending of a convolution with this input; a skip term is of what the gate makes of it."""
    plain = len(roles.parts) == 1 and not roles.parts[0].reversed
    whole = own.gated[0] if own.gated else own.operand.node
    skipped = replace(roles.u, node=before_casts(whole))
    context = Context(inverse.points, roles.frame, reach, skipped, own.operand.size(roles.frame.axis), plain)
    return _Gated(own, ending_of(inverse, context))


def _taken_parts(parts: Iterable[Part], axis: int, reach: Reach) -> tuple[tuple[Part, ...], tuple[Node, ...]]:
    """The parts with their filters before casts and padding, and the nodes between."""
    inside: list[Node] = []
    found = []
    for part in parts:
        terms = []
        for term in part.terms:
            own = taken(term.operand, axis, reach)
            inside += own.inside
            terms.append(replace(term, operand=own.operand))
        found.append(replace(part, terms=tuple(terms)))
    return tuple(found), tuple(inside)


def _is_made_of(spectrum: Spectrum, u: Operand) -> bool:
    return any(factor.source is u.node for term in spectrum.terms for factor in term.factors)


def _without_reused(sites: list[Site]) -> list[Site]:
    """Refuse the convolutions whose spectra are read elsewhere, but by other convolutions."""
    while True:
        inside = {node for region in _regions(sites) for node in region.inside}
        reused = {
            region.anchor: node
            for region in _regions(sites)
            for node in region.spectra
            if not inside.issuperset(node.users)
        }
        if not reused:
            return sites
        why = "the transform of the input, or its product with the filter's, is read elsewhere too"
        sites = [
            RefusedSite(site.anchor, Refusal("spectrum_reused", why, reused[site.anchor]))
            if site.anchor in reused
            else site
            for site in sites
        ]


def _regions(sites: Iterable[Site]) -> Iterator[ConvolutionRegion]:
    return (site for site in sites if isinstance(site, ConvolutionRegion))
