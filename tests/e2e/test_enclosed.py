"""Attention in the bodies of cond, scan and while_loop through Inductor, explain, calibrate and an exported program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import monarch_compile
from monarch_compile import monarch_attention
from monarch_compile.attention.op import ATTENTION_OP
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.calibration.instrument import with_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of q, k, v and a key mask (batch, seq_len)."""
BLOCK, N = 8, 41
OPTIONS = {"policy": "always", "strict": True, "block_size": BLOCK}


def exact(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The mask is a matrix, of which only the graph outside tells that it depends on the key alone."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def by_reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    rows = visible[:, 0, 0, :]
    return monarch_attention(q.clone(), k, v, block_size=BLOCK, key_padding_mask=~rows).contiguous()


def both_branches(attend: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    def then(q: Tensor) -> Tensor:
        return attend(q, k, v, visible)

    def other(q: Tensor) -> Tensor:
        return attend(k, q, v, visible).sin()

    return torch.cond(q.sum() > 0, then, other, (q,))


def beside_no_attention(attend: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The branches' results must lie alike in memory."""
    return torch.cond(q.sum() > 0, lambda q: attend(q, k, v, visible), lambda q: q * 2, (q,))


def steps(attend: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """As must a carry and the next one."""
    return scan(lambda c, x: (attend(c, k, v, visible) + x, attend(x, k, v, visible) * 1), q, torch.stack([q, k]))


def loop(attend: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    def step(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, attend(x, k, v, visible)

    return while_loop(lambda i, x: i < 3, step, (torch.tensor(0), q * 1))[1]


def nested(attend: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cond(x.sum() > 0, lambda c: attend(c, k, v, visible), lambda c: c * 2, (c,)), x * 1

    return scan(step, q, torch.stack([q, -q.abs(), q.abs()]))


PROGRAMS = {both_branches: 2, beside_no_attention: 1, steps: 2, loop: 1, nested: 1}
"""Program -> how many sites it has."""


def with_mask_made_inside(program: Callable[..., Any], attend: Attention) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        visible = (torch.arange(q.shape[2], device=q.device) < q.shape[2] - 5)[None, None, None]
        return program(attend, q, k, v, visible.expand(q.shape[0], 1, q.shape[2], -1))

    return run


def inputs(seq_len: int = N, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 2, seq_len, 16, generator=generator).to(device, dtype) for _ in range(3)]


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_blocks_give_monarch_attention(program: Callable[..., Any], sign: int) -> None:
    q, k, v = inputs()
    q = sign * q.abs()
    found = torch.compile(with_mask_made_inside(program, exact), backend="monarch", fullgraph=True, options=OPTIONS)
    expected = with_mask_made_inside(program, by_reference)(q, k, v)
    torch.testing.assert_close(found(q, k, v), expected, rtol=1e-4, atol=1e-5)
    assert counters["monarch"] == {"lowered": PROGRAMS[program], "exact": 0}
    assert not counters["monarch"]["fallback"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_one_block_gives_exact_attention(program: Callable[..., Any]) -> None:
    run = with_mask_made_inside(program, exact)
    found = torch.compile(run, backend="monarch", fullgraph=True, options=OPTIONS | {"block_size": N})(*inputs())
    torch.testing.assert_close(found, run(*inputs()), rtol=1e-4, atol=1e-5)
    assert counters["monarch"]["lowered"] == PROGRAMS[program]


def test_a_site_in_a_body_is_measured_and_named(tmp_path: Path) -> None:
    run = with_mask_made_inside(both_branches, exact)
    q, k, v = inputs()
    report = monarch_compile.explain(run, q.abs(), k, v, options=OPTIONS, measure=True)
    then, other = report.sites
    assert then.name.endswith("in the true branch of cond")
    assert other.name.endswith("in the false branch of cond")
    assert then.error is not None
    assert 0 < then.error < 1
    assert other.error is None  # it did not run
    assert report.output_error == pytest.approx(then.error, rel=1e-3)
    assert f"0/{then.node}" in report.graph.before
    roles = dict(report.graph.after.nodes(data="role"))
    assert [key.rpartition("/")[0] for key, role in roles.items() if role == "monarch"] == [
        "0/true_graph_0",
        "0/false_graph_0",
    ]
    assert "in the true branch of cond" in report.save(tmp_path / "report.html").read_text()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_every_site_in_a_body_can_be_replaced(program: Callable[..., Any]) -> None:
    calls: list[str] = []

    def zero(call: AttentionCall) -> Tensor:
        calls.append(call.site)
        return torch.zeros_like(call.exact())

    run = with_mask_made_inside(program, exact)
    q, k, v = inputs()
    replaced = with_attention(run, zero, OPTIONS)(q.abs(), k, v)
    expected = with_mask_made_inside(program, lambda q, k, v, visible: torch.zeros_like(q))(q.abs(), k, v)
    torch.testing.assert_close(replaced, expected)
    assert calls


def test_calibrate_chooses_for_sites_in_bodies() -> None:
    run = with_mask_made_inside(steps, exact)
    given = tuple(inputs(512))
    plan = monarch_compile.calibrate(run, given, budget=10.0)
    assert [site.form is not None for site in plan.sites] == [True, True]
    compiled = torch.compile(run, backend="monarch", fullgraph=True, options={"plan": plan, "policy": "always"})
    error = (compiled(*given)[0] - run(*given)[0]).norm() / run(*given)[0].norm()
    assert 0 < error < 1
    assert counters["monarch"]["lowered"] >= 2


def test_calibrate_says_what_did_not_run() -> None:
    q, k, v = inputs(512)
    plan = monarch_compile.calibrate(with_mask_made_inside(both_branches, exact), (q.abs(), k, v), budget=10.0)
    then, other = plan.sites
    assert then.form is not None
    assert (other.form, other.reason) == (None, "the first call did not run it")


class Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return with_mask_made_inside(both_branches, exact)(q, k, v)


def test_an_exported_program_with_branches(tmp_path: Path) -> None:
    q, k, v = inputs()
    program = torch.export.export(Model().eval(), (q, k, v))
    lowered = monarch_compile.lower_exported(program, OPTIONS)
    graphs = [m.graph for m in lowered.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert sum(len(graph.find_nodes(op="call_function", target=ATTENTION_OP)) for graph in graphs) == 2
    torch.export.save(lowered, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for x in (q.abs(), -q.abs()):
        expected = with_mask_made_inside(both_branches, by_reference)(x, k, v)
        torch.testing.assert_close(loaded(x, k, v), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_kernels_in_bodies(program: Callable[..., Any]) -> None:
    """Where plain torch.compile gives the program's numbers on this GPU, so does monarch, with its kernels inside."""
    given = inputs(device="cuda", dtype=torch.float16)
    run = with_mask_made_inside(program, exact)
    try:
        torch.compile(run, fullgraph=True)(*given)
    except Exception as error:
        pytest.skip(f"torch itself does not compile this on CUDA: {error!r}"[:200])
    torch._dynamo.reset()
    found = torch.compile(run, backend="monarch", fullgraph=True, options=OPTIONS)(*given)
    expected = with_mask_made_inside(program, by_reference)(*(x.float() for x in given))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, check_dtype=False)
    assert counters["monarch"]["lowered"] == PROGRAMS[program]
