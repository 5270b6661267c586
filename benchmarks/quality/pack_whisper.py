"""The Whisper task in a few small files, for a machine that has neither the packages nor a tokenizer:

    python -m benchmarks.quality.pack_whisper .quality/whisper            # writes .quality/whisper.0, .1, ...
    python -m benchmarks.quality --tasks whisper --weights .quality/whisper   # reads them

They hold the weights in float16 (Whisper base's packages hold no more, so nothing is lost of them), the features of
all recordings in float16, the exact model's transcripts, and the words said. Of the token embeddings, a third of
Whisper base, only some rows are there: the tokens of the transcripts, those that ask for one, and the most frequent
ones (the first ids, for byte pairs are numbered as they were merged). What that means for the numbers:

- KL is taken between distributions over these tokens, renormalised. It cannot see probability that moves between
  them and the others, so it is not the KL over all tokens.
- No other token can be generated, so a word error turns into another one where it would have needed such a token. The
  exact model's transcripts are not changed by this.

Compare such numbers with each other only, never with those of the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import torch as safetensors
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from benchmarks.quality.recordings import END, PADDING, PROMPT, Recordings, Speech, end_id, parts_of, prompt_ids, record
from examples.whisper.load import Whisper

GROUPS = ("long", "short", "calibration")
NUM_FREQUENT = 8192
PART_BYTES = 55_000_000
EMBEDDING = "decoder.embed_tokens.weight"
SIZES = (
    "vocab_size", "d_model", "num_mel_bins", "max_source_positions", "max_target_positions", "encoder_layers",
    "decoder_layers", "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim",
)  # fmt: skip


class PackedTokenizer:
    """Ids to text, by a table. A character that is cut across tokens, which English text has none of, is lost."""

    def __init__(self, pieces: dict[str, str], names: dict[str, int]) -> None:
        self.pieces, self.names = pieces, names

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`."""
        return "".join(self.pieces[str(token)] for token in tokens)

    def convert_tokens_to_ids(self, name: str) -> int:
        """The id of a special token."""
        return self.names[name]


def pack(heard: Speech, num_frequent: int = NUM_FREQUENT) -> bytes:
    """All of `heard`, with the embeddings of its own tokens and of the `num_frequent` first ones."""
    whisper = heard.whisper
    kept = kept_tokens(heard, num_frequent)
    tensors = {name: x.half().contiguous() for name, x in whisper.model.model.state_dict().items()}
    tensors[EMBEDDING] = tensors[EMBEDDING][kept].contiguous()
    tensors["kept"] = kept
    for name in GROUPS:
        group: Recordings = getattr(heard, name)
        tensors |= {f"{name}.features": group.features.half(), f"{name}.tokens": group.tokens.contiguous()}
    tokenizer = whisper.tokenizer
    texts = {
        "sizes": {name: getattr(whisper.model.config, name) for name in SIZES},
        "words": {name: getattr(heard, name).words for name in GROUPS},
        "pieces": {str(token): tokenizer.decode([token]) for token in kept.tolist()},
        "names": dict(zip([*_prompt_names(whisper), END], [*prompt_ids(whisper), end_id(whisper)], strict=True)),
        "suppress": [whisper.suppress, whisper.suppress_first],
    }
    return safetensors.save(tensors, {"texts": json.dumps(texts)})


def kept_tokens(heard: Speech, num_frequent: int) -> Tensor:
    """Ids of the tokens to keep, in order."""
    used = torch.cat([getattr(heard, name).tokens.flatten() for name in GROUPS])
    frequent = torch.arange(min(num_frequent, heard.whisper.model.config.vocab_size))
    kept: Tensor = torch.cat([frequent, used[used != PADDING]]).unique()
    return kept


def unpack(source: str | Path) -> Speech:
    """What the files `source`.0, `source`.1, ... hold, in float32.

    Ids that were not kept have zero embeddings and are never generated.
    """
    data = b"".join(part.read_bytes() for part in parts_of(Path(source)))
    tensors = safetensors.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    texts = json.loads(header["__metadata__"]["texts"])
    kept = tensors.pop("kept")
    groups = {
        name: Recordings(
            tensors.pop(f"{name}.features").float(), tensors.pop(f"{name}.tokens"), tuple(texts["words"][name])
        )
        for name in GROUPS
    }
    return Speech(_whisper(tensors, kept, texts), kept, **groups)


def _whisper(weights: dict[str, Tensor], kept: Tensor, texts: dict[str, Any]) -> Whisper:
    config = WhisperConfig(**{**texts["sizes"], "attn_implementation": "sdpa"})
    model = WhisperForConditionalGeneration(config).eval()
    embedding = torch.zeros(config.vocab_size, config.d_model)
    embedding[kept] = weights[EMBEDDING].float()
    model.model.load_state_dict({name: x.float() for name, x in weights.items()} | {EMBEDDING: embedding})
    model.tie_weights()
    others = set(range(config.vocab_size)) - set(kept.tolist())
    always, first = texts["suppress"]
    tokenizer = PackedTokenizer(texts["pieces"], texts["names"])
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    return Whisper(model, cast(Any, tokenizer), features, tuple(sorted(others.union(always))), tuple(first))


def _prompt_names(whisper: Whisper) -> tuple[str, ...]:
    return PROMPT if len(prompt_ids(whisper)) == len(PROMPT) else (PROMPT[0], PROMPT[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.pack_whisper", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--weights", metavar="PATH", help="a checkpoint's folder in place of Whisper base")
    parser.add_argument("--tokens", type=int, default=NUM_FREQUENT, help="how many of the most frequent tokens to keep")
    args = parser.parse_args(argv)
    for part in write_parts(args.output, pack(record(args.weights), args.tokens)):
        print(f"wrote {part}: {part.stat().st_size / 1e6:.1f} MB")
    return 0


def write_parts(path: Path, data: bytes) -> list[Path]:
    """Write `data` to files `path`.0, `path`.1, ... in place of those that are there."""
    for old in parts_of(path):
        old.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for index, start in enumerate(range(0, len(data), PART_BYTES)):
        parts.append(path.with_name(f"{path.name}.{index}"))
        parts[-1].write_bytes(data[start : start + PART_BYTES])
    return parts


if __name__ == "__main__":
    raise SystemExit(main())
