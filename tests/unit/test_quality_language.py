"""The language-model task of the quality benchmark on a tiny random model, its reader of GGUF files, its tokenizer."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.quality import controls, row_choice, variants
from benchmarks.quality.gguf_weights import FORMATS, GgufError, read_gguf
from benchmarks.quality.language import BLOCK_SIZE, CODES, STRIDE, task_of
from benchmarks.quality.task import TASKS, Task

transformers = pytest.importorskip("transformers")
SEQ_LEN = 1280


class Letters:
    """A token for each character of ASCII, 0 for any other."""

    begin = 1

    def encode(self, text: str) -> list[int]:
        return [code if (code := ord(letter)) < 128 else 0 for letter in text]


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.5,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    return task_of(model, Letters(), SEQ_LEN, sites=1, name="tiny")


def build(task: Task, name: str) -> Any:
    """A variant's model, run eagerly through the passes."""
    (variant,) = (v for v in variants.VARIANTS if v.name == name)
    assert variant.fits(TASKS["language_4096"])
    assert not variant.fits(TASKS["minilm"]) or name == "exact"
    if name.startswith("rows") or name in ("window_sinks", "random_8", "own_block"):
        return variant.build(task, variant.options).model
    options = {"policy": "always", "block_size": BLOCK_SIZE, **variant.options}
    return variants.with_attention(task.model, lambda call: call.monarch(), options)


