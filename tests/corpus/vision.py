"""Models on images and videos: those of the benchmark, and transformers of diffusers where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.architectures import Described, num_tokens
from benchmarks.models.problems import TINY_IMAGES
from tests.corpus.entry import Absent, Entry

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENTS = {**HEADS, "in_channels": 4, "sample_size": 16, "patch_size": 2}
JOINT = {**LATENTS, "out_channels": 4, "joint_attention_dim": 32, "caption_projection_dim": 32}
TEXT = 7


def _image() -> Tensor:
    return torch.randn(1, 4, 16, 16)


def _step() -> Tensor:
    return torch.tensor([3.0])


@dataclass(frozen=True)
class Transformer:
    """A class of diffusers, what makes it small, and what it is called with.

    want: of every site; "" where sites differ. grid: the prefix and the axes of self-attention's tokens as found in the
    graph, and the tokens after them ("then 7"), or a part of the reason why none is.
    """

    options: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    grid: tuple[int | str, ...] | str
    want: str = "lowered"

    def make(self, name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """A function of tensors, and tensors.

        Raises:
            Absent: diffusers, or the class in it, is missing.
        """
        try:
            import diffusers
        except ImportError as error:
            raise Absent(str(error)) from error
        if not hasattr(diffusers, name):
            raise Absent(f"diffusers {diffusers.__version__} has no {name}")
        model, given = getattr(diffusers, name)(**self.options).eval(), self.inputs()
        return Called(model, tuple(given)), tuple(given.values())


class Called(torch.nn.Module):
    """A model of diffusers as a function of positional tensors."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: Tensor) -> Tensor:
        output: Tensor = self.model(**dict(zip(self.names, given, strict=True)), return_dict=False)[0]
        return output


def _flux() -> dict[str, Tensor]:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    return {
        "hidden_states": torch.randn(1, 36, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": _step(),
        "img_ids": torch.stack([torch.zeros(6, 6), rows, columns], -1).flatten(0, 1),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _wan() -> dict[str, Tensor]:
    text = torch.randn(1, TEXT, 16)
    return {"hidden_states": torch.randn(1, 4, 3, 12, 12), "timestep": _step(), "encoder_hidden_states": text}


def _sd3() -> dict[str, Tensor]:
    given = {"hidden_states": _image(), "encoder_hidden_states": torch.randn(1, TEXT, 32), "timestep": _step()}
    return given | {"pooled_projections": torch.randn(1, 32)}


def _hunyuan_video() -> dict[str, Tensor]:
    given = {"hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": _step()}
    given |= {"encoder_hidden_states": torch.randn(1, TEXT, 32), "encoder_attention_mask": torch.ones(1, TEXT)}
    return given | {"pooled_projections": torch.randn(1, 32)}


def _auraflow() -> dict[str, Tensor]:
    return {"hidden_states": _image(), "encoder_hidden_states": torch.randn(1, TEXT, 32), "timestep": _step()}


def _dit() -> dict[str, Tensor]:
    return {"hidden_states": _image(), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}


DIFFUSERS: dict[str, Transformer] = {
    "FluxTransformer2DModel": Transformer(
        {**HEADS, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
        | {"joint_attention_dim": 32, "pooled_projection_dim": 32},
        _flux,
        "it comes from an argument",
    ),
    "WanTransformer3DModel": Transformer(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16}
        | {"rope_max_seq_len": 32},
        _wan,
        (0, 3, 6, 6),
        want="",
    ),
    "SD3Transformer2DModel": Transformer(
        {**JOINT, "num_layers": 1, "pooled_projection_dim": 32, "pos_embed_max_size": 16},
        _sd3,
        (0, 8, 8, f"then {TEXT}"),
    ),
    "AuraFlowTransformer2DModel": Transformer(
        {**JOINT, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 64}, _auraflow, (15, 8, 8)
    ),
    "HunyuanVideoTransformer3DModel": Transformer(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "mlp_ratio": 2.0}
        | {"num_refiner_layers": 1, "guidance_embeds": False, "text_embed_dim": 32, "pooled_projection_dim": 32}
        | {"rope_axes_dim": (4, 6, 6)},
        _hunyuan_video,
        (0, 3, 4, 4, f"then {TEXT}"),
        want="",
    ),
    "DiTTransformer2DModel": Transformer({**LATENTS, "num_layers": 2, "num_embeds_ada_norm": 10}, _dit, (0, 8, 8)),
}


def _made(architecture: Described) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    given = architecture.inputs(1, num_tokens(architecture), "cpu", torch.float32)
    return architecture.model("cpu", torch.float32), given


def entries() -> list[Entry]:
    """Every model once."""
    own = [Entry(x.name, functools.partial(_made, x), "" if "wan" in x.name else "lowered") for x in TINY_IMAGES]
    return own + [Entry(name, functools.partial(x.make, name), x.want) for name, x in DIFFUSERS.items()]
