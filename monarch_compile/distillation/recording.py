"""Run the exact model and keep what some of its sites are given: the teacher's inputs and outputs, site by site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from monarch_compile.autocast import put_back
from monarch_compile.calibration.inputs import Call
from monarch_compile.calibration.instrument import Behaviour, Probe, SiteInterpreter, Switch, capture, exact
from monarch_compile.calibration.snapshot import Snapshot
from monarch_compile.config import MonarchConfig
from monarch_compile.distillation.widened import widened
from monarch_compile.family import SiteCall, forms_of

if TYPE_CHECKING:
    from monarch_compile.passes.feeding import Feed


class _AllRecorded(BaseException):
    """Leaves a run of the model: what follows the last site that is recorded is of no use."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One run of one site under the exact model.

    leaves: the values of the feed's leaves, 16 bits as float32. arguments: the operator's, None for those that learn.
    given: what those that learn were, in their own dtypes; of the first run of each feed. target: what the operator is
    to give.
    """

    feed: Feed
    leaves: Mapping[Node, Any]
    arguments: tuple[Any, ...]
    given: tuple[Tensor, ...]
    target: Tensor

    def call(self, learned: Sequence[Tensor]) -> SiteCall:
        """The run with other values of the arguments that learn."""
        arguments = list(self.arguments)
        for place, value in zip(self.feed.places, learned, strict=True):
            arguments[place] = value
        return forms_of(family_of(self.feed.op)).call(self.feed.site, arguments)

    def moved(self, device: torch.device) -> Sample:
        """The same on a device."""
        to = partial(pytree.tree_map_only, Tensor, lambda x: x.to(device))
        return Sample(self.feed, to(dict(self.leaves)), to(self.arguments), self.given, self.target.to(device))


def reference(call: SiteCall) -> Tensor:
    """What the options ask for, of torch's operators."""
    return call.reference()


def family_of(op: Node) -> str:
    """The family of a lowered site's operator."""
    from monarch_compile.passes.frontends import frontends

    return next(frontend.family for frontend in frontends() if frontend.op is op.target)


@dataclass(eq=False)
class Tape(Switch):
    """What the graphs of a model share while they run.

    graphs: every graph that was captured. feeds: of the sites to record, by their operators. leaves: theirs. left: how
    many runs of such sites are to come in this call. teacher: what gives the targets. hold: where samples are kept,
    None for the model's own device. seen: feeds of which a run was recorded. learned: values in place of some
    parameters, which alone get gradients; None: nothing does.
    """

    graphs: list[Recorder] = field(default_factory=list)
    feeds: Mapping[Node, Feed] = field(default_factory=dict)
    leaves: frozenset[Node] = frozenset()
    left: int = 0
    teacher: Behaviour = exact
    hold: torch.device | None = None
    samples: list[Sample] = field(default_factory=list)
    seen: set[Feed] = field(default_factory=set)
    learned: Mapping[nn.Parameter, Tensor] | None = None

    def record(self, feeds: Iterable[Feed]) -> None:
        """From now on, record these."""
        self.feeds = {feed.op: feed for feed in feeds}
        self.leaves = frozenset(leaf for feed in self.feeds.values() for leaf in feed.leaves)
        self.samples = []
        for graph in self.graphs:
            graph.values.clear()


class Recorder(SiteInterpreter):
    """Runs a lowered graph, and keeps what the tape asks for.

    parameters: those that the graph is given or holds, by their nodes. varied: those that
    take turns at a node, when one graph serves several layers. values: of the leaves, as far as it has run.
    """

    def __init__(self, gm: GraphModule, tape: Tape) -> None:
        super().__init__(gm, tape)
        self.parameters: dict[Node, nn.Parameter] = {}
        self.varied: set[nn.Parameter] = set()
        self._tape = tape
        self.values: dict[Node, Any] = {}
        tape.graphs.append(self)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As the interpreter's own; gradients are the tape's matter, since graphs are captured for none."""
        with torch.set_grad_enabled(self._tape.learned is not None):
            return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        """As the interpreter's own; a site that is recorded notes its arguments first."""
        feed = self._tape.feeds.get(n)
        if feed is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            self._record(feed, arguments)
        result = super().run_node(n)
        if n.op in ("placeholder", "get_attr") and isinstance(result, nn.Parameter):
            known = self.parameters.setdefault(n, result)
            if known is not result:
                self.varied |= {known, result}
            if self._tape.learned is not None:
                result = self._tape.learned.get(result, result.detach())
        if n in self._tape.leaves:
            self.values[n] = result if isinstance(result, nn.Parameter) else self._kept(result)
        return result

    def _record(self, feed: Feed, arguments: Sequence[Any]) -> None:
        tape = self._tape
        target = tape.teacher(forms_of(family_of(feed.op)).call(feed.site, arguments))
        leaves = {node: self.values[node] for node in feed.leaves}
        given = () if feed in tape.seen else tuple(arguments[place].detach().clone() for place in feed.places)
        tape.seen.add(feed)
        others = tuple(None if i in feed.places else self._kept(x) for i, x in enumerate(arguments))
        tape.samples.append(Sample(feed, leaves, others, given, self._kept(target)))
        tape.left -= 1
        if tape.left == 0:
            raise _AllRecorded

    def _kept(self, value: Any) -> Any:
        """A copy that later nodes do not write to."""
        hold = self._tape.hold
        return pytree.tree_map_only(Tensor, lambda x: widened(x.detach().clone()).to(hold or x.device), value)


class Teacher:
    """The exact model, its graphs captured under some options, and what its sites are given.

    state: what every run starts from. hold: where samples are kept; None: on the model's device.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], config: MonarchConfig, state: Snapshot, hold: torch.device | None
    ) -> None:
        self.tape = Tape(hold=hold)
        self.probe = Probe(config, self.tape, interpreter=lambda gm, _: Recorder(gm, self.tape))
        self.counts: list[Counter[str]] = []
        self._run = capture(model, self.probe)
        self._calls, self._state = calls, state

    def output(self, number: int, behaviour: Behaviour) -> Any:
        """The model's output of a call, with `behaviour` at its sites."""
        self.tape.behaviour = behaviour
        self._state.restore()
        args, kwargs = self._calls[number]
        with torch.no_grad(), put_back():
            return self._run(*args, **kwargs)

    def learning_output(self, number: int, values: Mapping[nn.Parameter, Tensor]) -> Any:
        """The lowered model's output of a call with other values of some parameters, which gradients go through.

        Sites run as the reference: the graphs were captured for no gradients, and so were their operators chosen.
        """
        self.tape.learned = values
        try:
            return self.output(number, reference)
        finally:
            self.tape.learned = None

    def count(self, number: int) -> Any:
        """The exact model's output of a call, which notes how often each site runs; calls are counted in order."""
        runs: Counter[str] = Counter()
        self.counts.append(runs)

        def counted(call: SiteCall) -> Tensor:
            runs[call.site] += 1
            return call.exact()

        return self.output(number, counted)

    def samples(self, number: int, feeds: Iterable[Feed], teacher: Behaviour = exact) -> list[Sample]:
        """Every run, in one call, of the sites that some feeds lead to. teacher: what gives the targets."""
        feeds = list(feeds)
        tape = self.tape
        tape.record(feeds)
        tape.teacher = teacher
        tape.left = sum(self.counts[number][site] for site in {feed.site for feed in feeds})
        try:
            if tape.left:
                self.output(number, exact)
        except _AllRecorded:
            pass
        found = tape.samples
        tape.record(())
        return found
