"""timm's families, where timm is installed (it needs torchvision)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.corpus.entry import Absent, Entry

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("lowered", SMALL),
    "deit3_small_patch16_224": ("lowered", SMALL),
    "eva02_tiny_patch14_224": ("lowered", SMALL),
    "cait_xxs24_224": ("", SMALL),
    "xcit_nano_12_p8_224": ("", SMALL),
    "beit_base_patch16_224": ("exact", SMALL),
    "swin_tiny_patch4_window7_224": ("exact", {"img_size": 28, "window_size": 7, "embed_dim": 16, "depths": (1, 1)}),
}


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
    size = options["img_size"]
    return model, (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)


def entries() -> list[Entry]:
    """Every model with and without timm's fused attention."""
    return [
        Entry(f"{name}/{'fused' if fused else 'spelled'}", lambda n=name, o=options, f=fused: _make(n, o, f), want)
        for name, (want, options) in MODELS.items()
        for fused in (True, False)
    ]
