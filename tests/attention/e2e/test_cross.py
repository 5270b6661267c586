"""Attention between sequences of different lengths: exact unless it is asked for, then in the form that is promised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.export import Dim, export

import monarch_compile
from monarch_compile import lower_exported
from monarch_compile.attention import candidates
from monarch_compile.attention.form import ACROSS
from monarch_compile.integrations import replace_sdpa
from tests.support.block import key_padding

ON = {"policy": "always", "cross_attention": True}


class Reader(nn.Module):
    """Queries of one sequence, keys and values of another, fewer key heads than query heads."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.kv_heads = num_heads, num_kv_heads
        self.q, self.kv = nn.Linear(24, num_heads * head_dim), nn.Linear(16, 2 * num_kv_heads * head_dim)

    def operands(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        return 3 * q, k, v

    def forward(self, x: Tensor, y: Tensor, visible: Tensor | None = None) -> Tensor:
        mask = None if visible is None else visible[:, None, None, :]
        return F.scaled_dot_product_attention(*self.operands(x, y), attn_mask=mask, enable_gqa=True)

    def by_reference(self, x: Tensor, y: Tensor, visible: Tensor | None = None, **options: object) -> Tensor:
        """The form of unequal lengths where these are unequal."""
        hidden = None if visible is None else ~visible
        form = {**options, **(ACROSS if x.shape[1] != y.shape[1] else {})}
        return monarch_compile.monarch_attention(*self.operands(x, y), key_padding_mask=hidden, **form)


MODEL = Reader().eval()
BIAS = torch.rand(9, 40)
KEPT = BIAS > 0.5


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would go to Inductor goes through AOTAutograd alone."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))


def inputs(queries: int, keys: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * queries + keys)
    return tuple(torch.randn(batch, n, d, generator=generator) for n, d in ((queries, 24), (keys, 16)))


def compiled(dynamic: bool | None = None, **options: object) -> Callable[..., Tensor]:
    return torch.compile(MODEL, backend="monarch", fullgraph=True, dynamic=dynamic, options=ON | options)


def outcome(queries: int, keys: int, *mask: Tensor, **options: object) -> tuple[str, Tensor]:
    """The code of the one site, and what the rewritten graph gives."""
    output, (result,) = run_passes(MODEL, *inputs(queries, keys), *mask, **options)
    (decision,) = result.decisions
    return decision.code, output


def test_it_stays_exact_unless_it_is_asked_for() -> None:
    code, output = outcome(9, 40, block_size=8)
    assert code == "cross_attention"
    torch.testing.assert_close(output, MODEL(*inputs(9, 40)))
    report = monarch_compile.explain(MODEL, *inputs(9, 40), options={"policy": "always"})
    assert "would lower with: cross_attention=True" in str(report)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "key_padding"])
