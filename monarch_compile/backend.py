"""The torch.compile backend: run the passes, hand the rest to Inductor."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import trace_structured
from torch.fx import Graph, GraphModule

from monarch_compile.agreement import require_equal_compilation
from monarch_compile.calls import Launcher, is_trained, launcher_of
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.decision import EXACT, LOWERED, Decision
from monarch_compile.errors import CodegenError, ConfigError, LoweringError, PlanError
from monarch_compile.refusal import CODES
from monarch_compile.version import __version__

if TYPE_CHECKING:
    from monarch_compile.passes.pipeline import Rewrite

logger = logging.getLogger(__name__)


class CacheKey(CustomGraphPass):  # type: ignore[misc]
    """A pass that puts our sources and options into the key of every compile cache, and runs the user's own pass.

    more: what else the compiled code depends on and Inductor's own key does not hold.
    theirs: the passes that the user has for the same place (`joint_custom_pre_pass`), in order.
    """

    def __init__(self, config: MonarchConfig, more: str = "", theirs: Sequence[Callable[[Graph], None]] = ()) -> None:
        self._config = config
        self._more = more
        self._theirs = tuple(theirs)

    def __call__(self, graph: Graph) -> None:
        """Run the user's passes; ours leaves the graph as it is."""
        for run in self._theirs:
            run(graph)

    def uuid(self) -> str | None:
        """The hash that goes into the key; None, so that nothing is cached, where a user's pass has none."""
        from monarch_compile.passes.pipeline import source_digest

        found = [run.uuid() if isinstance(run, CustomGraphPass) else None for run in self._theirs]
        if not all(found):
            return None
        own = f"monarch_compile-{source_digest()}-{self._config.digest()}{self._more}"
        return "-".join([own, *map(repr, found)])


def monarch(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph from Dynamo: its sites are lowered where that is legal and pays.

    Options are those of `MonarchConfig`; other keys go to Inductor's config.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed, or the grid does not fit the model, or
            another rank of torch.distributed compiled the same graph with other options.
        PlanError: the plan cannot be read or does not fit the model.
        LoweringError: strict mode, and a site stayed exact for lack of support or a pass failed.
    """
    from torch._inductor.compile_fx import compile_fx

    config, patches = parse_options(options, mode)
    require_equal_compilation(gm.code, {**vars(config), "monarch_compile": __version__})
    result = rewritten(gm, example_inputs, config, launcher_of(patches))
    lowered = gm
    if result is not None:
        lowered = result.after
        if _may_share(example_inputs, patches):
            _share(result)
        schedules = _autotune(result.decisions) if config.autotune else ""
        _dump_kernels(result)
        key = CacheKey(config, schedules + _checkpoints(lowered), _own_passes(patches))
        patches["joint_custom_pre_pass"] = key
        _complete_cant_split()
    compiled: Callable[..., Any] = compile_fx(lowered, example_inputs, config_patches=patches or None)
    return compiled


def _complete_cant_split() -> None:
    """Let Inductor of torch 2.11 raise its CantSplit, which it does without arguments: a TypeError, which it does not
    catch, where it should try other loops. Gradients of several iterations on a CUDA device meet it.
    """
    from torch._inductor.codegen.simd import CantSplit

    initialize: Any = CantSplit.__init__
    if initialize.__code__.co_argcount == 3 and initialize.__defaults__ is None:
        initialize.__defaults__ = (None, None)


def _own_passes(patches: Mapping[str, Any]) -> tuple[Callable[[Graph], None], ...]:
    """The passes that the user has put where our key goes: in the options, else in Inductor's config."""
    from torch._inductor import config

    given = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    return tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)


def _checkpoints(gm: GraphModule) -> str:
    """Which nodes belong to which activation checkpoint: AOTAutograd reads it off them, its cache does not."""
    from monarch_compile.passes.graph import REGION

    graphs = [module.graph for module in gm.modules() if isinstance(module, GraphModule)]
    marks = [tuple(node.meta.get(key) for key in REGION) for graph in graphs for node in graph.nodes]
    order = list(dict.fromkeys(marks))  # the numbers of regions differ from run to run
    places = [order.index(mark) for mark in marks]
    return f"-{hashlib.sha256(bytes(str(places), 'ascii')).hexdigest()[:16]}" if len(order) > 1 else ""


