"""Images through the backend: the grid and the tokens before it are found, and blocks are its tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export

import monarch_compile
from monarch_compile.attention import candidates
from monarch_compile.attention.form import Form
from monarch_compile.attention.op import ATTENTION_OP
from monarch_compile.attention.reference import reference
from monarch_compile.backend import monarch
from monarch_compile.calibration.plan import Plan, SitePlan
from monarch_compile.errors import ConfigError, PlanError
from monarch_compile.integrations import replace_sdpa
from monarch_compile.report.explainer import explain
from tests.support.poison import between_margins

DIM, HEADS, PATCH = 24, 2, 4
ALWAYS: dict[str, Any] = {"policy": "always"}


class Layer(nn.Module):
    """Self-attention and a residual sum. `form`: not SDPA, but the reference in a form."""

    form: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq_len, dim = x.shape
        q, k, v = (2 * self.qkv(self.norm(x))).view(batch, seq_len, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
        if self.form is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = reference(q, k, v, scale=(dim // HEADS) ** -0.5, **self.form)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, seq_len, dim))


class ViT(nn.Module):
    """Patches by a convolution, class tokens before (or after) them, layers."""

    def __init__(self, num_layers: int = 2, num_tokens: int = 1, at_end: bool = False) -> None:
        super().__init__()
        self.at_end = at_end
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.tokens = nn.Parameter(torch.randn(1, num_tokens, DIM))
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        parts = [self.tokens.expand(x.shape[0], -1, -1), x]
        x = torch.cat(parts[::-1] if self.at_end else parts, 1)
        for layer in self.layers:
            x = layer(x)
        return x

    def by_reference(
        self, image: Tensor, tile: tuple[int, int] = (4, 4), window: Any = 1, window_shape: str = "plus"
    ) -> Tensor:
        """In the form that the table has for few tokens, or another."""
        sizes = tuple(n // PATCH for n in image.shape[-2:])
        form = {"block_size": tile[0] * tile[1], "tile": tile, "grid": sizes, "window": window}
        form |= {"prefix": self.tokens.shape[1], "window_shape": window_shape, "prefix_at_end": self.at_end}
        for layer in self.layers:
            layer.form = form
        try:
            return self(image)
        finally:
            for layer in self.layers:
                layer.form = None


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def image(batch: int = 2, height: int = 9, width: int = 7) -> Tensor:
    """Of so many patches."""
    g = torch.Generator().manual_seed(batch + height)
    return torch.randn(batch, 3, height * PATCH, width * PATCH, generator=g)


def compiled(model: nn.Module, *, dynamic: bool = False, **options: Any) -> Callable[..., Tensor]:
    strict = ALWAYS | {"strict": True}
    return torch.compile(model, backend=monarch, dynamic=dynamic, fullgraph=True, options=strict | options)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "at_end"), [(1, False), pytest.param(5, False, marks=pytest.mark.nightly), (7, True)]
)
def test_a_grid_and_the_tokens_beside_it_are_found(num_tokens: int, at_end: bool) -> None:
    model, x = ViT(num_tokens=num_tokens, at_end=at_end).eval(), image()
    with torch.no_grad():
        report = explain(model, x, options=ALWAYS)
        close(compiled(model)(x), model.by_reference(x))
    forms = [site.ir.form for site in report.sites]
    assert [site.ir.grid for site in report.sites] == [(9, 7)] * 2
    assert [(form.tile, form.prefix, form.prefix_at_end) for form in forms] == [((4, 4), num_tokens, at_end)] * 2
    side = "before" if at_end else "after"
    assert f"a grid of 9 x 7 tokens {side} {num_tokens} token" in report.sites[0].blocking
    assert report.sites[0].blocking in str(report)
    assert report.to_dict()["sites"][0]["blocking"] == report.sites[0].blocking


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "tile", "window", "window_shape"),
    [
        ({"tile": (2, 5)}, (2, 5), 1, "plus"),
        ({"window": 1}, (4, 4), 1, "box"),
        ({"window": 0}, (4, 4), 0, "box"),
        ({"window": (1, 0)}, (4, 4), (1, 0), "box"),
        ({"tile": (3, 3), "window": None}, (3, 3), None, "box"),
    ],
    ids=str,
)
def test_options_beside_a_grid_that_is_found(
    options: dict[str, Any], tile: tuple[int, int], window: Any, window_shape: str
) -> None:
    model, x = ViT(num_layers=1).eval(), image()
    with torch.no_grad():
        close(compiled(model, **options)(x), model.by_reference(x, tile, window, window_shape))


@pytest.mark.parametrize("options", [{"pad": "pre"}, {"block_size": 16}, {"tile": None}, {"grid": None}], ids=str)
def test_options_that_ask_for_pieces(options: dict[str, Any]) -> None:
    with torch.no_grad():
        report = explain(ViT(num_layers=1).eval(), image(), options=ALWAYS | options)
    (site,) = report.sites
    assert site.lowered
    assert (site.ir.form.tile, site.ir.form.window, site.ir.form.prefix) == (None, 1, 0)


@pytest.mark.nightly
@pytest.mark.parametrize(("num_layers", "at_end"), [(2, False), (3, False), (2, True)])
def test_images_of_several_sizes(num_layers: int, at_end: bool, poisoned: Any) -> None:
    """With two symbolic sizes, whose product alone is a dim of the sites' tensors."""
    model = ViT(num_layers=num_layers, at_end=at_end).eval()
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch, height, width in ((2, 9, 7), (2, 12, 8), (3, 7, 13), (1, 16, 6)):
            for _ in range(3):
                x = between_margins(image(batch, height, width))
                close(run(x), model.by_reference(x))
    assert poisoned.num_buffers
    assert not poisoned.overwritten


