"""torch.nn's own attention: MultiheadAttention and the encoder and decoder layers, their fast paths included."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.corpus.entry import Entry

BATCH, SEQ_LEN, WIDTH, HEADS = 2, 12, 16, 2
Made = tuple[Callable[..., Any], tuple[Any, ...]]
EXACT = "exact"


def _tokens(batch_first: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, SEQ_LEN, WIDTH, generator=generator)
    return x if batch_first else x.transpose(0, 1).contiguous()


def _padding() -> Tensor:
    """(batch, seq_len), True where a token is padding."""
    return torch.arange(SEQ_LEN) >= torch.tensor([[SEQ_LEN], [SEQ_LEN - 4]])


def _attention(
    batch_first: bool, need_weights: bool, packed: bool, padded: bool, train: bool, rank: int = 3, **options: Any
) -> Made:
    widths = {} if packed else {"kdim": WIDTH, "vdim": WIDTH}
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **widths, **options).train(train)
    if not packed:  # separate projections also where the widths agree
        attention._qkv_same_embed_dim = False
        attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight = (
            nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(3)
        )
    mask = _padding() if padded else None

    def program(x: Tensor) -> Tensor:
        x = x if rank == 3 else x[0]
        return attention(x, x, x, key_padding_mask=mask, need_weights=need_weights)[0]

    return program, (_tokens(batch_first),)


def _weights_used(average: bool) -> Made:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    return lambda x: attention(x, x, x, average_attn_weights=average), (_tokens(),)


def _cross() -> Made:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    return lambda x: attention(x[:, :5], x, x, need_weights=False)[0], (_tokens(),)


def _causal() -> Made:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(SEQ_LEN)
    return lambda x: attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], (_tokens(),)


def _with_key_added(**options: bool) -> Made:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    return lambda x: attention(x, x, x, need_weights=False)[0], (_tokens(),)


def _encoder(train: bool, padded: bool, layers: int = 2, nested: bool = True, **options: Any) -> Made:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **options)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).train(train)
    mask = _padding() if padded else None
    if not padded:
        return lambda x: encoder(x), (_tokens(),)
    visible = ~_padding()[..., None]
    return lambda x: encoder(x, src_key_padding_mask=mask)[:, :SEQ_LEN] * visible, (_tokens(),)


def _decoder(train: bool, causal: bool) -> Made:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 1).train(train)
    mask = nn.Transformer.generate_square_subsequent_mask(SEQ_LEN) if causal else None
    return lambda x, memory: decoder(x, memory, tgt_mask=mask, tgt_is_causal=causal), (_tokens(), _tokens())


def _transformer() -> Made:
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True).train()
    return model, (_tokens(), _tokens())


def _with_dropout() -> Made:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.1, batch_first=True).train()
    return lambda x: layer(x), (_tokens(),)


def _attention_entries() -> list[Entry]:
    found = []
    for train, batch_first, need_weights, packed in itertools.product((False, True), repeat=4):
        padded = batch_first == need_weights  # each with and without a mask, not every pair of choices
        name = "-".join(
            (
                "train" if train else "eval",
                "batch_first" if batch_first else "seq_first",
                "weights" if need_weights else "no_weights",
                "packed" if packed else "separate",
                *(("padded",) if padded else ()),
            )
        )
        make = lambda b=batch_first, n=need_weights, k=packed, p=padded, t=train: _attention(b, n, k, p, t)  # noqa: E731
        found.append(Entry(f"MultiheadAttention/{name}", make, train=train))
    return found


LAYERS: dict[str, tuple[Callable[[], Made], bool, str]] = {
    "MultiheadAttention/no_bias": (lambda: _attention(True, False, True, False, True, bias=False), True, "lowered"),
    "MultiheadAttention/unbatched": (lambda: _attention(True, False, True, False, True, rank=2), True, "lowered"),
    "MultiheadAttention/weights_used": (lambda: _weights_used(True), False, EXACT),
    "MultiheadAttention/weights_of_heads_used": (lambda: _weights_used(False), False, EXACT),
    "MultiheadAttention/cross": (_cross, False, EXACT),
    "MultiheadAttention/causal": (_causal, True, EXACT),
    "MultiheadAttention/bias_kv": (lambda: _with_key_added(add_bias_kv=True), True, EXACT),
    "MultiheadAttention/zero_key": (lambda: _with_key_added(add_zero_attn=True), True, EXACT),
    "TransformerEncoder/train": (lambda: _encoder(True, False), True, "lowered"),
    "TransformerEncoder/train-padded": (lambda: _encoder(True, True), True, "lowered"),
    "TransformerEncoder/eval": (lambda: _encoder(False, False), False, "lowered"),
    "TransformerEncoder/eval-padded": (lambda: _encoder(False, True, nested=False), False, "lowered"),
    "TransformerEncoder/eval-padded-nested": (lambda: _encoder(False, True), False, "lowered"),
    "TransformerEncoder/eval-grad": (lambda: _encoder(False, False), True, "lowered"),
    "TransformerEncoder/eval-norm_first": (lambda: _encoder(False, False, norm_first=True), False, "lowered"),
    "TransformerEncoder/eval-gelu": (lambda: _encoder(False, False, activation="gelu"), False, "lowered"),
    "TransformerEncoder/dropout": (_with_dropout, True, EXACT),
    "TransformerDecoder/bidirectional": (lambda: _decoder(True, False), True, "lowered"),
    "TransformerDecoder/causal": (lambda: _decoder(False, True), False, ""),
    "Transformer": (_transformer, True, "lowered"),
}
"""name -> (how to make it, under grad mode, what is wanted of every site; "" where they differ)."""


def entries() -> list[Entry]:
    """Every module."""
    layers = [Entry(name, make, want, train) for name, (make, train, want) in LAYERS.items()]
    return _attention_entries() + layers
