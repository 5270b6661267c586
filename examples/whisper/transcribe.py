"""Features to text by greedy decoding with a KV cache, and the word error rate of the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.whisper.load import MULTILINGUAL_VOCAB_SIZE, Whisper

MAX_NEW_TOKENS = 96


@torch.no_grad()
def transcribe(whisper: Whisper, states: Tensor, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """English text of each clip, given the encoder's output for it, (clips, 1500, d_model); clips decode together."""
    return [str(whisper.tokenizer.decode(tokens)).strip() for tokens in _greedy(whisper, states, max_new_tokens)]


def word_error_rate(references: Sequence[str], texts: Sequence[str]) -> float:
    """Errors over reference words, all clips together, after Whisper's English text normaliser ("Mr." = "mister")."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normal = EnglishTextNormalizer(english_spelling_mapping={})
    return float(jiwer.wer([normal(text) for text in references], [normal(text) for text in texts]))


def _greedy(whisper: Whisper, states: Tensor, max_new_tokens: int) -> list[list[int]]:
    """Text tokens of each row of `states` (clips, 1500, d_model), up to its end-of-text token."""
    model, end = whisper.model, _token(whisper, "<|endoftext|>")
    tokens = torch.tensor([_prompt(whisper)], device=states.device).expand(len(states), -1)
    out: list[list[int]] = [[] for _ in states]
    open_rows = set(range(len(states)))
    cache, banned = None, [*whisper.suppress, *whisper.suppress_first]
    for _ in range(max_new_tokens):
        step = model.model.decoder(tokens, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits = model.proj_out(step.last_hidden_state[:, -1])
        logits[:, banned] = -torch.inf
        banned = list(whisper.suppress)
        tokens = logits.argmax(-1, keepdim=True)
        for row in sorted(open_rows):
            token = int(tokens[row])
            if token == end:
                open_rows.remove(row)
            elif token < end:  # larger ones are special: languages, tasks, times
                out[row].append(token)
        if not open_rows:
            break
    return out


def _prompt(whisper: Whisper) -> list[int]:
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    if whisper.model.config.vocab_size < MULTILINGUAL_VOCAB_SIZE:
        names = [names[0], names[-1]]
    return [_token(whisper, name) for name in names]


def _token(whisper: Whisper, name: str) -> int:
    token = whisper.tokenizer.convert_tokens_to_ids(name)
    if not isinstance(token, int):
        raise ValueError(f"the tokenizer has no token {name}")
    return token