def _may_share(example_inputs: Sequence[Any], patches: Mapping[str, Any]) -> bool:
    """Whether sites may share a body: not where a backward is traced, nor in a C++ wrapper, which can call none."""
    from torch._inductor import config

    return not is_trained(example_inputs) and not patches.get("cpp_wrapper", config.cpp_wrapper)


def _share(result: Rewrite) -> None:
    """Let equal sites have one body, which Inductor compiles once."""
    from monarch_compile.passes.sharing import share_bodies

    bodies = share_bodies(result.after)
    if bodies:
        logger.debug("share_bodies: %d bodies for %d lowered sites", bodies, result.num_lowered)
        result.dump.graph("share_bodies", result.after)


def _autotune(decisions: Sequence[Decision]) -> str:
    """Tuned schedules for the lowered sites on CUDA, and for the gradients of those that train; a digest of them."""
    sites = [d for d in decisions if d.status == LOWERED and d.device == "cuda" and d.ir is not None]
    if not sites:
        return ""
    from monarch_compile.codegen.emitters import launched
    from monarch_compile.tools.autotune import Machine, ensure, tunable

    try:
        machine = Machine.here()
    except CodegenError as error:
        logger.warning("no tuning: %s", error)
        return ""
    irs = (ir for site in sites for ir in launched(site.ir, site.calls.trains))
    return f"-{ensure(tunable(irs), machine)}"


def rewritten(
    gm: GraphModule, example_inputs: Sequence[Any], config: MonarchConfig, launcher: Launcher
) -> Rewrite | None:
    """The graph with its sites lowered, or None where Dynamo's own graph is compiled as it is."""
    from monarch_compile.passes.pipeline import rewrite

    try:
        result = rewrite(gm, example_inputs, config, launcher)
    except (
        ConfigError,
        PlanError,
    ):  # the caller's to mend: going on without the plan or grid would hide it
        raise
    except Exception as error:
        counters["monarch"]["fallback"] += 1
        if config.strict:
            raise LoweringError(f"the passes failed on a graph: {error!r}") from error
        foreseen = isinstance(error, LoweringError)
        logger.warning("the passes failed, the graph stays exact: %r", error, exc_info=not foreseen)
        return None
    _record(result)
    if config.strict:
        _require_lowered(result.decisions)
    return result if result.num_lowered or result.num_protected else None


def _record(result: Rewrite) -> None:
    """Count the sites in Dynamo's counters, exact ones also by code, and put them into the structured trace, and what
    was changed beside them."""
    decisions = result.decisions
    codes = Counter(d.code for d in decisions if d.status != LOWERED)
    found = Counter(lowered=sum(d.status == LOWERED for d in decisions), exact=codes.total())
    found.update({f"exact: {code}": number for code, number in codes.items()})
    for name, number in found.items():
        counters["monarch"][name] += number
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "monarch_sites", "encoding": "json"},
        payload_fn=lambda: json.dumps(
            {
                "counts": found,
                "sites": [d.as_json() for d in decisions],
                "changes": [asdict(change) for change in result.changes],
            }
        ),
        expect_trace_id=False,
    )


def _dump_kernels(result: Rewrite) -> None:
    """The kernels of every lowered site, those of gradients where it trains, beside the dumped graphs, each once."""
    if result.dump.folder is None:
        return
    from monarch_compile.report.kernels import kernels_of_site

    lowered = [d for d in result.decisions if d.status == LOWERED and d.ir is not None]
    found = [kernels_of_site(d.ir, d.calls.trains) for d in lowered]
    for kernel in dict.fromkeys(kernel for site in found for kernel in (*site.forward, *site.backward)):
        result.dump.numbered(kernel.file_name, kernel.text)


def _require_lowered(decisions: Sequence[Decision]) -> None:
    from monarch_compile.family import sites_in_words

    missed = [d for d in decisions if d.status == EXACT and not CODES[d.code].is_choice]
    if missed:
        lines = "\n".join(
            f"  {d.name}: [{d.code}] {d.reason} (node {d.node}); would lower with: {d.remedy}" for d in missed
        )
        sites = sites_in_words(decision.family for decision in missed)
        raise LoweringError(f"strict=True and {sites} cannot be lowered:\n{lines}")
