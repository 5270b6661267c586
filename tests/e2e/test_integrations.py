"""Eager code through replace_sdpa and transformers, against the backend with the same options."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes

from monarch_compile import ConfigError, LoweringError
from monarch_compile.integrations import register_transformers, replace_sdpa

OPTIONS = {"policy": "always", "block_size": 8}
FORMS = [{}, {"window": None}, {"num_iters": 2, "init": "mean", "pad": "pre", "prefix": 3}, {"block_size": "auto"}]


def _qkv(heads=2, kv_heads=2, seq_len=41):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, seq_len, 16, generator=generator) for h in (heads, kv_heads, kv_heads))


def _visible(seq_len=41):
    return torch.arange(seq_len) < torch.tensor([[seq_len], [seq_len - 12]])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_same_options_same_numbers_as_the_backend(form):
    options, (q, k, v), visible = OPTIONS | form, _qkv(), _visible()

    def fn(q, k, v, visible):
        return F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, visible[:, None, None])

    expected, (rewrite,) = run_passes(fn, q, k, v, visible, **options)
    with replace_sdpa(**options) as replaced:
        found = fn(q, k, v, visible)
    assert (rewrite.num_lowered, replaced.lowered, replaced.exact) == (2, 2, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], fn(q, k, v, visible)[0], atol=1e-3)  # and the door is shut again


def test_masks_are_proved_by_their_values():
    (q, k, v), visible = _qkv(), _visible()
    lowest = torch.finfo(torch.float32).min
    with replace_sdpa(**OPTIONS) as replaced:
        expected = F.scaled_dot_product_attention(q, k, v, visible[:, None, None, :])
        full = visible[:, None, None, :].repeat(1, 2, 41, 1)
        for mask in (full, torch.zeros(full.shape).masked_fill(~full, lowest), full.float().log()):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)
    assert replaced.lowered == 4


def test_grouped_heads_and_a_scale():
    q, k, v = _qkv(4, 2)
    with replace_sdpa(**OPTIONS, strict=True):
        found = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        expected = F.scaled_dot_product_attention(q * 0.3, *(x.repeat_interleave(2, 1) for x in (k, v)), scale=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _causal_mask():
    return torch.ones(41, 41, dtype=torch.bool).tril()


def _one_query_differs():
    mask = _visible()[:, None, None, :].repeat(1, 1, 41, 1)
    mask[1, 0, 40, 40] = True
    return mask


def _one_head_differs():
    mask = _visible()[:, None, None, :].repeat(1, 2, 1, 1)
    mask[1, 1, 0, 40] = True
    return mask


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("mask_causal", {"is_causal": True}),
        ("mask_general", {"attn_mask": _causal_mask()}),
        ("mask_general", {"attn_mask": _one_query_differs()}),
        ("mask_general", {"attn_mask": _one_head_differs()}),
        ("mask_key_bias", {"attn_mask": torch.linspace(-1, 0, 41)[None]}),
    ],
    ids=["causal", "causal_mask", "query", "head", "bias"],
)
def test_what_is_not_legal_is_plain_sdpa(code, arguments, caplog):
    q, k, v = _qkv()
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    with caplog.at_level(logging.WARNING, "monarch_compile.integrations"), replace_sdpa(**OPTIONS) as replaced:
        for _ in range(3):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, **arguments), expected)
    assert (replaced.lowered, replaced.exact) == (0, 3)
    assert list(replaced.reasons) == [code]
    assert len(caplog.records) == 1
    assert f"[{code}]" in caplog.text
    with pytest.raises(LoweringError, match=code), replace_sdpa(**OPTIONS, strict=True):
        F.scaled_dot_product_attention(q, k, v, **arguments)


def test_cross_attention_and_dropout_stay_exact():
    q, k, v = _qkv()
    with replace_sdpa(**OPTIONS) as replaced:
        cross = F.scaled_dot_product_attention(q[:, :, :7], k, v)
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert torch.equal(cross, F.scaled_dot_product_attention(q[:, :, :7], k, v))
    assert list(replaced.reasons) == ["cross_attention", "dropout_active"]


def test_the_choice_is_not_a_lack_of_support():
    q, k, v = _qkv()
    outcomes = {"cost_exact_wins": {}, "policy_never": {"policy": "never"}, "min_seq_len": {"min_seq_len": 99}}
    for code, options in outcomes.items():
        with replace_sdpa(**options, strict=True) as replaced:
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), replaced_by_nothing(q, k, v))
        assert list(replaced.reasons) == [code]


def replaced_by_nothing(q, k, v):
    with torch._C.DisableTorchFunction():
        return F.scaled_dot_product_attention(q, k, v)


def test_gradients_flow():
    q, k, v = (x.requires_grad_() for x in _qkv())
    with replace_sdpa(**OPTIONS):
        F.scaled_dot_product_attention(q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"blocksize": 3}, {"max_autotune": True}])
def test_options_without_a_use_raise(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        replace_sdpa(**options)


def test_no_import_of_transformers():
    code = "import sys, monarch_compile.integrations; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    register_transformers("monarch", **OPTIONS)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=99, initializer_range=0.4, **sizes)  # weights that tell keys apart
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("masked", [False, True])
def test_transformers_gives_the_numbers_of_the_backend(bert, masked):
    tokens = torch.arange(82).view(2, 41)
    mask = _visible().long() if masked else None
    with torch.no_grad():
        exact = bert(tokens, attention_mask=mask)[0]
        expected, (rewrite,) = run_passes(lambda t, m: bert(t, attention_mask=m)[0], tokens, mask, **OPTIONS)
        bert.set_attn_implementation("monarch")
        found = bert(tokens, attention_mask=mask)[0]
    assert rewrite.num_lowered == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, exact, atol=1e-3)


def test_a_causal_transformer_is_plain_sdpa(bert):
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99)).eval()
    tokens, mask = torch.arange(82).view(2, 41), _visible().long()
    with torch.no_grad():
        for given in (None, mask):
            model.set_attn_implementation("sdpa")
            exact = model(tokens, attention_mask=given)[0]
            model.set_attn_implementation("monarch")
            assert torch.equal(model(tokens, attention_mask=given)[0], exact)


def test_traced_code_is_left_to_the_backend(bert):
    """Under torch.compile the door is transparent: the backend's graph has plain SDPA, and is lowered as ever."""
    tokens = torch.arange(82).view(2, 41)
    bert.set_attn_implementation("monarch")
    with torch.no_grad():
        expected = bert(tokens)[0]
        found, (rewrite,) = run_passes(lambda t: bert(t)[0], tokens, **OPTIONS)
        _, (exact,) = run_passes(lambda t: bert(t)[0], tokens, **OPTIONS | {"policy": "never"})
    assert (rewrite.num_lowered, exact.num_lowered) == (2, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_function_inside_the_context():
    q, k, v = _qkv()
    with replace_sdpa(**OPTIONS) as replaced:
        found, (rewrite,) = run_passes(F.scaled_dot_product_attention, q, k, v, **OPTIONS | {"policy": "never"})
    assert rewrite.num_lowered == 0
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))
    assert replaced.lowered == 0
