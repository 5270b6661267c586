"""What `compress_` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from monarch_compile.errors import ConfigError
from monarch_compile.linear.ir import BLAST, MONARCH


@dataclass(frozen=True)
class MonarchLinearConfig:
    """Each block of a weight becomes a product of low rank: the best one, by a singular value decomposition.

    num_blocks: in rows and in columns of each weight; it divides both numbers of features.
    One of these says how much is kept:
        rank: r of every layer, a multiple of num_blocks: r * (in_features + out_features) numbers.
        budget: share of the parameters of the chosen layers that all of them keep together, above 0 and below 1; each
            layer keeps this share of its own, and what a layer has no use for goes to others.
        max_error: largest relative error of each layer's output, or of its weight where there are no calls; each layer
            gets the least rank that keeps it.
    """

    kind: ClassVar[str] = MONARCH

    iterations: ClassVar[int] = 1

    num_blocks: int
    rank: int | None = None
    budget: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        require_config(self)

    @property
    def step(self) -> int:
        """What ranks are multiples of."""
        return self.num_blocks


@dataclass(frozen=True)
class BlastLinearConfig:
    """Blocks of a weight become products of shared factors, fitted by alternating least squares.

    num_blocks, rank, budget, max_error: as in `MonarchLinearConfig`, but that a rank is any number, a budget gives
    every layer the same share of its parameters, and `max_error` takes several fits of each layer.
    iterations: rounds of least squares.
    """

    kind: ClassVar[str] = BLAST

    num_blocks: int
    rank: int | None = None
    budget: float | None = None
    max_error: float | None = None
    iterations: int = 20

    def __post_init__(self) -> None:
        require_config(self)
        if self.iterations < 1:
            raise ConfigError(f"iterations must be at least 1; found {self.iterations}")

    @property
    def step(self) -> int:
        """What ranks are multiples of."""
        return 1


Config = MonarchLinearConfig | BlastLinearConfig


def require_config(config: Config) -> None:
    """Raise ConfigError unless a config says once, in range, how much is kept."""
    if config.num_blocks < 2:
        raise ConfigError(f"num_blocks must be at least 2 (1 is plain low rank); found {config.num_blocks}")
    given = [name for name in ("rank", "budget", "max_error") if getattr(config, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"give one of rank, budget and max_error; found {', '.join(given) or 'none'}")
    if config.rank is not None and (config.rank < 1 or config.rank % config.step):
        low = max(config.step, config.rank // config.step * config.step)
        near = f"; the nearest multiples of num_blocks are {low} and {low + config.step}" if config.step > 1 else ""
        raise ConfigError(f"there are no factors of rank {config.rank}{near}")
    if config.budget is not None and not 0 < config.budget < 1:
        raise ConfigError(f"budget must be above 0 and below 1; found {config.budget}")
    if config.max_error is not None and not 0 < config.max_error < 1:
        raise ConfigError(f"max_error must be above 0 and below 1; found {config.max_error}")
