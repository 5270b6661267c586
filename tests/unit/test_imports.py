"""What a compilation imports and does not: its cost counts in every warm start. And the room that passes run in."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import monarch_compile
from monarch_compile.passes.stack import SLOTS, with_stack_chunk


def said(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_public_name_is_there() -> None:
    for name in monarch_compile.__all__:
        assert getattr(monarch_compile, name) is not None
        assert name in dir(monarch_compile)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = monarch_compile.nothing


def test_a_compilation_imports_no_reports() -> None:
    at_import = "import sys, monarch_compile; print(*sys.modules); print()"
    passes = "import monarch_compile.backend, monarch_compile.passes.pipeline as pipeline; pipeline.frontends()"
    found = said(f"{at_import}; {passes}; print(*sys.modules)")
    first, modules = (line.split() for line in found.split("\n\n"))
    assert "torch.distributed.tensor" not in first  # which torch._dynamo imports
    assert "monarch_compile.attention.op" in modules
    assert not {
        f"monarch_compile.{name}" for name in ("report.explainer", "report.graphs", "calibration.search", "export")
    } & set(modules)


@pytest.mark.parametrize(
    ("spelling", "wanted"), [("torch.relu(x)", False), ("torch.fft.irfft(torch.fft.rfft(x))", True)]
)
def test_a_family_is_imported_where_a_graph_may_hold_its_sites(spelling: str, wanted: bool) -> None:
    program = (
        "import sys, torch, monarch_compile.passes.frontends as frontends\n"
        "from torch.fx.experimental.proxy_tensor import make_fx\n"
        f"frontends.frontends(make_fx(lambda x: {spelling})(torch.ones(4)))\n"
        "print('monarch_compile.convolution.op' in sys.modules, 'monarch_compile.attention.op' in sys.modules)"
    )
    assert said(program) == f"{wanted} True"


def test_the_operator_is_registered_without_reading_what_it_calls() -> None:
    """torch.library.triton_op looks for kernels in the source of every function that it can resolve."""
    count = (
        "import inspect, torch, torch._inductor.utils, monarch_compile.attention.reference\n"
        "read, found = inspect.getsource, []\n"
        "inspect.getsource = lambda f: (found.append(getattr(f, '__name__', '')), read(f))[1]\n"
        "import sys\n"
        "assert 'monarch_compile.attention.op' not in sys.modules\n"
        "import monarch_compile.attention.op\n"
        "print(*found)"
    )
    assert said(count).split() in ([], ["attention", "attention_with_lse", "attention_backward"])


def test_room_changes_nothing_but_the_size_of_a_frame() -> None:
    assert with_stack_chunk(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        with_stack_chunk(divmod, 7, 0)
    assert with_stack_chunk(lambda: inspect.currentframe().f_back.f_code.co_stacksize) == SLOTS  # type: ignore[union-attr]
