"""An encoder as of Monarch Mixer BERT, a causal language model as of Hyena, and a BERT, written from their papers.

Monarch Mixer: arXiv 2310.12109. Hyena: arXiv 2302.10866. Plain modules: they know nothing of any compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.mixer.convolution import ConvolutionMixer


@dataclass(frozen=True)
class Size:
    """Sizes that the models have in common.

    num_blocks: of the block-diagonal linears in the encoder's MLPs. expansion: hidden features of an MLP over `width`.
    filter_hidden: hidden features of the filters' MLPs. max_length: the longest sequence.
    """

    width: int
    depth: int
    num_blocks: int = 4
    vocab_size: int = 30528
    expansion: int = 4
    filter_hidden: int = 128
    max_length: int = 32768
    residual: bool = True
    head_dim: int = 64

    def __post_init__(self) -> None:
        for name in ("num_blocks", "head_dim"):
            if self.width % getattr(self, name):
                raise ValueError(f"the width, {self.width}, is no multiple of {name}, {getattr(self, name)}")


SIZES: dict[str, Size] = {
    "80m": Size(width=768, depth=12),
    "341m": Size(width=1792, depth=12),
    "tiny": Size(width=64, depth=2, vocab_size=64, filter_hidden=16, max_length=1024, head_dim=32),
}


class BlockDiagonalLinear(nn.Module):
    """A linear layer whose matrix is block-diagonal: each of `num_blocks` groups of features has its own."""

    def __init__(self, in_features: int, out_features: int, num_blocks: int) -> None:
        super().__init__()
        ins, outs = in_features // num_blocks, out_features // num_blocks
        self.weight = nn.Parameter(torch.empty(num_blocks, ins, outs).uniform_(-(ins**-0.5), ins**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        groups = x.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("...bi,bio->...bo", groups, self.weight).flatten(-2) + self.bias


class GatedMLP(nn.Module):
    """Mixes features: gelu(gate) times value, where one block-diagonal layer makes both and another reads them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = size.expansion * size.width
        self.up = BlockDiagonalLinear(size.width, 2 * hidden, size.num_blocks)
        self.down = BlockDiagonalLinear(hidden, size.width, size.num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width), as is the output."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)


class Attention(nn.Module):
    """Bidirectional self-attention."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.project = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width), as is the output."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.project(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PostNormLayer(nn.Module):
    """x + sequence(x), normalised, then the same with `features`: as in BERT."""

    def __init__(self, width: int, sequence: nn.Module, features: nn.Module) -> None:
        super().__init__()
        self.sequence, self.features = sequence, features
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width), as is the output."""
        x = self.norms[0](x + self.sequence(x))
        return self.norms[1](x + self.features(x))


class PreNormLayer(PostNormLayer):
    """x + sequence(norm(x)), then the same with `features`: as in GPT-2."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width), as is the output."""
        x = x + self.sequence(self.norms[0](x))
        return x + self.features(self.norms[1](x))


class MonarchMixerEncoder(nn.Module):
    """Embedded tokens through layers of gated bidirectional long convolutions and block-diagonal MLPs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(size.vocab_size, size.width), nn.LayerNorm(size.width)
        sizes = (size.width, size.filter_hidden, size.max_length)
        self.layers = nn.Sequential(
            *(
                PostNormLayer(
                    size.width, ConvolutionMixer(*sizes, causal=False, residual=size.residual), GatedMLP(size)
                )
                for _ in range(size.depth)
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, width)."""
        return self.layers(self.norm(self.embed(tokens)))


class Bert(nn.Module):
    """BERT: embedded tokens and positions through layers of attention and dense MLPs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(size.vocab_size, size.width), nn.LayerNorm(size.width)
        self.positions = nn.Parameter(0.02 * torch.randn(size.max_length, size.width))
        self.layers = nn.Sequential(
            *(PostNormLayer(size.width, Attention(size), dense_mlp(size)) for _ in range(size.depth))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, width)."""
        return self.layers(self.norm(self.embed(tokens) + self.positions[: tokens.shape[1]]))


class HyenaLM(nn.Module):
    """Predicts the next token by gated causal long convolutions (order 2: a gate before and one after) and MLPs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(size.vocab_size, size.width), nn.LayerNorm(size.width)
        sizes = (size.width, size.filter_hidden, size.max_length)
        self.layers = nn.Sequential(
            *(
                PreNormLayer(size.width, ConvolutionMixer(*sizes, causal=True, residual=False), dense_mlp(size))
                for _ in range(size.depth)
            )
        )
        self.head = nn.Linear(size.width, size.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> logits (batch, length, vocab_size) of the token that follows each."""
        return self.head(self.norm(self.layers(self.embed(tokens))))


def dense_mlp(size: Size) -> nn.Sequential:
    """Linear, gelu, linear."""
    hidden = size.expansion * size.width
    return nn.Sequential(nn.Linear(size.width, hidden), nn.GELU(), nn.Linear(hidden, size.width))


def num_parameters(model: nn.Module) -> int:
    """Of `model`, all in all."""
    return sum(parameter.numel() for parameter in model.parameters())
