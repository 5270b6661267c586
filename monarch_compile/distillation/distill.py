"""`distill`: the weights in front of lowered sites learn to give the exact model's outputs, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.calibration.inputs import calls_of
from monarch_compile.calibration.instrument import uncompiled
from monarch_compile.calibration.plan import Plan
from monarch_compile.calibration.search import CAPTURE_LIMIT
from monarch_compile.calibration.snapshot import Snapshot
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.distillation.descent import Schedule, in_eval_mode
from monarch_compile.distillation.memory import sharers
from monarch_compile.distillation.report import DistillReport
from monarch_compile.distillation.run import Run, Settings
from monarch_compile.errors import InputError


def distill(
    model: nn.Module,
    calls: Any,
    *,
    plan: Plan | str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    held_out: Any = None,
    steps: int = 300,
    lr: float = 3e-3,
    joint_steps: int = 0,
    joint_lr: float = 1e-3,
    seed: int = 0,
    inplace: bool = False,
    train_frozen: bool = False,
    offload: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> DistillReport:
    """Let the weights in front of lowered sites learn, without labels, to give what the exact model gives.

    Each site learns by itself: it is given what the exact model gives it, and its output in the lowered form is to be
    that of exact attention with the old weights, in relative mean squared error. Only the linear layers that lead to
    its queries and keys change, through whatever views, norms, rotations and scales follow them; of packed weights,
    only the rows of queries and keys. All else in the model stays bit-identical. Sites that share a weight learn
    together. A site without such a weight of its own is left as it is, and the report says why.

    Sites that are exact up to rounding (long convolutions) have nothing to learn. Training is in float32, of 16-bit
    weights on copies. The inputs of one site (or of those that share a weight) are in memory at a time: the exact model
    runs once for each site and call, up to the site.

    The model runs in eval mode, eagerly, and its mode, random state, buffers and attributes are put back, as
    `calibrate` does. Weights are written at the very end, all or none: an error or KeyboardInterrupt leaves them
    as they were.

    Args:
        model: a module, compiled or not.
        calls: what to learn from, as in `calibrate`: a list of calls, each a batch. A step learns from one of them.
        plan: what `calibrate` gave, or its path: the forms of the sites. Without one, the forms and the sites are those
            that the backend would choose under `options`.
        options: those of `MonarchConfig`.
        held_out: other calls, to measure the errors on only.
        steps: of Adam, for each site.
        lr: what the first step changes, as a share of the root mean square of a weight's elements; falls to 0 along
            half a cosine.
        joint_steps: of Adam, for all sites together at the end: the weights that have learned go on to learn, now to
            give the exact model's output, of all floating tensors in it. The activations of the whole model are in
            memory for that, and the model must be one without graph breaks that gradients do not pass.
        joint_lr: as `lr`, of these steps.
        seed: of the order of the calls. The same arguments give the same weights, on a CPU bit for bit.
        inplace: change `model` itself; else a copy, which the report holds.
        train_frozen: also change weights whose requires_grad is False.
        offload: keep the inputs of a site in the host's memory, not on the model's device.
        checkpoint: a file that is written as the run goes on, and from which the same call goes on if it was stopped:
            the weights are then, on a CPU, bit for bit those of a run that was not.
        progress: say on stderr what is being done.

    Returns:
        A `DistillReport` with the errors before and after, the module, and the plan to compile it with.

    Raises:
        ConfigError, PlanError: as torch.compile under these options.
        InputError: an argument is not allowed, or the checkpoint is of another run.
        DistillationError: a loss is not finite.
    """
    inner: Any = uncompiled(model)
    if not isinstance(inner, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, whose weights can change; found {type(model)}")
    schedule = Schedule.of(steps, lr, seed)
    joint = Schedule.of(joint_steps, joint_lr, seed, least_steps=0, prefix="joint_")
    hold = torch.device("cpu") if offload else None
    config = _config(options, plan)
    # Of the model itself: a copy's parameters have memory of their own, but its weights may be loaded into the model.
    tied = sharers(inner)
    settings = Settings(
        config, schedule, train_frozen, hold, checkpoint, progress, tied=tied, joint=joint if joint_steps else None
    )
    report = distilled(inner if inplace else _copied(inner), calls, held_out, settings)
    return replace(report, model=model) if inplace else report


def distilled(model: nn.Module, calls: Any, held_out: Any, settings: Settings) -> DistillReport:
    """`distill` in place, with settings that need not be those of its arguments."""
    given = calls_of(calls)
    unseen = calls_of(held_out) if isinstance(held_out, Tensor) or held_out else []
    patched = torch._dynamo.config.patch(recompile_limit=CAPTURE_LIMIT)
    with torch.inference_mode(False), patched, in_eval_mode(model), Snapshot(model, given, unseen) as state:
        return Run(model, given, unseen, state, settings).report()


def _config(options: Mapping[str, Any] | None, plan: Plan | str | Path | None) -> MonarchConfig:
    options = dict(options or {})
    if plan is not None:
        if options.get("plan") is not None:
            raise InputError("the plan is given twice: as plan= and in the options")
        options["plan"] = plan
    config, _ = parse_options(options)
    policy = "always" if config.plan is not None and "policy" not in options else config.policy
    return replace(config, policy=policy, strict=False)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise InputError(f"the model cannot be copied ({error}); inplace=True changes the model itself") from error
