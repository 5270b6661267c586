"""The whole path on CPU: torch.compile(model, backend="monarch")."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from monarch_compile.backend import CacheKey, monarch
from monarch_compile.config import MonarchConfig
from monarch_compile.passes import pipeline
from tests.support.block import Block, key_padding

ALWAYS = {"policy": "always"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what would go to Inductor through AOTAutograd alone: for tests that need no generated C++."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))


def _compile(model: Callable[..., object], **options: object) -> Callable[..., object]:
    return torch.compile(model, backend="monarch", fullgraph=True, options=ALWAYS | options)


def test_the_backend_is_found_with_no_import() -> None:
    code = "import sys, torch; print('monarch' in torch._dynamo.list_backends(()), 'monarch_compile' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("block_size", [1, 64])
def test_extreme_block_sizes_are_exact(block_size: int) -> None:
    model, x, visible = Block().eval(), torch.randn(3, 40, 24), key_padding(3, 40)

    def both(x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), model(x, visible)

    with torch.no_grad():
        output = _compile(both, block_size=block_size)(x, visible)
        torch.testing.assert_close(output, both(x, visible), rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["lowered"] == 2


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"num_iters": 3, "init": "mean", "pad": "pre"}, id="all", marks=pytest.mark.nightly),
    ],
)
def test_real_blocks_agree_with_the_reference(options: dict[str, object]) -> None:
    model, x, visible = Block().eval(), torch.randn(3, 41, 24), key_padding(3, 41)
    options = {"block_size": 7} | options
    with torch.no_grad():
        output = _compile(lambda x, visible: (model(x), model(x, visible)), **options)(x, visible)
        expected = model.by_reference(x, **options), model.by_reference(x, visible, **options)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"block_size": 64, "window": None}], ids=str)
def test_a_mask_from_lengths_in_a_padded_block(options: dict[str, object]) -> None:
    """The comparison and the padding fuse into C++ that torch 2.13 cannot compile, if the padded thing is a bool."""

    def attend(q: Tensor, lengths: Tensor) -> Tensor:
        visible = torch.arange(q.shape[2]) < lengths[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=visible[:, None, None])

    q, lengths = torch.randn(2, 3, 10, 8), torch.tensor([5, 10])
    compiled = _compile(attend, **options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, lengths), attend(q, lengths), rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["lowered"] == 1


def test_padding_never_leaks() -> None:
    """Blocks and rows with no visible key: all finite, and what a padded key holds changes nothing."""
    visible = key_padding(4, 40)
    visible[3] = False

    def fn(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])

    q, k, v = (torch.randn(4, 2, 40, 8) for _ in range(3))
    compiled = torch.compile(fn, backend="monarch", options=ALWAYS | {"block_size": 8})
    output = compiled(q, k, v, visible)
    assert counters["monarch"]["lowered"] == 1
    assert output.isfinite().all()
    assert (output[3] == 0).all()
    hidden = ~visible[:, None, :, None]
    changed = compiled(q, k.masked_fill(hidden, 50.0), v.masked_fill(hidden, 1e5), visible)
    torch.testing.assert_close(changed, output)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("no_inductor")
def test_multihead_attention_module(batch_first: bool, masked: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=batch_first).train()
    x = torch.randn(2, 20, 24) if batch_first else torch.randn(20, 2, 24)
    padding = ~key_padding(2, 20) if masked else None

    def fn(x: Tensor, padding: Tensor | None) -> Tensor:
        return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    output = torch.compile(fn, backend="monarch", fullgraph=True, options=ALWAYS | {"block_size": 1})(x, padding)
    assert counters["monarch"]["lowered"] == 1
    torch.testing.assert_close(output, fn(x, padding), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_inductor")
def test_training_gives_the_gradients_of_the_reference() -> None:
    model, x = Block(), torch.randn(2, 41, 24)
    _compile(model, block_size=7)(x).square().sum().backward()
    assert counters["monarch"]["lowered"] == 1
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.by_reference(x, block_size=7).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_symbolic_length_with_a_given_block_size() -> None:
    model = Block().eval()
    compiled = torch.compile(model, backend="monarch", dynamic=True, options=ALWAYS | {"block_size": 8})
    with torch.no_grad():
        for seq_len in (40, 33, 64, 71, 100):
            x = torch.randn(2, seq_len, 24)
            torch.testing.assert_close(compiled(x), model.by_reference(x, block_size=8), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_short_model_is_left_to_inductor() -> None:
    """Policy "auto" at N = 128 lowers nothing, and Inductor gets the very graph it would have had."""
    model, x = Block().eval(), torch.randn(1, 128, 24)
    with torch.no_grad():
        output = torch.compile(model, backend="monarch", fullgraph=True)(x)
        assert counters["monarch"] == {"lowered": 0, "exact": 1, "exact: cost_exact_wins": 1}
        torch._dynamo.reset()
        assert torch.equal(output, torch.compile(model, backend="inductor", fullgraph=True)(x))


def test_bad_options_reach_the_user() -> None:
    for options, message in (({"blocksize": 3}, "unknown option 'blocksize'"), ({"pad": 3}, "option 'pad' must be")):
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=message):
            torch.compile(Block(), backend="monarch", options=options)(torch.randn(1, 8, 24))


@pytest.mark.usefixtures("no_inductor")
def test_strict_raises_where_a_site_stays_exact_for_lack_of_support() -> None:
    def causal(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(
        BackendCompilerFailed, match=r"(?s)1 attention site cannot.*mask_causal.*option causal is False"
    ):
        torch.compile(causal, backend="monarch", options={"strict": True})(q)
    torch._dynamo.reset()
    model, x = Block().eval(), torch.randn(1, 16, 24)
    torch.compile(model, backend="monarch", options={"strict": True})(x)


@pytest.mark.usefixtures("no_inductor")
def test_a_failing_pass_falls_back_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(gm: GraphModule) -> list[object]:
        raise RuntimeError("no luck")

    monkeypatch.setattr(pipeline, "frontends", broken)
    model, x = Block().eval(), torch.randn(1, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(_compile(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["fallback"] == 1
    assert "no luck" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="no luck"):
        _compile(model, strict=True)(x)


def test_the_cache_key_follows_options_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {CacheKey(MonarchConfig(block_size=b)).uuid() for b in (7, 8)}
    monkeypatch.setattr(pipeline, "source_digest", lambda: "changed")
    keys.add(CacheKey(MonarchConfig(block_size=7)).uuid())
    assert len(keys) == 3


@pytest.mark.usefixtures("no_inductor")
def test_every_pass_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONARCH_DEBUG_DIR", str(tmp_path))
    _compile(Block().eval(), block_size=8)(torch.randn(1, 16, 24))
    names = [p.name for p in sorted((tmp_path / "graph_000").glob("*.py"))]
    assert names[0] == "00_capture.py"
    passes = [f"{p.name}.py" for p in pipeline.pipeline(pipeline.frontends())]
    passes.remove("short_convolutions_to_sums.py")  # runs where a long convolution is lowered
    assert [n.split("_", 1)[1] for n in names[1 : len(passes) + 1]] == passes
    assert "monarch_compile.attention" in (tmp_path / "graph_000" / names[len(passes)]).read_text()
    kernels = names[len(passes) + 1 :]
    forward, backward = ["summarize", "attend"], ["summarize", "attend", "attend", "summarize", "summarize"]
    assert [k.split("_")[2] for k in kernels] == forward + backward
    assert "@triton.jit" in (tmp_path / "graph_000" / kernels[0]).read_text()
    assert '"status": "lowered"' in (tmp_path / "graph_000" / "decisions.jsonl").read_text()


@pytest.mark.usefixtures("no_inductor")
def test_the_function_can_be_given_in_place_of_its_name() -> None:
    model, x = Block().eval(), torch.randn(1, 16, 24)
    with torch.no_grad():
        output = torch.compile(model, backend=monarch, options=ALWAYS | {"block_size": 1})(x)
    torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_with_a_lowered_site_is_computed_anew_with_the_same_dropout() -> None:
    """The gradient of a factor is what it multiplied, which the backward pass computes a second time."""

    def body(q: Tensor, factor: Tensor) -> Tensor:
        return F.dropout(F.scaled_dot_product_attention(q, q, q), 0.5, training=True) * factor

    q, factor = torch.randn(1, 2, 40, 8, requires_grad=True), torch.ones(1, 2, 40, 8, requires_grad=True)
    compiled = _compile(lambda q, factor: checkpoint(body, q, factor, use_reentrant=False), block_size=8)
    output = compiled(q, factor)
    (gradient,) = torch.autograd.grad(output.sum(), factor)
    assert counters["monarch"] == {"lowered": 1, "exact": 0}
    assert 0.3 < (output == 0).float().mean() < 0.7
    torch.testing.assert_close(gradient, output)


@pytest.mark.usefixtures("no_inductor")
def test_transformers_gradient_checkpointing_is_lowered() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vocab_size=50)
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    tokens, visible = torch.randint(0, 50, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    visible[1, 17:] = 0

    def gradient(run: Callable[..., object]) -> Tensor:
        model.zero_grad()
        run(tokens, attention_mask=visible, use_cache=False).last_hidden_state[:, :17].sin().sum().backward()
        return model.embeddings.word_embeddings.weight.grad.clone()

    expected = gradient(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradient(_compile(model, block_size=1))
    assert counters["monarch"] == {"lowered": 2, "exact": 0}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_inductor_can_raise_that_a_loop_does_not_split() -> None:
    """Inductor of torch 2.11 raises it without its two arguments, which no site of ours is to turn into a TypeError."""
    from torch._inductor.codegen.simd import CantSplit

    x = torch.randn(1, 2, 64, 16)
    torch.compile(F.scaled_dot_product_attention, backend=monarch, options={"policy": "always"})(x, x, x)
    with pytest.raises(CantSplit):
        raise CantSplit  # as it does
