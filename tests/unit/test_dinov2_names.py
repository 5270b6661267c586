"""Names of DINOv2's parameters in versions of transformers, and in the file that they are read from."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from examples.images.dinov2 import name_of_any_version

LAYER = "encoder.layer.3."


@pytest.mark.parametrize(
    ("newer", "older", "own"),
    [
        ("attention.q_proj.weight", "attention.attention.query.weight", "attention/attention/query.weight"),
        ("attention.k_proj.bias", "attention.attention.key.bias", "attention/attention/key.bias"),
        ("attention.v_proj.bias", "attention.attention.value.bias", "attention/attention/value.bias"),
        ("attention.o_proj.weight", "attention.output.dense.weight", "attention/output/dense.weight"),
        ("mlp.fc2.bias", "mlp.fc2.bias", "mlp/fc2.bias"),
    ],
)
def test_a_pack_of_one_version_serves_another(newer: str, older: str, own: str) -> None:
    assert name_of_any_version(LAYER + newer) == name_of_any_version(LAYER + older) == f"encoder/layer.3/{own}"


def test_what_is_no_product_keeps_its_name() -> None:
    for name in ("layernorm.weight", f"{LAYER}norm1.bias", f"{LAYER}layer_scale1.lambda1", "embeddings.cls_token"):
        assert name_of_any_version(name) == name
