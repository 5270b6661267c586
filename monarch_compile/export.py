"""Programs of torch.export: the backend's passes, applied ahead of time."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from monarch_compile.backend import rewritten
from monarch_compile.calls import AHEAD_OF_TIME
from monarch_compile.config import parse_options
from monarch_compile.errors import ConfigError

logger = logging.getLogger(__name__)


def lower_exported(program: ExportedProgram, options: Mapping[str, Any] | None = None) -> ExportedProgram:
    """`program` with its sites lowered where that is legal and pays, as ``backend="monarch"`` does under `options`.

    Weights are shared with `program`, which is not changed; where nothing is lowered it is returned itself. A lowered
    site is a call of its family's operator: import monarch_compile.attention.op and monarch_compile.convolution.op,
    which register them, before torch.export.load. AOTInductor compiles what is behind the operator into the package,
    which then needs this library no more.

    Args:
        program: from torch.export.export, with static or dynamic shapes (dynamic lengths need a number for block_size).
        options: those of `MonarchConfig` but `mode` and `autotune`; Inductor's keys belong to AOTInductor.

    Raises:
        ConfigError: an option is unknown, has a value that is not allowed, or means nothing here.
        PlanError: the plan cannot be read or does not fit the model.
        LoweringError: strict mode, and a site stayed exact for lack of support or a pass failed.
    """
    from monarch_compile.passes.capture.enclosed import all_graphs

    config, patches = parse_options(options)
    unused = [*patches, *(name for name in ("mode", "autotune") if getattr(config, name))]
    if unused:
        raise ConfigError(f"an exported program is compiled later, by AOTInductor: no use for {', '.join(unused)}")
    source = program.graph_module
    inputs = [node.meta.get("val") for node in source.graph.find_nodes(op="placeholder")]
    with _weights_noted(program):
        result = rewritten(source, inputs, config, AHEAD_OF_TIME)
    if result is None or not result.num_lowered:
        logger.warning("nothing is lowered in this program; TORCH_LOGS='+monarch_compile.passes' tells why")
        return program
    lowered = result.after
    _name_inputs(source, lowered)
    for gm in all_graphs(lowered):
        _give_values(gm)
        gm.recompile()
    signature = copy.deepcopy(program.graph_signature)
    for spec, node in zip(signature.output_specs, _outputs(lowered), strict=True):
        if isinstance(node, Node):
            spec.arg.name = node.name
    return ExportedProgram(
        root=lowered,
        graph=lowered.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=[program.verifier],
    )


@contextlib.contextmanager
def _weights_noted(program: ExportedProgram) -> Iterator[None]:
    """While this lasts, inputs of the program's graph that no caller gives say so."""
    from monarch_compile.passes.graph import WEIGHT

    given = set(program.graph_signature.user_inputs)
    weights = [node for node in program.graph.find_nodes(op="placeholder") if node.name not in given]
    for node in weights:
        node.meta[WEIGHT] = True
    try:
        yield
    finally:
        for node in weights:
            del node.meta[WEIGHT]


def _outputs(gm: GraphModule) -> Any:
    return next(iter(gm.graph.find_nodes(op="output"))).args[0]


def _name_inputs(source: GraphModule, target: GraphModule) -> None:
    """The program's signature knows inputs by name."""
    olds, news = (list(gm.graph.find_nodes(op="placeholder")) for gm in (source, target))
    names = {node.name for node in olds}
    for node in target.graph.nodes:
        if node.name in names:
            node._rename(f"{node.name}_inner")
    for old, new in zip(olds, news, strict=True):
        new._rename(old.name)
        new.target = old.target
        new.meta["val"] = old.meta.get("val")


def _give_values(gm: GraphModule) -> None:
    """The fake values that a program's nodes must have, for nodes that lowering made."""
    from monarch_compile.passes.graph import fake_value

    values = [node.meta.get("val") for node in gm.graph.nodes]
    fake_mode = detect_fake_mode(values)
    assert fake_mode is not None  # a site was found in it, hence a tensor
    for node in gm.graph.nodes:
        if node.op == "call_function":
            fake_value(node, fake_mode)