def test_the_exact_models_numbers(task: Task) -> None:
    numbers = task.evaluate(task.model)
    judge = task.evaluate.__self__
    losses = []
    for stretch in range(2):
        text = judge.text[stretch * (SEQ_LEN - 1) :][: SEQ_LEN - 1]
        ids = torch.tensor([[1, *text]])
        logits = task.model.model(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-logits[at - 1, ids[0, at]].item() for at in range(STRIDE, SEQ_LEN, STRIDE)]
    assert numbers["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert numbers["least"] == min(numbers[f"needle_{place}"] for place in range(10))
    assert numbers["needles"] == pytest.approx(sum(numbers[f"needle_{place}"] for place in range(10)) / 10)


def test_codes_are_said_at_ten_depths_and_asked_for_at_the_end(task: Task) -> None:
    ids, places = task.evaluate.__self__.needles
    text = "".join(map(chr, ids[0].tolist()))
    assert len(text) == SEQ_LEN
    for code, place in zip(CODES, places.tolist(), strict=True):
        assert text.count(code) == 2
        assert text[place[0] : place[-1] + 1] == code
    said = [text.index(code) for code in CODES]
    assert said == sorted(said)
    assert max(said) < min(map(min, places.tolist()))


@torch.no_grad()
def test_forms_and_controls(task: Task) -> None:
    args, _ = task.calibration_inputs[0]
    exact, found = task.model(*args), {}
    for name in ("chosen_0", "chosen_4", "chosen_32", "rows_4", "rows_16", "window_sinks", "random_8", "own_block"):
        found[name] = task.metric(exact, build(task, name)(*args))
    assert found["chosen_32"] < 1e-4  # there are 20 blocks
    assert found["chosen_32"] < found["chosen_4"] < found["chosen_0"]
    assert found["rows_16"] < found["rows_4"] < found["window_sinks"]
    assert found["own_block"] > max(found["window_sinks"], found["random_8"]) > found["chosen_32"]


def test_listed_blocks_see_what_they_are_said_to() -> None:
    q, k, v = (torch.randn(1, heads, 23, 4) for heads in (4, 2, 2))
    everything = controls.listed_blocks(q, k, v, scale=0.5, block_size=4, window=30, sinks=0)
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(everything, exact)
    all_drawn = controls.listed_blocks(q, k, v, scale=0.5, block_size=4, window=0, sinks=0, random=6)
    torch.testing.assert_close(all_drawn, exact)
    some = {"scale": 0.5, "block_size": 4, "window": 0, "sinks": 1, "random": 1}
    found = controls.listed_blocks(q, k, v, **some)
    torch.testing.assert_close(controls.listed_blocks(q, k, v, **some), found)
    torch.testing.assert_close(found[:, :, :12], exact[:, :, :12])  # own, first and one other: all that there are
    assert (found[:, :, 12:] - exact[:, :, 12:]).abs().amax() > 1e-3
    own = controls.listed_blocks(q, k, v, scale=0.5, block_size=4, window=0, sinks=0)
    alone = scaled_dot_product_attention(
        *(x[:, :, 8:12] for x in (q, k, v)), is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(own[:, :, 8:12], alone)


def _rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: int) -> torch.Tensor:
    options = {"scale": 0.5, "block_size": 8, "window": 1, "sinks": 1, "chosen": chosen, "piece": 4}
    return row_choice.attend(q, k, v, **options)


def test_rows_choose_pieces_by_the_mean_of_their_keys() -> None:
    q, k, v = (torch.randn(2, heads, 70, 4, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(_rows(q, k, v, 6), exact)  # 9 blocks, of which 3 are seen anyway
    listed = controls.listed_blocks(q, k, v, scale=0.5, block_size=8, window=1, sinks=1)
    torch.testing.assert_close(_rows(q, k, v, 0), listed)

    row, head, chosen = 61, 1, 2  # of block 7: candidates are blocks 1 to 5, pieces 2 to 11 of the 15 before its own
    means = k[1, head, :60].unflatten(0, (15, 4)).mean(1)
    shares = sum((0.5 * means @ q[1, member, row]).softmax(-1) for member in (2 * head, 2 * head + 1))
    shares[:2] = shares[12:] = -1
    seen = {*range(8), *range(48, row + 1)}
    for piece in shares.topk(2 * chosen).indices.tolist():
        seen |= set(range(4 * piece, 4 * piece + 4))
    places = sorted(seen)
    for member in (2 * head, 2 * head + 1):
        weights = (0.5 * k[1, head, places] @ q[1, member, row]).softmax(-1)
        torch.testing.assert_close(_rows(q, k, v, chosen)[1, member, row], weights @ v[1, head, places])


def test_of_equal_pieces_rows_choose_the_first() -> None:
    q, k = torch.zeros(1, 1, 48, 4), torch.zeros(1, 1, 48, 4)
    v = torch.arange(48.0)[None, None, :, None].expand(1, 1, 48, 1)
    seen = [*range(8), *range(8, 16), *range(32, 48)]
    assert _rows(q, k, v, 1)[0, 0, 47, 0].item() == pytest.approx(sum(seen) / len(seen))


@pytest.mark.parametrize("change", ["k", "q"])
def test_no_row_chooses_by_later_tokens(change: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 4, generator=generator) for _ in range(3))
    before = _rows(q, k, v, 1)
    for row in (20, 43, 50):
        x = {"q": q.clone(), "k": k.clone()}
        x[change][:, :, row + 1 :] = 100 * torch.randn(1, 2, 63 - row, 4, generator=generator)
        later = _rows(x["q"], x["k"], v, 1)
        assert torch.equal(later[:, :, : row + 1], before[:, :, : row + 1])
        assert not torch.equal(later[:, :, row + 1 :], before[:, :, row + 1 :])


def test_share_of_exact_keys() -> None:
    sizes = {"block_size": 2, "window": 1, "sinks": 1}
    assert row_choice.share_of_exact_keys(10, **sizes, chosen=3) == 1
    visible = [1, 2, 3, 4, 5, 6, 5, 6, 5, 6]  # own block, one before, the first
    assert row_choice.share_of_exact_keys(10, **sizes, chosen=0) == pytest.approx(sum(visible) / 55)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def written(path: Path, kind: int, raw: bytes, shape: tuple[int, ...], version: int = 3) -> Path:
    """A file of one tensor, "x", and some metadata."""
    listed = struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b")
    metadata = [_text("words") + listed, _text("size") + struct.pack("<II", 4, 7)]
    head = b"GGUF" + struct.pack("<IQQ", version, 1, len(metadata)) + b"".join(metadata)
    head += _text("x") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, 0)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + raw)
    return path


