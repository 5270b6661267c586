"""timm's families, where timm is installed (it needs torchvision)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.corpus.entry import Absent, Entry

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
TWO_STAGES = {"embed_dim": 16, "depths": (1, 1)}
SAM = {"img_size": 64, "embed_dim": 16, "depth": 1, "num_heads": 2, "global_attn_indexes": (0,)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            "vit_tiny_patch16_224",
            "vit_base_patch16_clip_224",
            "vit_base_patch16_rope_224",
            "vit_small_patch14_reg4_dinov2",
            "vit_small_patch16_dinov3",
            "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224",
            "eva_giant_patch14_224",
            "eva02_tiny_patch14_224",
            "flexivit_small",
        ),
        ("lowered", SMALL),
    ),
    "tnt_s_legacy_patch16_224": ("lowered", {"img_size": 32}),
    "visformer_tiny": ("lowered", {"img_size": 32}),
    "vit_tiny_r_s16_p8_224": ("lowered", {}),
    "cait_xxs24_224": ("", SMALL),
    "twins_svt_small": ("", {"img_size": 32}),
    "vit_base_patch16_siglip_224": ("", SMALL),
    "xcit_nano_12_p8_224": ("", SMALL),
    "beit_base_patch16_224": ("exact", SMALL),
    "convit_tiny": ("exact", SMALL),
    "levit_128s": ("exact", {}),
    "mvitv2_tiny": ("exact", {}),
    "samvit_base_patch16": ("exact", SAM),
    "swin_tiny_patch4_window7_224": ("exact", {"img_size": 28, "window_size": 7, **TWO_STAGES}),
    "swinv2_tiny_window8_256": ("exact", {"img_size": 32, "window_size": 4, "num_heads": (2, 2), **TWO_STAGES}),
    "tiny_vit_5m_224": ("exact", {}),
    "vit_relpos_small_patch16_224": ("exact", SMALL),
}
"""Model -> what is wanted of every site ("" where sites differ), and sizes that make it small."""


def _make(name: str, options: dict[str, Any], fused: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    try:
        import timm
        from timm.layers import set_fused_attn
    except ImportError as error:
        raise Absent(str(error)) from error
    set_fused_attn(fused)
    if not timm.is_model(name):
        raise Absent(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name, num_classes=0, **options).eval()
    size = options.get("img_size") or model.default_cfg["input_size"][-1]
    return model, (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)


def entries() -> list[Entry]:
    """Every model with and without timm's fused attention."""
    return [
        Entry(f"{name}/{'fused' if fused else 'spelled'}", lambda n=name, o=options, f=fused: _make(n, o, f), want)
        for name, (want, options) in MODELS.items()
        for fused in (True, False)
    ]