@pytest.mark.nightly
def test_training_steps() -> None:
    model, x = ViT(num_layers=1), image()
    run = compiled(model)
    for _ in range(2):
        found = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model.by_reference(x).square().sum(), list(model.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_an_exported_program() -> None:
    model, x = ViT().eval(), image()
    with torch.no_grad():
        program = monarch_compile.lower_exported(export(model, (x,)), ALWAYS | {"strict": True})
        assert len(program.graph.find_nodes(op="call_function", target=ATTENTION_OP)) == 2
        close(program.module()(x), model.by_reference(x))


# Grids by hand


class Tokens(nn.Module):
    """Tokens that come as such: no grid can be found."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("at_end", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_grid_by_hand(at_end: bool) -> None:
    model, x = Tokens().eval(), torch.randn(2, 2 + 5 * 8, DIM)
    given = {"grid": (5, 8), "prefix": 2, "prefix_at_end": at_end}
    with torch.no_grad():
        found = compiled(model, **given)(x)
        model.layer.form = {"block_size": 16, "tile": (4, 4), "window": 1, "window_shape": "plus", **given}
        close(found, model(x))
        report = explain(Tokens().eval(), x, options={**ALWAYS, **given, "grid": [5, 8]})
    side = "before" if at_end else "after"
    assert report.sites[0].blocking == f"a grid of 5 x 8 tokens {side} 2 tokens, given by option grid"


def test_a_wrong_grid_is_refused_with_its_numbers() -> None:
    message = r"0 \+ 5 \* 8 = 40 tokens; found self-attention over 42"
    x = torch.randn(1, HEADS, 42, 8)
    with pytest.raises(ConfigError, match=message):
        explain(Tokens(), torch.randn(2, 42, DIM), options={**ALWAYS, "grid": (5, 8)})
    with pytest.raises(Exception, match=message):
        compiled(Tokens(), grid=(5, 8))(torch.randn(2, 42, DIM))
    with pytest.raises(ConfigError, match=message), replace_sdpa(policy="always", grid=(5, 8)):
        F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("window", [1, (0, 1)], ids=str)
def test_replaced_calls_over_a_grid(window: Any) -> None:
    q, k, v = (torch.randn(1, HEADS, 1 + 5 * 8, 8) for _ in range(3))
    with replace_sdpa(policy="always", grid=(5, 8), prefix=1, window=window, window_shape="plus") as context:
        found = F.scaled_dot_product_attention(q, k, v)
    assert context.lowered == 1
    form = {"block_size": 16, "tile": (4, 4), "grid": (5, 8), "prefix": 1, "window": window, "window_shape": "plus"}
    close(found, reference(q, k, v, scale=8**-0.5, **form))


# Plans


@pytest.fixture
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """At test sizes no form is predicted to pay: here time goes by the keys that a row scores."""

    def seconds(occurrence: Any, device: Any, form: Form) -> tuple[float, float]:
        near = form.one_axis().window or 0
        return 1e4, form.num_iters * (form.block_size * (1 + 2 * near) + 64 / form.block_size)

    monkeypatch.setattr(candidates.Occurrence, "seconds", seconds)


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize("at_end", [False, True])
def test_calibration_searches_tiles(at_end: bool, tmp_path: Path) -> None:
    model, x = ViT(num_layers=2, at_end=at_end).eval(), image()
    plan = monarch_compile.calibrate(model, x, budget=0.3, progress=False)
    forms = [site.form for site in plan.sites]
    assert all(form is not None and form.tile is not None and form.prefix == 1 for form in forms)
    assert all(form.prefix_at_end is at_end for form in forms)
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan
    with torch.no_grad():
        for layer, form in zip(model.layers, forms, strict=True):
            layer.form = {**vars(form), "grid": (9, 7)}
        expected = model(x)
        for layer in model.layers:
            layer.form = None
        close(torch.compile(model, backend=monarch, dynamic=False, options={"plan": loaded, **ALWAYS})(x), expected)
        error = ((expected - model(x)).norm() / model(x).norm()).item()
    assert error == pytest.approx(plan.metric, rel=1e-3)


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize("options", [{"tile": (3, 3), "window": (1, 0)}, {"tile": None}, {"block_size": 16}], ids=str)
def test_calibration_keeps_options(options: dict[str, Any]) -> None:
    plan = monarch_compile.calibrate(
        ViT(num_layers=1).eval(), image(), budget=1e9, progress=False, options={"num_iters": 1, **options}
    )
    (site,) = plan.sites
    assert site.form is not None
    assert {name: getattr(site.form, name) for name in options} == options
    assert (site.form.tile is None) == ("window" not in options)


def test_a_plan_with_tiles_needs_a_grid() -> None:
    x = torch.randn(2, 40, DIM)
    with torch.no_grad():
        (site,) = explain(Tokens().eval(), x, options=ALWAYS).sites
        planned = SitePlan(site.name, (HEADS, DIM // HEADS, DIM // HEADS), Form(16, window=0, tile=(4, 4)))
        plan = Plan((planned,), ((site.name,),), 1.0, 0.5, 1, 1, "cpu")
        with pytest.raises(PlanError, match=r"it has tiles \(4, 4\) for .*: no token grid"):
            explain(Tokens().eval(), x, options={"plan": plan, **ALWAYS})
        given = explain(Tokens().eval(), x, options={"plan": plan, "grid": (5, 8), **ALWAYS})
    assert given.sites[0].ir.form == planned.form
