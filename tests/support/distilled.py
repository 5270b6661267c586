"""Small transformers to distil, with every way to write what leads to queries and keys, and data with a structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEQ_LEN, DIM, HEADS, BLOCK = 64, 32, 2, 8
HEAD_DIM = DIM // HEADS
SHARPNESS = 2.0
OPTIONS = {"policy": "always", "block_size": BLOCK, "window": None}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def batches(number: int, seed: int = 0, dim: int = DIM, batch: int = 4) -> list[Tensor]:
    """Sequences of waves of random frequency and phase along one direction, (batch, SEQ_LEN, dim)."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(1, dim, generator=torch.Generator().manual_seed(5))
    places = torch.arange(SEQ_LEN)[None, :, None]
    found = []
    for _ in range(number):
        frequency, phase = torch.rand(2, batch, 1, 1, generator=generator)
        found.append(torch.sin(places * 0.3 * (1 + frequency) + 6.28 * phase) @ direction)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, heads, seq_len, head_dim) each -> (batch, seq_len, dim)."""
    mixed = F.scaled_dot_product_attention(q * SHARPNESS, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).flatten(2)


def heads(x: Tensor, number: int = HEADS) -> Tensor:
    """(batch, seq_len, number * head_dim) -> (batch, number, seq_len, head_dim)."""
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


class Packed(nn.Module):
    """One linear layer for queries, keys and values, one after the other."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        return attend(q, k, v)


class Separate(nn.Module):
    """Three linear layers, without a bias on the keys."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q = nn.Linear(DIM, DIM)
        self.k = nn.Linear(DIM, kv_heads * HEAD_DIM, bias=False)
        self.v = nn.Linear(DIM, kv_heads * HEAD_DIM)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads(self.q(x)), heads(self.k(x), self.kv_heads), heads(self.v(x), self.kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.qkv(x))


class Rotary(Separate):
    """Rotary embeddings of half the features each, their angles made of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", 0.1 ** torch.linspace(0, 1, HEAD_DIM // 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        angles = torch.arange(x.shape[1], device=x.device).float()[:, None] @ self.inverse[None].float()
        cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angles.cos(), angles.sin()))

        def rotated(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat([-second, first], -1) * sin

        return attend(rotated(q), rotated(k), v)


class Normed(Separate):
    """Norms of the features of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.LayerNorm(HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return attend(self.q_norm(q), self.k_norm(k), v)


class AddMM(nn.Module):
    """One product of matrices as GPT-2 writes it, its weight (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(DIM, 3 * DIM) / DIM**0.5)
        self.bias = nn.Parameter(torch.zeros(3 * DIM))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, DIM), self.weight)
        return attend(*(heads(y) for y in rows.view(*x.shape[:2], -1).split(DIM, -1)))


class Interleaved(nn.Module):
    """Queries, keys and values of a head side by side in the rows of one weight, which is multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(3 * DIM, DIM) / DIM**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.weight.T).view(*x.shape[:2], HEADS, 3, HEAD_DIM).transpose(1, 2)
        return attend(*y.unbind(3))


class Multihead(nn.Module):
    """torch.nn's own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(SHARPNESS * x, x, x, need_weights=False)[0]


class Joint(nn.Module):
    """The second half of the tokens has layers of its own, as the text beside an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip((self.first, self.second), x.chunk(2, 1), strict=True)
        q, k, v = torch.cat([layer(part) for layer, part in parts], 1).chunk(3, -1)
        return attend(heads(q), heads(k), heads(v))


class Block(nn.Module):
    """A block of a transformer with some attention."""

    def __init__(self, attention: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = attention
        self.norm, self.mlp_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.out, self.dropout = nn.Linear(DIM, DIM), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.out(self.attention(self.norm(x))))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """`Block`s one after the other."""

    def __init__(self, make: Callable[[], nn.Module] = Packed, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(make(), dropout) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def changed(before: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Which elements of a model's state are no longer those of `before`, by name, as bool."""
    found = {name: before[name] != value for name, value in model.state_dict().items()}
    return {name: differs for name, differs in found.items() if differs.any()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def quick(**more: Any) -> dict[str, Any]:
    """Arguments of `distill` for tests that need no large gain."""
    return {"options": OPTIONS, "steps": 20, "lr": 0.01, "progress": False, **more}
