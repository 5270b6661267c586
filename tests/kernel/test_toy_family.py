"""A family that the spine does not know, from its IR to its launch, its tuning and the file of what tuning found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from monarch_compile.codegen.emitters import emitter
from monarch_compile.codegen.launcher import _CHOSEN, build, schedule_for, use
from monarch_compile.codegen.render import sources
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.codegen.tuning.search import tune
from monarch_compile.codegen.tuning.store import is_legal, key_of, read, write
from monarch_compile.errors import CodegenError
from monarch_compile.family import family
from monarch_compile.registry import FAMILIES, Modules
from tests.toy.emitter import EMITTER, GateSchedule
from tests.toy.family import Gate, reference

IR = Gate(5, 100, torch.float32)
MODULES = Modules("tests.toy.family", "tests.toy.frontend", "tests.toy.emitter")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The one line that a family adds to the spine."""
    monkeypatch.setitem(FAMILIES, "toy", MODULES)
    monkeypatch.setenv("MONARCH_CACHE_DIR", str(tmp_path))
    yield
    _CHOSEN.clear()
    for cached in (build, emitter, family):
        cached.cache_clear()


def test_its_program_is_data_and_text() -> None:
    program = EMITTER.program_of(IR, EMITTER.choose_schedule(IR, None), False)
    assert program.bytes_moved({"rows": 5, "columns": 100}) == 3 * 5 * 100 * 4
    (source,) = sources(program)
    assert source.parameters == ("x", "y", "z", "x_row", "x_column", "y_row", "y_column", "columns")
    assert "mask=" not in source.text
    with pytest.raises(CodegenError, match="kernels for float32"):
        EMITTER.program_of(Gate(5, 100, torch.float16), EMITTER.choose_schedule(IR, None), False)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("columns", [96, 100])
def test_it_runs(columns: int) -> None:
    x, y = torch.randn(columns, 5).T, torch.randn(5, columns)
    ir = Gate(5, columns, torch.float32)
    launcher = build(EMITTER.bucketed(ir), None, True)
    torch.testing.assert_close(EMITTER.run(launcher, x, y), reference(x, y))
    assert EMITTER.run(launcher, x, y).is_contiguous()


@pytest.mark.usefixtures("interpreted")
def test_it_is_tuned_and_what_was_found_is_kept_and_used() -> None:
    series = iter([9.0, 8.0, 3.0, 5.0, 9.0, 3.0])
    place = {"device": torch.device("cpu"), "capability": None}
    result, rejected = tune(IR, timer=lambda call: call().numel() * next(series), inspect=None, **place)
    assert (result.schedule, rejected) == (GateSchedule(Tiling(16, 64, 1, 1)), {})
    write({key_of(IR, "gpu", "3.6"): result})
    held = read()[key_of(Gate(7, 100, torch.float32), "gpu", "3.6")]
    assert held == result
    assert is_legal(held.schedule, IR, None)
    use(IR, None, held.schedule)
    assert schedule_for(Gate(9, 100, torch.float32)) == held.schedule != schedule_for(Gate(9, 101, torch.float32))
