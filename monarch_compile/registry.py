"""The families of operators. A family is a line here and the modules that it names."""

from __future__ import annotations

from typing import NamedTuple


class Modules(NamedTuple):
    """Where the parts of a family are, by the names of their modules: they never import each other.

    family: `FAMILY`, a `monarch_compile.family.Family`: what the report and the cost model ask.
    frontend: `FRONTEND`, a `monarch_compile.passes.frontends.Frontend`: from a graph to the IR and back.
    emitter: `EMITTER`, a `monarch_compile.codegen.emitters.Emitter`: from the IR to kernels.
    gradients: `GRADIENTS`, an `Emitter` of the kernels of its gradients; "" where they have none of their own.
    commands: `COMMANDS`, a `monarch_compile.tools.commands.Commands`: what it adds to the command line; "" for nothing.
    benchmark: a package of a checkout, which `bench` runs by the family's name; "" for none.
    occurs_with: parts of the names of operators, one of which every graph has that holds a site; none: any graph may.
    """

    family: str
    frontend: str
    emitter: str
    gradients: str = ""
    commands: str = ""
    benchmark: str = ""
    occurs_with: tuple[str, ...] = ()


FAMILIES: dict[str, Modules] = {
    "attention": Modules(
        family="monarch_compile.attention.family",
        frontend="monarch_compile.passes.attention.frontend",
        emitter="monarch_compile.codegen.attention.emitter",
        gradients="monarch_compile.codegen.attention.gradient_emitter",
        commands="monarch_compile.attention.commands",
    ),
    "convolution": Modules(
        family="monarch_compile.convolution.family",
        frontend="monarch_compile.passes.convolution.frontend",
        emitter="monarch_compile.codegen.convolution.emitter",
        benchmark="benchmarks.convolution",
        occurs_with=("fft", "long_convolution"),
    ),
    "linear": Modules(
        family="monarch_compile.linear.family",
        frontend="monarch_compile.passes.linear.frontend",
        emitter="monarch_compile.codegen.linear.emitter",
        benchmark="benchmarks.linear",
        occurs_with=("bmm", "matmul", "einsum", "block_linear"),
    ),
}
"""By name. Of two families that claim one node with the same predicted gain, the first is lowered."""