@pytest.mark.parametrize(("queries", "keys"), [(9, 41), (100, 41)], ids=["fewer", "more"])
def test_one_block_is_exact_through_inductor(queries: int, keys: int, masked: bool) -> None:
    mask = (key_padding(2, keys),) if masked else ()
    given = inputs(queries, keys)
    output = compiled(block_size=64)(*given, *mask)
    assert counters["monarch"]["lowered"] == 1
    torch.testing.assert_close(output, MODEL(*given, *mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_iters": 2, "pad": "pre"}], ids=str)
@pytest.mark.parametrize("ignored", [{}, {"window": 2, "prefix": 3, "init": "identity"}], ids=["plain", "ignored"])
def test_the_form_is_the_mean_start_without_exact_groups(options: dict, ignored: dict) -> None:
    options = {"block_size": 7} | options
    for queries, keys in ((3, 41), (30, 41), (90, 41)):
        mask = key_padding(2, keys)
        code, output = outcome(queries, keys, mask, cross_attention=True, **options, **ignored)
        expected = MODEL.by_reference(*inputs(queries, keys), mask, **options)
        assert code == "lowered"
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(output, MODEL(*inputs(queries, keys), mask), atol=1e-3)


@pytest.mark.parametrize(
    ("queries", "keys", "code"),
    [
        (1, 40000, "single_query"),
        (20, 40000, "cost_exact_wins"),
        (4000, 77, "cost_exact_wins"),
        (100, 400, "cost_exact_wins"),
        (400, 4000, "lowered"),
    ],
)
def test_policy_auto_weighs_both_lengths(queries: int, keys: int, code: str) -> None:
    found, _ = outcome(queries, keys, policy="auto", cross_attention=True, block_size="auto")
    assert found == code


def test_one_query_stays_exact_under_any_policy() -> None:
    code, output = outcome(1, 40, cross_attention=True, block_size=8)
    assert code == "single_query"
    torch.testing.assert_close(output, MODEL(*inputs(1, 40)))
    assert outcome(1, 1, block_size=8)[0] == "lowered"  # no cross-attention


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (lambda: torch.arange(9)[:, None] >= torch.arange(40), "mask_causal"),
        (lambda: KEPT, "mask_general"),
        (lambda: BIAS, "mask_opaque"),
    ],
    ids=["causal", "general", "bias"],
)
def test_other_masks_than_of_keys_stay_exact(mask: Callable[[], Tensor], code: str) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*MODEL.operands(x, y), attn_mask=mask(), enable_gqa=True)

    output, (result,) = run_passes(fn, *inputs(9, 40), cross_attention=True, block_size=8)
    (decision,) = result.decisions
    assert decision.code == code
    torch.testing.assert_close(output, fn(*inputs(9, 40)))


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("block_size", [8, "auto"])
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.nightly)], ids=["automatic", "dynamic"])
def test_symbolic_lengths(dynamic: bool | None, block_size: int | str) -> None:
    """Each pair of lengths gets its own answer, equal ones that of self-attention, whatever came before."""
    call = compiled(dynamic, block_size=block_size)
    size = block_size if isinstance(block_size, int) else 16
    for queries, keys in ((9, 40), (30, 41), (50, 50), (200, 33), (41, 41), (12, 90)):
        given = inputs(queries, keys)
        expected = MODEL.by_reference(*given, block_size=size)
        torch.testing.assert_close(call(*given), expected, rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["exact"] == 0
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.nightly)], ids=["rising", "falling"])
@pytest.mark.usefixtures("no_inductor")
def test_policy_auto_of_symbolic_lengths_depends_on_no_order(order: int) -> None:
    pairs = ((400, 2000), (40, 2000), (2000, 2000), (400, 200), (300, 2100))
    call = compiled(True, policy="auto", window=None)
    for queries, keys in pairs[::order]:
        given = inputs(queries, keys)
        exact = queries == 40 or keys == 200
        size = monarch_compile.attention.lengths.auto_block_size(keys, "cpu")
        expected = MODEL(*given) if exact else MODEL.by_reference(*given, block_size=size, window=None)
        torch.testing.assert_close(call(*given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_inductor")
def test_gradients_are_those_of_the_reference() -> None:
    found = []
    with torch.enable_grad():
        for call in (compiled(block_size=7), lambda *x: MODEL.by_reference(*x, block_size=7)):
            x, y = (t.requires_grad_() for t in inputs(30, 41))
            call(x, y).square().sum().backward()
            found.append((x.grad, y.grad))
    assert counters["monarch"]["lowered"] == 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_exported_programs() -> None:
    """Lengths that may become equal would need a guard, which a program does not take."""
    options = ON | {"block_size": 8}
    program = lower_exported(export(MODEL, inputs(9, 40)), options)
    expected = MODEL.by_reference(*inputs(9, 40), block_size=8)
    torch.testing.assert_close(program.module()(*inputs(9, 40)), expected, rtol=1e-5, atol=1e-5)

    def symbolic(first: int) -> torch.export.ExportedProgram:
        dims = ({}, {1: Dim("keys", min=first, max=4096)}, None)
        return lower_exported(export(MODEL, (*inputs(9, 40), None), dynamic_shapes=dims), options)

    for first, sites in ((2, 0), (16, 1)):
        program = symbolic(first)
        assert str(program.graph).count("monarch_compile.attention") == sites
        for keys in (16, 100):
            given = inputs(9, keys)
            expected = MODEL.by_reference(*given, block_size=8) if sites else MODEL(*given)
            torch.testing.assert_close(program.module()(*given, None), expected, rtol=1e-5, atol=1e-5)


def test_the_report_shows_both_lengths() -> None:
    report = monarch_compile.explain(MODEL, *inputs(30, 41), options=ON | {"block_size": 8})
    (site,) = report.sites
    assert "2x4x30x8 on 41" in str(report)
    assert "q[2,4,30,8] k[2,2,41,8]" in str(site.ir)
    assert "blocks=6x8 rows=5" in str(site.ir)
    names = [kernel.text.split(":")[0] for kernel in site.kernels]
    assert names == [f"# monarch_{name}" for name in ("mean_query", "summarize_last", "attend")]
    assert "init=mean" in str(site.ir)


def test_calibrate_measures_the_form_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan needs no option: who calibrated with cross_attention gave leave."""
    monkeypatch.setattr(candidates.Occurrence, "seconds", lambda self, device, form: (9.0, float(form.num_iters)))
    given = inputs(30, 41)
    options = {"cross_attention": True, "block_size": 8}
    plan = monarch_compile.calibrate(MODEL, [given], budget=10.0, options=options, progress=False)
    (site,) = plan.sites
    assert site.form is not None
    assert {name: getattr(site.form, name) for name in ACROSS} == ACROSS
    assert outcome(30, 41, plan=plan)[0] == "lowered"
    found, expected = outcome(30, 41, plan=plan)[1], MODEL.by_reference(*given, block_size=8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    closed = monarch_compile.calibrate(MODEL, [given], budget=10.0, options={"block_size": 8}, progress=False)
    assert closed.num_lowered == 0


def test_eager_calls_are_lowered_when_asked() -> None:
    given = inputs(30, 41)
    with replace_sdpa(**ON, block_size=8, strict=True) as replaced:
        output = MODEL(*given)
        one = MODEL(*inputs(1, 41))
    torch.testing.assert_close(output, MODEL.by_reference(*given, block_size=8), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, MODEL(*inputs(1, 41)))
    assert (replaced.lowered, list(replaced.reasons)) == (1, ["single_query"])
