"""What tuning found: a readable JSON file beside the kernels, safe to share between processes.

An entry is keyed by all that it depends on: the GPU, triton, the problem and what the kernels are emitted from.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from monarch_compile import ir as common
from monarch_compile.codegen.emitters import IR, Schedule, emitter
from monarch_compile.codegen.source import cache_dir, replace_file
from monarch_compile.codegen.tiling import Capability, shared_limit
from monarch_compile.errors import CodegenError
from monarch_compile.sources import digest_of

logger = logging.getLogger(__name__)

FILE_NAME = "tuned.json"
FORMAT = 2


@dataclass(frozen=True)
class Tuned:
    """One result. ms, shipped_ms: median of the schedule and of the one it stands in for; error: against the reference.

    tried: schedules that were timed.
    """

    schedule: Schedule
    ms: float
    shipped_ms: float
    error: float
    tried: int

    @property
    def speedup(self) -> float:
        """How many times faster than the shipped schedule."""
        return self.shipped_ms / self.ms

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"family": self.schedule.family, **asdict(self)}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Tuned:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, AttributeError, CodegenError: the content is of something else.
        """
        schedule = emitter(content["family"]).read_schedule(content["schedule"])
        times = {name: float(content[name]) for name in ("ms", "shipped_ms", "error")}
        return Tuned(schedule, **times, tried=int(content["tried"]))


def key_of(ir: IR, gpu: str, triton_version: str) -> str:
    """The readable key of a result: what shares a bucket with `ir` shares it."""
    described = emitter(ir.family).describe(ir)
    return " | ".join((gpu, f"triton {triton_version}", described, f"emitters {emitter_digest(ir.family)}"))


@functools.cache
def emitter_digest(family: str) -> str:
    """A hash of all that a family's kernels are emitted and launched by."""
    return digest_of(Path(__file__).parents[1], *meaning_files(family))


def meaning_files(family: str) -> list[Path]:
    """Those that are not of codegen."""
    return [Path(str(module.__file__)) for module in (common, *emitter(family).meaning)]


def is_legal(schedule: Schedule, ir: IR, capability: Capability | None) -> bool:
    """Whether `schedule` can run `ir`: a file may have been edited, or hold what an older version wrote."""
    own = emitter(ir.family)
    try:
        own.check_schedule(schedule, ir)
    except CodegenError:
        return False
    limit = shared_limit(capability)
    within = all(own.tuning.shared_bytes(name, tiling, ir) <= limit for name, tiling in schedule.tilings())
    return own.is_made_for(schedule, ir) and within


def tuned_path() -> Path:
    """Where results are kept."""
    return cache_dir() / FILE_NAME


def read(path: Path | None = None) -> dict[str, Tuned]:
    """Every valid entry of the file; what is not valid is passed over with one warning, and never raises."""
    path = path or tuned_path()
    found: dict[str, Tuned] = {}
    bad = 0
    for key, content in _entries(path).items():
        try:
            found[key] = Tuned.from_dict(content)
        except (KeyError, TypeError, ValueError, AttributeError, CodegenError):
            bad += 1
    if bad:
        _warn(path, f"{bad} of its entries are not results of tuning")
    return found


def write(results: Mapping[str, Tuned], path: Path | None = None) -> Path:
    """Merge `results` into the file: read, joined and replaced as one step under a lock, so no process loses any."""
    path = path or tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        entries = {key: result.to_dict() for key, result in {**read(path), **results}.items()}
        content = {"format": FORMAT, "entries": dict(sorted(entries.items()))}
        replace_file(path, json.dumps(content, indent=1) + "\n")
    return path


def _entries(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} where {FORMAT} is known")
        entries = content["entries"]
        if not isinstance(entries, dict):
            raise TypeError("entries are no dictionary")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn(path, repr(error))
        return {}
    return entries


@functools.cache
def _warn(path: Path, what: str) -> None:
    """Once for each file and trouble."""
    logger.warning("%s is ignored, wholly or in part: %s; tuning writes it anew", path, what)
