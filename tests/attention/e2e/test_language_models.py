"""Causal language models of transformers: prompts in one piece and in several, then decoding; all blocks chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

import monarch_compile
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import cost_refusal
from monarch_compile.attention.signature import Signature, first_broken
from monarch_compile.calls import DEVICE_ALONE
from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import DEVICES
from monarch_compile.integrations import register_transformers, replace_sdpa

transformers = pytest.importorskip("transformers")

MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Gemma3Text": {"head_dim": 8, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 8},
}
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4}
OPTIONS = {"causal": True, "policy": "always", "block_size": 4, "window": 1, "chosen": 60}
STEPS = 10
PIECES = {"one piece": (40,), "three pieces": (17, 12, 11)}


def language_model(name: str, implementation: str = "sdpa", **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    made = config(**{**SIZES, **MODELS[name], **more}, attn_implementation=implementation)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


def prompt(length: int = 50) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


def prefilled_and_decoded(call: Any, pieces: tuple[int, ...], mask: Tensor | None = None) -> list[Tensor]:
    """Logits of the pieces of a prompt, then of single tokens after it."""
    cache, found, end = transformers.DynamicCache(), [], 0
    for part in prompt(sum(pieces) + STEPS).split([*pieces, *(1,) * STEPS], 1):
        end += part.shape[1]
        seen = None if mask is None else mask[:, :end]
        output = call(input_ids=part, attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return found


def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("name", MODELS)
def test_in_eager_code(name: str, pieces: tuple[int, ...]) -> None:
    """By replace_sdpa and as attn_implementation: what eager gives, for decoding stays exact."""
    model = language_model(name)
    with torch.no_grad():
        expected = prefilled_and_decoded(model, pieces)
        with replace_sdpa(**OPTIONS) as context:
            found = prefilled_and_decoded(model, pieces)
        assert context.lowered == 2 * len(pieces)
        assert set(context.reasons) == {"single_query"}
        register_transformers("monarch", **OPTIONS)
        named = language_model(name, "monarch")
        named.load_state_dict(model.state_dict())
        assert_same(found, expected)
        assert_same(prefilled_and_decoded(named, pieces), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_eager_code(side: str) -> None:
    model = language_model("Llama")
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, : 5 if side == "left" else 0] = 0
    mask[1, 35 if side == "right" else 50 : 40] = 0
    with torch.no_grad():
        expected = prefilled_and_decoded(model, (17, 23), mask)
        with replace_sdpa(**OPTIONS) as context:
            found = prefilled_and_decoded(model, (17, 23), mask)
    assert context.lowered >= 2  # a part without a hidden key has no mask
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one[1, 5:], other[1, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_through_the_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in two pieces and ten decode steps, compiled but for Inductor."""
    without_inductor(monkeypatch)
    model = language_model(
        name, num_hidden_layers=1, **({"layer_types": ["full_attention"]} if "Gemma" in name else {})
    )
    torch._dynamo.reset()
    counters["monarch"].clear()
    with torch.no_grad():
        expected = prefilled_and_decoded(model, (24, 16))
        compiled = torch.compile(model, backend="monarch", options=OPTIONS)
        assert_same(prefilled_and_decoded(compiled, (24, 16)), expected)
    found = counters["monarch"]
    assert found["lowered"] == 2
    assert found["exact"] == found["exact: single_query"] > 0
    assert found["fallback"] == 0


def _end_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ahead = k.shape[2] - q.shape[2]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(ahead)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_one_compilation_serves_several_lengths_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    form = {"block_size": 4, "window": 1, "chosen": 1, "prefix": 2}
    options = {"causal": True, "policy": "always", "strict": True, **form}
    compiled = torch.compile(lambda *x: _end_of_keys(*x), backend="monarch", options=options)
    for rows, keys in ((7, 23), (9, 23), (9, 31), (30, 40)):
        q, k, v = (torch.randn(1, 2, n, 8) for n in (rows, keys, keys))
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        with torch.no_grad():
            found = compiled(q, k, v)
        torch.testing.assert_close(found, monarch_attention(q, k, v, causal=True, **form), rtol=1e-5, atol=1e-5)


def test_compiled_by_inductor() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (7, 23, 23))
    options = {**OPTIONS, "strict": True}
    with torch.no_grad():
        found = torch.compile(lambda *x: _end_of_keys(*x), backend="monarch", options=options, dynamic=False)(q, k, v)
    torch.testing.assert_close(found, _end_of_keys(q, k, v), rtol=1e-4, atol=1e-5)


def test_explain_measures_against_attention_to_the_cache() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (7, 23, 23))
    report = monarch_compile.explain(_end_of_keys, q, k, v, options=OPTIONS, measure=True)
    assert report.sites[0].error < 1e-5


def test_masks_of_pytorch_itself() -> None:
    """causal_lower_right counts from the last key, causal_upper_left and the flag from the first."""
    bias = pytest.importorskip("torch.nn.attention.bias")
    q, k, v = (torch.randn(1, 2, n, 8) for n in (7, 23, 23))
    codes = {}
    for made in (bias.causal_lower_right, bias.causal_upper_left):
        mask = made(7, 23)
        decided = decisions_of(
            lambda *x, mask=mask: F.scaled_dot_product_attention(*x, attn_mask=mask), q, k, v, causal=True
        )
        codes[made.__name__] = [decision.code for decision in decided]
    assert codes == {"causal_lower_right": ["lowered"], "causal_upper_left": ["cross_attention"]}


def test_a_cache_without_the_option_stays_exact() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (7, 23, 23))
    assert [d.code for d in decisions_of(_end_of_keys, q, k, v)] == ["cross_attention"]
    assert [d.code for d in decisions_of(_end_of_keys, q, k, v, cross_attention=True)] == ["mask_causal"]


def test_queries_after_a_cache_are_lowered_on_every_device() -> None:
    shapes = ((1, 2, 7, 8), (1, 2, 23, 8), (1, 2, 23, 8))
    for device in ("cuda", "cpu"):
        for trains, code in ((False, None), (True, "mask_causal")):
            options = {"is_causal": True, "follows_cache": True, "trains": trains}
            site = Signature(shapes, frozenset({torch.float32}), frozenset({device}), 1.0, **options)
            refused = first_broken(site, MonarchConfig(causal=True))
            assert (refused and refused.code) == code


@pytest.mark.parametrize(("queries", "keys", "lowers"), [(2048, 8192, True), (2047, 8192, False), (2048, 8191, False)])
def test_on_a_gpu_policy_auto_lowers_queries_after_a_cache_where_they_were_timed(
    queries: int, keys: int, lowers: bool
) -> None:
    sizes = {"batch": 1, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "value_dim": 128}
    form, lengths = Form(64, window=2, chosen=8), {"seq_len_q": queries, "seq_len_k": keys}
    ir = MonarchAttention(**sizes, **lengths, dtype=torch.bfloat16, form=form, scale=0.1, is_causal=True)
    weighed = {"auto": False, "batch": 1, "seq_len": keys, "queries": queries}
    refused = cost_refusal(ir, DEVICES["h100"], {}, "", calls=DEVICE_ALONE, **weighed)
    assert (refused is None) == lowers
    if refused is not None:
        assert refused.code == "unmeasured_kernels"
        assert "after a cache" in refused.reason
