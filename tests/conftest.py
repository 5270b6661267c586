"""Options and fixtures that every test directory shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.interpreter import prefer_interpreter
from tests.support.poison import Poisoned

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what is emitted now")


def pytest_configure() -> None:
    """Without a CUDA device, kernels run in Triton's interpreter.

    How fast examples are drawn says something of the machine, nothing of the code, so no test fails by it.
    """
    settings.register_profile("patient", parent=settings(), suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("nightly", parent=settings.get_profile("patient"), max_examples=2000, derandomize=False)
    settings.load_profile("patient")
    prefer_interpreter()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Workers share a GPU: each gives back the memory of its last test.

    A kernel that faults leaves its process without a GPU: such a worker ends, and a new one takes the next tests.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        os._exit(1)


@pytest.fixture(scope="session")
def _poisoned_buffers() -> Iterator[Poisoned]:
    poisoned = Poisoned()
    with poisoned.installed():
        yield poisoned


@pytest.fixture(autouse=True)
def poisoned(_poisoned_buffers: Poisoned) -> Iterator[Poisoned]:
    """Whatever a test compiles runs over poisoned buffers; a write past one of them is an error."""
    del _poisoned_buffers.overwritten[:]
    yield _poisoned_buffers
    assert not _poisoned_buffers.overwritten, "compiled code wrote past buffers"


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """check_golden(file_name, text): `text` is what tests/golden holds; --update-golden makes it so."""

    def check(file_name: str, text: str) -> None:
        path = GOLDEN / file_name
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no golden file {path.name}: --update-golden makes it"
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; --update-golden rewrites it"

    return check
