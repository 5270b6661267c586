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
from monarch_compile.attention import eager_calls
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
    ],
    ids=["causal", "causal_mask", "query", "head"],
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


@pytest.mark.parametrize(
    ("options", "arguments", "lowered"),
    [(OPTIONS, {}, 5), ({}, {}, 0), (OPTIONS, {"is_causal": True}, 0)],
    ids=["lowered", "cost", "illegal"],
)
def test_equal_calls_are_decided_on_once(options, arguments, lowered, monkeypatch):
    q, k, v = _qkv(seq_len=43)
    asked = []
    judge = eager_calls.judge
    monkeypatch.setattr(eager_calls, "judge", lambda *given: asked.append(given) or judge(*given))
    eager_calls.decider.cache_clear()
    for _ in range(5):
        with replace_sdpa(**options) as replaced:
            F.scaled_dot_product_attention(q.clone(), k, v, **arguments)
    assert len(asked) == 1
    assert replaced.lowered == (lowered > 0)


def _changed_calls():
    """(code, or None where lowered; tensors; arguments): each like the first but for one fact."""
    q, k, v = _qkv(4, 2)
    visible = _visible()[:, None, None, :].repeat(1, 1, 41, 1)
    other = visible.clone()
    other[1, 0, 40, 40] = True
    gqa = {"enable_gqa": True}
    return [
        (None, (q, k, v), gqa),
        (None, (q, k, v), gqa | {"attn_mask": visible}),
        ("mask_general", (q, k, v), gqa | {"attn_mask": other}),
        (None, (q, k, v), gqa | {"attn_mask": visible.float().log()}),
        ("rank", (q, k, v), gqa | {"attn_mask": visible[None]}),
        ("gqa", (q, k, v), {}),
        ("gqa", (q[:, :3], k, v), gqa),
        (None, (q[:, :, :19], k[:, :, :19], v[:, :, :19]), gqa),
        ("cross_attention", (q[:, :, :19], k, v), gqa),
        ("dropout_active", (q, k, v), gqa | {"dropout_p": 0.5}),
        ("mask_causal", (q, k, v), gqa | {"is_causal": True}),
        (None, (q, k, v), gqa | {"scale": 0.7}),
        (None, tuple(x.double() for x in (q, k, v)), gqa),
        ("rank", tuple(x[0] for x in (q, k, v)), gqa),
        ("empty", (q[..., :0], k[..., :0], v), gqa),
    ]


def test_a_decision_serves_no_other_call():
    """Two rounds of calls that differ in one fact: each is judged as itself, however the others were."""
    alone = []
    for code, tensors, arguments in _changed_calls():
        eager_calls.decider.cache_clear()
        with replace_sdpa(**OPTIONS) as replaced:
            alone.append(_outcome(tensors, arguments))
        assert [*replaced.reasons] == ([code] if code else [])
        assert replaced.lowered == (code is None)
    with replace_sdpa(**OPTIONS) as replaced:
        for _ in range(2):
            for (code, tensors, arguments), expected in zip(_changed_calls(), alone, strict=True):
                before = replaced.lowered
                found = _outcome(tensors, arguments)
                assert replaced.lowered - before == (code is None)
                if arguments.get("dropout_p") is None:
                    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def _outcome(tensors, arguments):
    """The output, or the type of the error that plain SDPA raises."""
    try:
        return F.scaled_dot_product_attention(*tensors, **arguments)
    except (RuntimeError, ValueError):
        return torch.tensor(float("nan"))


def test_a_mask_is_read_at_every_call():
    q, k, v = _qkv()
    mask = _visible()[:, None, None, :].repeat(1, 1, 41, 1)
    with replace_sdpa(**OPTIONS) as replaced:
        first = F.scaled_dot_product_attention(q, k, v, mask)
        mask[0, :, :, 30:] = False  # in place: the same tensor, other keys
        second = F.scaled_dot_product_attention(q, k, v, mask)
        mask[0, :, 7, 35] = True  # no key mask any more
        third = F.scaled_dot_product_attention(q, k, v, mask)
    assert (replaced.lowered, replaced.exact) == (2, 1)
    assert not torch.allclose(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])
    torch.testing.assert_close(third, replaced_by_nothing(q, k, v, mask))


def test_options_and_gradients_take_no_decision_of_others():
    q, k, v = _qkv()
    for _ in range(2):
        with replace_sdpa(**OPTIONS), torch.no_grad():
            eights = F.scaled_dot_product_attention(q, k, v)
        with replace_sdpa(**OPTIONS | {"block_size": 41}):
            whole = F.scaled_dot_product_attention(q, k, v)
        with replace_sdpa(policy="never"):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), replaced_by_nothing(q, k, v))
        with replace_sdpa(**OPTIONS):
            trained = [x.clone().requires_grad_() for x in (q, k, v)]
            F.scaled_dot_product_attention(*trained).sum().backward()
        assert all(x.grad.abs().sum() > 0 for x in trained)
        torch.testing.assert_close(whole, replaced_by_nothing(q, k, v), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(eights, whole, atol=1e-3)


def test_strict_looks_at_masks_of_calls_too_short_to_pay():
    q, k, v = _qkv()
    with replace_sdpa() as replaced:
        F.scaled_dot_product_attention(q, k, v, _causal_mask())
    assert list(replaced.reasons) == ["cost_exact_wins"]
    with pytest.raises(LoweringError, match="mask_general"), replace_sdpa(strict=True):
        F.scaled_dot_product_attention(q, k, v, _causal_mask())


def replaced_by_nothing(*given):
    with torch._C.DisableTorchFunction():
        return F.scaled_dot_product_attention(*given)


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


def test_a_call_that_trains_is_judged_apart_and_eager_calls_count() -> None:
    """At 1500 keys, an eager call gains and one with a backward pass loses; compiled, both gain."""
    q = torch.randn(1, 12, 1500, 64)
    with replace_sdpa() as door:
        F.scaled_dot_product_attention(q, q, q)
        assert (door.lowered, door.exact) == (1, 0)
        trained = q.clone().requires_grad_()
        F.scaled_dot_product_attention(trained, trained, trained)
        assert (door.lowered, door.exact) == (1, 1)
        assert list(door.reasons) == ["backward_exact_wins"]
        with torch.no_grad():
            F.scaled_dot_product_attention(trained, trained, trained)
        assert (door.lowered, door.exact) == (2, 1)