def test_numbers_that_are_not_quantized(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for kind, dtype in ((0, np.float32), (1, np.float16)):
        file = read_gguf(written(tmp_path / "x.gguf", kind, values.astype(dtype).tobytes(), (2, 3)))
        assert torch.equal(file.tensor("x"), torch.from_numpy(values))
        assert file.metadata == {"words": ["a", "b"], "size": 7}


def _half(value: float) -> bytes:
    return np.float16(value).tobytes()


def _block(kind: int, numbers: list[int]) -> tuple[bytes, list[float]]:
    """A block of a format, packed number by number, and what it holds."""
    if kind == 8:
        return _half(0.5) + np.array(numbers, np.int8).tobytes(), [0.5 * n for n in numbers]
    if kind == 6:
        fifth = sum((n >> 4) << place for place, n in enumerate(numbers))
        low = bytes((numbers[i] & 15) | (numbers[i + 16] & 15) << 4 for i in range(16))
        return _half(0.5) + struct.pack("<I", fifth) + low, [0.5 * (n - 16) for n in numbers]
    if kind == 12:
        scales, offsets = [1, 2, 3, 63, 5, 16, 37, 8], [9, 8, 7, 60, 5, 4, 33, 1]
        packed = [scales[i] | (scales[i + 4] >> 4) << 6 for i in range(4)]
        packed += [offsets[i] | (offsets[i + 4] >> 4) << 6 for i in range(4)]
        packed += [(scales[i + 4] & 15) | (offsets[i + 4] & 15) << 4 for i in range(4)]
        low = bytes(numbers[64 * g + i] | numbers[64 * g + 32 + i] << 4 for g in range(4) for i in range(32))
        expected = [0.5 * scales[i // 32] * n - 0.25 * offsets[i // 32] for i, n in enumerate(numbers)]
        return _half(0.5) + _half(0.25) + bytes(packed) + low, expected
    low = bytearray(128)
    high = bytearray(64)
    for place, n in enumerate(numbers):
        half, inside = divmod(place, 128)
        quarter, i = divmod(inside, 32)
        low[64 * half + 32 * (quarter % 2) + i] |= (n & 15) << (4 if quarter > 1 else 0)
        high[32 * half + i] |= (n >> 4) << (2 * quarter)
    scales = list(range(-8, 8))
    raw = bytes(low) + bytes(high) + np.array(scales, np.int8).tobytes() + _half(0.5)
    return raw, [0.5 * scales[i // 16] * (n - 32) for i, n in enumerate(numbers)]


@pytest.mark.parametrize(("kind", "least", "most"), [(8, -128, 127), (6, 0, 31), (12, 0, 15), (14, 0, 63)])
def test_quantized_numbers(tmp_path: Path, kind: int, least: int, most: int) -> None:
    count, random = FORMATS[kind][0], np.random.default_rng(kind)
    blocks = [_block(kind, random.integers(least, most + 1, count).tolist()) for _ in range(4)]
    path = written(tmp_path / "x.gguf", kind, b"".join(raw for raw, _ in blocks), (2, 2 * count))
    expected = torch.tensor([values for _, values in blocks]).view(2, 2 * count)
    torch.testing.assert_close(read_gguf(path).tensor("x"), expected, rtol=1e-6, atol=1e-6)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="no GGUF file of version 3; found b'GGUF', version 2"):
        read_gguf(written(tmp_path / "x.gguf", 0, bytes(4), (1,), version=2))
    with pytest.raises(GgufError, match=r"tensor x has type 2; read are \[0, 1, 6, 8, 12, 14\]"):
        read_gguf(written(tmp_path / "x.gguf", 2, bytes(18), (32,))).tensor("x")


def test_the_tokenizer_joins_by_score_and_spells_the_rest_in_bytes() -> None:
    from benchmarks.quality.gemma import Tokenizer

    pieces = ["<bos>", "a", "b", "c", "\N{LOWER ONE EIGHTH BLOCK}", "ab", "bc", "abc", "\n\n", "<0xC3>", "<0xA9>"]
    scores = [0.0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -9.0, -9.0, -9.0]
    kinds = [3, 1, 1, 1, 1, 1, 1, 1, 4, 6, 6]
    tokenizer = Tokenizer(pieces, scores, kinds, begin=0)

    def said(text: str) -> list[str]:
        return [pieces[token] for token in tokenizer.encode(text)]

    assert said("ab a") == ["ab", "\N{LOWER ONE EIGHTH BLOCK}", "a"]
    assert said("abc") == ["abc"]  # "bc" first, then "a" and "bc"
    assert said("abbc") == ["ab", "bc"]
    assert said("a\n\n\u00e9b") == ["a", "\n\n", "<0xC3>", "<0xA9>", "b"]
    assert said("") == []
