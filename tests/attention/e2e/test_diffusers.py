"""The "monarch" attention backend of diffusers, in tiny models with random weights."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes

from monarch_compile import ConfigError, LoweringError
from monarch_compile.integrations import register_diffusers, replace_sdpa
from monarch_compile.report.explainer import explain

pytestmark = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")

BLOCKS = {"policy": "always", "block_size": 8}
WHOLE = {"policy": "always", "block_size": 128}
"""One block: exact by definition."""
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def flux():
    """2 attentions of text and image together, 48 tokens."""
    import diffusers

    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
    model = diffusers.FluxTransformer2DModel(**HEADS, **sizes, joint_attention_dim=32, pooled_projection_dim=32)
    inputs = {
        "hidden_states": torch.randn(1, 36, 4),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": torch.randint(6, (36, 3)).float(),
        "txt_ids": torch.zeros(12, 3),
    }
    return model, inputs | {"timestep": torch.tensor([1.0])}


def wan():
    """2 self-attentions of 36 tokens, and 2 to a text of 12."""
    import diffusers

    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16}
    model = diffusers.WanTransformer3DModel(**HEADS, **sizes, rope_max_seq_len=32)
    inputs = {"hidden_states": torch.randn(1, 4, 4, 6, 6), "encoder_hidden_states": torch.randn(1, 12, 16)}
    return model, inputs | {"timestep": torch.tensor([1])}


def sd3():
    """2 attentions whose processor calls SDPA itself, past the backends."""
    import diffusers

    sizes = {"sample_size": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_projection_dim": 32}
    model = diffusers.SD3Transformer2DModel(**HEADS, **sizes, joint_attention_dim=32, pooled_projection_dim=32)
    inputs = {
        "hidden_states": torch.randn(1, 4, 12, 12),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32),
    }
    return model, inputs | {"timestep": torch.tensor([1])}


def made(make):
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for parameter in model.parameters():  # attention that tells keys apart, and gates that let it through
            parameter.normal_(std=0.2)
    return model.eval(), inputs


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.fixture(autouse=True)
def dispatch():
    """diffusers' module of backends, imported late, for it takes seconds.

    set_attention_backend also makes its backend the one of all models: that is put back.
    """
    from diffusers.models import attention_dispatch

    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    yield attention_dispatch
    attention_dispatch._AttentionBackendRegistry._active_backend = before


SUBJECTS = {"flux": (flux, 2, []), "wan": (wan, 2, ["cross_attention"])}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_model_with_the_backend(name):
    make, num_lowered, reasons = SUBJECTS[name]
    model, inputs = made(make)
    exact = output(model, inputs)

    replaced = register_diffusers(**WHOLE)
    model.set_attention_backend("monarch")
    torch.testing.assert_close(output(model, inputs), exact, rtol=1e-5, atol=1e-5)
    assert (replaced.lowered, [*replaced.reasons]) == (num_lowered, reasons)

    replaced = register_diffusers(**BLOCKS)  # other options for the same name
    found = output(model, inputs)
    assert replaced.lowered == num_lowered
    assert not torch.allclose(found, exact, rtol=1e-3, atol=1e-3)
    with replace_sdpa(**BLOCKS):
        model.set_attention_backend("native")
        torch.testing.assert_close(output(model, inputs), found)

    assert torch.equal(output(model, inputs), exact)
    assert replaced.lowered == num_lowered


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_context_ends(name, dispatch):
    make, num_lowered, _ = SUBJECTS[name]
    model, inputs = made(make)
    exact, before = output(model, inputs), dispatch._AttentionBackendRegistry.get_active_backend()
    replaced = register_diffusers(**BLOCKS)
    with dispatch.attention_backend("monarch"):
        assert not torch.allclose(output(model, inputs), exact, rtol=1e-3, atol=1e-3)
    assert replaced.lowered == num_lowered
    assert dispatch._AttentionBackendRegistry.get_active_backend() == before
    assert torch.equal(output(model, inputs), exact)
    assert replaced.lowered == num_lowered


def test_a_processor_that_calls_sdpa_itself_goes_by_replace_sdpa():
    model, inputs = made(sd3)
    exact = output(model, inputs)
    by_name = register_diffusers(**BLOCKS)
    model.set_attention_backend("monarch")
    assert torch.equal(output(model, inputs), exact)
    assert by_name.lowered == 0
    with replace_sdpa(**WHOLE) as replaced:
        torch.testing.assert_close(output(model, inputs), exact, rtol=1e-5, atol=1e-5)
    assert replaced.lowered == 2


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 40, 2, 16, generator=generator) for _ in range(3)]  # (batch, seq_len, num_heads, head_dim)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("mask_causal", {"is_causal": True}),
        ("mask_general", {"attn_mask": torch.ones(40, 40, dtype=torch.bool).tril()}),
    ],
)
def test_calls_that_are_not_legal_are_those_of_the_native_backend(code, arguments, dispatch):
    expected = dispatch.dispatch_attention_fn(*qkv(), **arguments)
    replaced = register_diffusers(**BLOCKS)
    found = dispatch.dispatch_attention_fn(*qkv(), **arguments, backend="monarch")
    assert torch.equal(found, expected)
    assert (replaced.lowered, [*replaced.reasons]) == (0, [code])
    register_diffusers(**BLOCKS, strict=True)
    with pytest.raises(LoweringError, match=code):
        dispatch.dispatch_attention_fn(*qkv(), **arguments, backend="monarch")


def test_a_mask_of_keys_and_a_scale_are_lowered(dispatch):
    visible = (torch.arange(40) < torch.tensor([[40], [29]]))[:, None, None]
    replaced = register_diffusers(**BLOCKS, strict=True)
    found = dispatch.dispatch_attention_fn(*qkv(), attn_mask=visible, scale=0.7, backend="monarch")
    with replace_sdpa(**BLOCKS):
        heads_first = [x.transpose(1, 2) for x in qkv()]
        expected = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, scale=0.7).transpose(1, 2)
    assert replaced.lowered == 1
    torch.testing.assert_close(found, expected)


def test_the_name_is_a_member_like_any_other(dispatch):
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    register_diffusers()
    register_diffusers()
    member = names("monarch")
    assert [x for x in names if x.value == "monarch"] == [member]
    assert names.MONARCH is member is names["MONARCH"]
    assert (member.name, member.value, isinstance(member, str)) == ("MONARCH", "monarch", True)
    assert copy.deepcopy(member) is member
    assert registry.list_backends().count("monarch") == 1
    assert registry._backends[names.NATIVE] is dispatch._native_attention


@pytest.mark.parametrize(("name", "what"), [("native", "of its own"), ("Monarch", "lower case"), ("a b", "lower case")])
def test_names_that_cannot_be_chosen_raise(name, what, dispatch):
    before = dict(dispatch._AttentionBackendRegistry._backends)
    with pytest.raises(ConfigError, match=what):
        register_diffusers(name)
    assert before == dispatch._AttentionBackendRegistry._backends


def test_context_parallelism_is_refused_as_by_other_backends(dispatch):
    registry = dispatch._AttentionBackendRegistry
    if not hasattr(registry, "_is_context_parallel_available"):
        pytest.skip("this diffusers has no context parallelism")
    register_diffusers(**BLOCKS)
    assert not registry._is_context_parallel_available(dispatch.AttentionBackendName("monarch"))
    model, _ = made(flux)
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match="does not support context parallelism"):
        model.set_attention_backend("monarch")
    with pytest.raises(ValueError, match="does not support context parallelism"):  # not asked before
        dispatch.dispatch_attention_fn(*qkv(), backend="monarch", parallel_config=object())


def test_compiled_models_are_left_to_the_compiler():
    model, inputs = made(wan)
    exact = output(model, inputs)
    replaced = register_diffusers(**BLOCKS)
    model.set_attention_backend("monarch")
    with torch.no_grad():
        found, (rewrite,) = run_passes(lambda given: model(**given, return_dict=False)[0], inputs, **WHOLE)
    assert rewrite.num_lowered == 2
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert replaced.lowered == replaced.exact == 0


def test_the_grid_of_flux_is_given_by_hand():
    """Its latents are packed before it is called."""
    model, inputs = made(flux)
    options = {"policy": "always", "grid": (6, 6), "prefix": 12}
    with torch.no_grad():
        sites = explain(model, **inputs, return_dict=False, options=options).sites
    assert [(site.ir.grid, site.ir.form.prefix, site.ir.form.tile) for site in sites] == [((6, 6), 12, (4, 4))] * 2
