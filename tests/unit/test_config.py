"""Options: typed, validated, split from Inductor's."""

from __future__ import annotations

import pytest

from monarch_compile.calibration.plan import Plan
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.errors import ConfigError

BAD = {
    "block_size": [0, -1, 1.5, "big", True, None],
    "num_iters": [0, "1", True],
    "init": ["zero", None],
    "pad": ["left", 1],
    "window": [-1, "wide", True],
    "prefix": [-1, "class", None],
    "tile": [8, (), (4, 0), (2, 2, 2, 2), "square", (4, True)],
    "window_shape": ["star", None],
    "prefix_at_end": [1, "last", None],
    "chosen": [-1, "auto", None, True],
    "grid": [16, (), (4, 0), (2, 2, 2, 2), "square"],
    "policy": ["sometimes", None],
    "min_seq_len": [-1, "a"],
    "cross_attention": [1, "yes", None],
    "causal": [1, "yes", None],
    "autotune": [1, "yes"],
    "strict": [1, "yes"],
    "mode": ["fast", 3],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_is_named_with_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"option '{name}' must be .*; found"):
        parse_options({name: value})


def test_an_unknown_option_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="unknown option 'blocksize'; valid options are block_size, num_iters"):
        parse_options({"blocksize": 3})


def test_inductor_options_are_split_off() -> None:
    config, patches = parse_options({"block_size": 32, "max_autotune": True, "triton.cudagraphs": False})
    assert config == MonarchConfig(block_size=32)
    assert patches == {"max_autotune": True, "triton.cudagraphs": False}


def test_a_mode_expands_to_inductor_options() -> None:
    config, patches = parse_options({"mode": "reduce-overhead"})
    assert config.mode == "reduce-overhead"
    assert patches["triton.cudagraphs"] is True
    assert parse_options(None, "reduce-overhead") == (config, patches)
    with pytest.raises(ConfigError, match="mode is given twice"):
        parse_options({"mode": "default"}, "reduce-overhead")


def test_the_digest_covers_every_option() -> None:
    changed = {
        "block_size": 7,
        "num_iters": 2,
        "init": "mean",
        "pad": "pre",
        "window": None,
        "prefix": 4,
        "tile": None,
        "window_shape": "plus",
        "prefix_at_end": True,
        "chosen": 2,
        "grid": (4, 4),
        "plan": Plan((), (), 0.0, 0.0, 1, 1, "cpu"),
        "policy": "never",
        "min_seq_len": 5,
        "cross_attention": True,
        "causal": True,
        "short_convolutions": False,
        "autotune": True,
        "strict": True,
        "mode": "default",
    }
    assert set(changed) == set(MonarchConfig.__dataclass_fields__)
    digests = {MonarchConfig(**{name: value}).digest() for name, value in changed.items()}
    assert len(digests | {MonarchConfig().digest()}) == len(changed) + 1
