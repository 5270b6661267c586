"""Options of the backend: typed, validated, frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monarch_compile.attention.form import (
    FORM_OPTIONS,
    FORM_RULES,
    MAX_AXES,
    Form,
    weighs_own_block_exactly,
    wrong_window,
)
from monarch_compile.errors import ConfigError
from monarch_compile.rules import FLAG, OptionRule, at_least, broken_rule, one_of, or_else, tuple_of

if TYPE_CHECKING:
    from monarch_compile.calibration.plan import Plan

POLICIES = ("auto", "always", "never")

AUTO_OPTIONS = ("block_size", "window", "prefix", "tile", "window_shape", "prefix_at_end")
"""Options of the form that may be left to the sites."""

OPTION_RULES: dict[str, OptionRule] = {
    **{name: or_else("auto", rule) if name in AUTO_OPTIONS else rule for name, rule in FORM_RULES.items()},
    "grid": or_else("auto", or_else(None, tuple_of(1, range(1, MAX_AXES + 1)))),
    "policy": one_of(POLICIES),
    "min_seq_len": at_least(0),
    "cross_attention": FLAG,
    "causal": FLAG,
    "short_convolutions": FLAG,
    "autotune": FLAG,
    "strict": FLAG,
    "plan": OptionRule(lambda v: v is None or _is_plan(v), "a Plan, or the path of a saved one"),
    "mode": OptionRule(lambda v: v is None or v in _inductor_modes(), "None or a mode of torch.compile"),
}


@dataclass(frozen=True)
class MonarchConfig:
    """Options of ``torch.compile(model, backend="monarch", options={...})``.

    block_size: keys in a block, or "auto": a table of the length, `lengths.BLOCK_SIZES`, and with tiles what a tile
        holds.
    num_iters: pairs of updates of the Monarch factors.
    init: "identity" or "mean" start.
    pad: pad the sequence to whole blocks after ("post") or before it ("pre").
    window: blocks on each side of a query's own block that it attends to exactly, counted along each axis where blocks
        are tiles, or a number for each axis (0: its own only; None: the paper's form, no window). "auto": 1, with tiles
        what `grids.TILES` has. Where a window is given for each axis, pieces of a sequence have that of "auto".
    prefix: leading keys that every query attends to exactly; as many leading queries attend to every key exactly.
        Blocks are of what follows them. "auto": the tokens before or after a grid that is found, else 0.
    prefix_at_end: whether these tokens are the last of the sequence, not the first, as text after an image. "auto": as
        they lie beside a grid that is found, else False.
    chosen: blocks outside of the window that each block of queries attends to exactly, those of most far-field mass.
    grid: sizes of the axes that the other tokens flatten. "auto": found in the graph, from the convolution
        or reshape that the tokens come from; None: not looked for. Given by hand, it is that of all self-attention.
    tile: tokens of a block along each axis of the grid, where there is one. "auto": a table of the number of tokens,
        `grids.TILES`; None: blocks are pieces of the sequence all the same.
    window_shape: the tiles of a window, all at most `window` away along each axis ("box") or those along one axis alone
        ("plus"). "auto": what `grids.TILES` has where `window` is "auto" too, else "box".
    policy: "auto" lowers a site where the cost model predicts a gain, "always" wherever legal, "never" nowhere.
    min_seq_len: attention with fewer keys stays exact, under any policy.
    cross_attention: may attention between sequences of different lengths be lowered? Its form is settled but for
        block_size and num_iters: the mean start, no window, no prefix, no tiles. A plan needs no such permission.
    causal: may causal attention be lowered? A plan needs no such permission.
    short_convolutions: on CUDA, in graphs where a long convolution is lowered, may depthwise convolutions of up to four
        taps become sums of products, which Inductor fuses with their neighbours?
    plan: what `calibrate` chose for each site, or the path of its JSON; it settles block_size, num_iters, init, pad,
        window, prefix, tile, window_shape, prefix_at_end and chosen, and which sites may be lowered at all.
    autotune: on CUDA, run the schedules that tuning found on this GPU, and tune what was not tuned before (minutes);
        False runs the shipped ones.
    strict: raise LoweringError where the default would keep a site exact for lack of support, or fall back.
    mode: Inductor's mode, such as "reduce-overhead" (torch.compile refuses mode= together with options=).
    """

    block_size: int | str = "auto"
    num_iters: int = 1
    init: str = "identity"
    pad: str = "post"
    window: int | tuple[int, ...] | str | None = "auto"
    prefix: int | str = "auto"
    tile: tuple[int, ...] | str | None = "auto"
    window_shape: str = "auto"
    prefix_at_end: bool | str = "auto"
    chosen: int = 0
    grid: tuple[int, ...] | str | None = "auto"
    policy: str = "auto"
    min_seq_len: int = 0
    cross_attention: bool = False
    causal: bool = False
    short_convolutions: bool = True
    plan: Plan | None = None
    autotune: bool = False
    strict: bool = False
    mode: str | None = None

    def __post_init__(self) -> None:
        wrong = broken_rule(vars(self), OPTION_RULES)
        if wrong is not None:
            raise ConfigError(f"option {wrong}")
        if self.chosen and not weighs_own_block_exactly(self.num_iters, self.init):
            raise ConfigError(f"option 'chosen' needs num_iters=1 and init='identity'; found chosen={self.chosen}")
        for name in ("tile", "grid", "window"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for sizes in (self.tile, self.grid):
            if isinstance(sizes, tuple) and (wrong := wrong_window(self.window, sizes)) is not None:
                raise ConfigError(f"option {wrong}")

    def form(self, **auto: Any) -> Form:
        """The form that the options ask for; `auto` has what stands for each option that is "auto"."""
        options = {name: getattr(self, name) for name in FORM_OPTIONS}
        return Form(**{name: auto[name] if value == "auto" else value for name, value in options.items()})

    def mode_patches(self) -> dict[str, Any]:
        """What the mode changes in Inductor's config."""
        if self.mode is None:
            return {}
        from torch._inductor import list_mode_options

        return dict(list_mode_options(self.mode))

    def digest(self) -> str:
        """A short hash of every option, for cache keys."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:16]


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> tuple[MonarchConfig, dict[str, Any]]:
    """Split `options` into ours and Inductor's config patches (a mode's own patches included).

    Raises:
        ConfigError: a key is neither ours nor Inductor's, a value is not allowed, `mode` is given twice, or an option
            that the plan settles is given beside it.
        PlanError: the plan's file cannot be read.
    """
    ours, patches = {}, {}
    names = [f.name for f in fields(MonarchConfig)]
    for key, value in (options or {}).items():
        if key in names:
            ours[key] = value
        else:
            patches[_inductor_key(key, names)] = value
    if mode is not None and ours.setdefault("mode", mode) != mode:
        raise ConfigError(f"mode is given twice: {mode!r} and options={{'mode': {ours['mode']!r}}}")
    if ours.get("plan") is not None:
        ours["plan"] = _loaded_plan(ours)
    config = MonarchConfig(**ours)
    return config, {**config.mode_patches(), **patches}


def _loaded_plan(ours: Mapping[str, Any]) -> Any:
    settled = [name for name in FORM_OPTIONS if name in ours]
    if settled:
        raise ConfigError(f"the plan settles {', '.join(FORM_OPTIONS)}; found {', '.join(settled)} beside it")
    from monarch_compile.calibration.plan import Plan

    plan = ours["plan"]
    return Plan.load(plan) if isinstance(plan, (str, Path)) else plan


def _is_plan(value: object) -> bool:
    from monarch_compile.calibration.plan import Plan

    return isinstance(value, Plan)


def _inductor_modes() -> tuple[str, ...]:
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def _inductor_key(key: str, names: list[str]) -> str:
    from torch._inductor import config as inductor_config

    known = inductor_config.get_config_copy() if hasattr(inductor_config, "get_config_copy") else {}
    normal = key.replace("-", "_")
    if normal not in known:
        raise ConfigError(
            f"unknown option {key!r}; valid options are {', '.join(names)}, or any key of torch._inductor.config"
        )
    return normal
