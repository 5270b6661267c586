"""The quality benchmark's tasks: metrics, controls, stubs, splits, packing; the real ones where their packages are."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers", reason="the benchmark's tasks need transformers")

from benchmarks.quality import controls, metrics, speech, warps
from benchmarks.quality.pack_whisper import pack, unpack
from benchmarks.quality.recordings import PADDING, Recordings, Speech, parts_of
from benchmarks.quality.stubs import stubbed
from benchmarks.quality.task import TASKS, Task, TaskUnavailable, package_file

words = st.lists(st.sampled_from("abcd"), max_size=8)
seeds = st.integers(0, 2**16)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_kl_is_that_of_torch_and_zero_for_equal_logits(seed):
    p, q = rows(seed, 3, 7), rows(seed + 1, 3, 7)
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(metrics.kl_divergence(p, q), expected.sum(-1))
    assert metrics.kl_divergence(p, p + 5).abs().max() < 1e-12
    assert (metrics.kl_divergence(p, p) == 0).all()


def test_kl_counts_nothing_for_what_the_reference_excludes():
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    assert metrics.kl_divergence(p, torch.zeros(1, 3)).item() == pytest.approx(math.log(1.5))


@settings(deadline=None, max_examples=40)
@given(words, words)
def test_word_errors_are_a_distance(one, other):
    errors = metrics.word_errors(one, other)
    assert errors == metrics.word_errors(other, one)
    assert (errors == 0) == (one == other)
    assert abs(len(one) - len(other)) <= errors <= max(len(one), len(other))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(words.filter(bool), words), min_size=1, max_size=3))
def test_word_error_rate_is_jiwers(pairs):
    jiwer = pytest.importorskip("jiwer")
    references, texts = zip(*pairs, strict=True)
    expected = jiwer.wer([" ".join(x) for x in references], [" ".join(x) for x in texts])
    assert metrics.word_error_rate(references, texts) == pytest.approx(expected)


def test_retrieval_ranks_from_one_and_ties_count_against_the_answer():
    documents = torch.eye(3)
    assert metrics.mean_reciprocal_rank(documents, documents) == 1
    assert metrics.mean_reciprocal_rank(torch.eye(3).roll(1, 0), documents) == pytest.approx(1 / 3)
    assert metrics.mean_reciprocal_rank(torch.ones(3, 3), documents) == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_cosine_distance_is_exactly_zero_for_equal_rows(seed):
    x, y = rows(seed, 4, 5), rows(seed + 1, 4, 5)
    assert metrics.cosine_distance(x, x) == 0
    expected = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean().item()
    assert metrics.cosine_distance(x, 3 * y) == pytest.approx(expected)


def test_correlation_of_a_line_and_of_a_constant():
    x = torch.arange(5.0)
    assert metrics.pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert metrics.pearson(x, torch.full((5,), 4.2)) == 0


masks = st.sampled_from([None, "some", "first block hidden"])


def problem(seed: int, keys: int, mask: str | None):
    """q, k, v (2, 3, keys, 4), key mask (2, keys) or None."""
    q, k, v = rows(seed, 3, 2, 3, keys, 4)
    visible = None
    if mask is not None:
        visible = rows(seed + 1, 2, keys) > 0
        visible[1] = False if mask == "some" else visible[1]
        visible[:, :5] = visible[:, :5] & (mask == "some")
    return q, k, v, visible


def dense(q, k, v, allowed):
    """Softmax attention where `allowed` (E, 1, N, N); 0 where a row sees nothing."""
    scores = (0.5 * q @ k.mT).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1).nan_to_num() @ v


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 17), masks)
def test_uniform_control_is_attention_with_equal_scores(seed, keys, mask):
    q, k, v, visible = problem(seed, keys, mask)
    seen = torch.ones(2, keys, dtype=torch.bool) if visible is None else visible
    expected = dense(torch.zeros_like(q), k, v, seen[:, None, None].expand(2, 1, keys, keys))
    torch.testing.assert_close(controls.uniform(q, k, v, visible), expected)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 17), st.integers(1, 20), masks)
def test_block_diagonal_control_is_attention_to_the_own_block(seed, keys, block_size, mask):
    q, k, v, visible = problem(seed, keys, mask)
    block = torch.arange(keys) // block_size
    allowed = (block[:, None] == block[None])[None, None]
    if visible is not None:
        allowed = allowed & visible[:, None, None]
    found = controls.block_diagonal(q, k, v, visible, scale=0.5, block_size=block_size)
    torch.testing.assert_close(found, dense(q, k, v, allowed.expand(2, 1, keys, keys)))


def test_block_diagonal_control_with_other_queries_than_keys():
    q, k, v = rows(0, 1, 1, 6, 4), rows(1, 1, 1, 9, 4), rows(2, 1, 1, 9, 4)
    allowed = (torch.arange(6)[:, None] // 2 == torch.arange(9)[None] // 3)[None, None]
    found = controls.block_diagonal(q, k, v, None, scale=0.5, block_size=3)
    torch.testing.assert_close(found, dense(q, k, v, allowed))


def test_a_stub_is_gone_after_its_block_and_real_modules_are_left_alone():
    before = sys.modules["torch"]
    with stubbed(["no_such_package", "no_such_package.part", "torch"]):
        from no_such_package import part

        assert sys.modules["torch"] is before
        assert isinstance(part.Anything, type)
    assert "no_such_package" not in sys.modules
    assert "no_such_package.part" not in sys.modules
    assert importlib.util.find_spec("no_such_package") is None


def test_stubs_go_when_the_body_fails():
    with pytest.raises(ZeroDivisionError), stubbed(["no_such_package"]):
        raise ZeroDivisionError
    assert "no_such_package" not in sys.modules


def test_a_missing_package_says_how_to_get_it():
    with pytest.raises(TaskUnavailable, match=r"no-such-package is not installed: pip install .*requirements-quality"):
        package_file("no-such-package", "x")


def test_windows_hold_every_clip_and_last_25_to_29_seconds():
    sounds, texts = speech.clips()
    windows, said = speech.noisy_windows(sounds, texts)
    assert len(windows) == len(said) == speech.NUM_WINDOWS
    assert all(25 <= len(window) / 16_000 <= 29 for window in windows)
    assert all(sorted(" ".join(texts).split()) == sorted(line.split()) for line in said)


def test_degradations_do_what_they_say():
    sound = speech.clips()[0][1]
    noise = speech.add_noise(sound, 10.0) - sound
    assert 10 * math.log10((sound**2).mean() / (noise**2).mean()) == pytest.approx(10, abs=0.1)
    assert abs(speech.clip_peaks(sound, 0.2)).max() == pytest.approx(0.2 * abs(sound).max())
    quiet = speech.low_pass(sound, 1000.0)
    assert (quiet**2).mean() < (sound**2).mean()
    assert len(speech.degraded(sound)) == len(speech.DEGRADATIONS) + 1


def test_documents_to_calibrate_on_come_from_other_topics():
    from benchmarks.quality import minilm

    evaluation, calibration = minilm.splits(minilm.topics)
    assert len(evaluation) == minilm.NUM_DOCUMENTS
    assert len(calibration) == minilm.NUM_CALIBRATION
    assert len({*evaluation, *calibration}) == len(evaluation) + len(calibration)
    held_out = minilm.distinct(minilm.topics)[:: minilm.CALIBRATION_TOPICS]
    others = [text for name, text in minilm.topics.items() if name in minilm.distinct(minilm.topics)]
    assert sum(calibration[0] in text for text in others) == 1
    assert all(any(piece in minilm.topics[name] for name in held_out) for piece in calibration)
    assert not any(piece in minilm.topics[name] for name in held_out for piece in evaluation)
    assert min(len(x.split()) for x in evaluation) > minilm.QUERY_WORDS


def test_a_text_that_a_longer_one_repeats_is_left_out():
    from benchmarks.quality import minilm

    whole = "\n".join(f"line {n}" for n in range(9))
    assert minilm.distinct({"part": "line 3\nline 4", "whole": whole, "other": "another line"}) == ["other", "whole"]


def test_pieces_cut_between_lines_and_lose_only_a_short_rest():
    from benchmarks.quality import minilm

    lines = [f"line {n} of the text" for n in range(200)]
    found = list(minilm.pieces("\n".join(lines)))
    joined = "\n".join(found).splitlines()
    assert joined == lines[: len(joined)]
    assert len(lines) - len(joined) < minilm.LEAST_WORDS


def test_a_homography_takes_an_image_to_where_it_says():
    warp = warps.random_homography(60, 80, seed=3)
    image = torch.zeros(1, 60, 80)
    image[0, 28:33, 38:43] = 1
    copy = warps.warped(image, warp)[0]
    row, column = divmod(int(copy.argmax()), 80)
    centre = warps.project(torch.tensor([[40.0, 30.0]]), warp)[0]
    assert (centre - torch.tensor([column, row])).abs().max() < 4


def test_true_matches_are_mutual_and_close():
    from benchmarks.quality import lightglue

    first = torch.tensor([[10.0, 10.0], [10.5, 10.0], [50.0, 50.0], [90.0, 90.0]])
    second = torch.tensor([[50.0, 51.0], [10.0, 10.0], [70.0, 90.0]])
    found = lightglue.true_matches(first, second, torch.eye(3, dtype=torch.float64))
    assert found.tolist() == [1, -1, 0, -1]
    assert lightglue.lost_matches(found, found) == 0
    assert lightglue.lost_matches(found, torch.tensor([1, 2, -1, -1])) == 0.5


def test_the_images_to_calibrate_on_are_others():
    from benchmarks.quality import lightglue

    assert not set(lightglue.EVALUATION) & set(lightglue.CALIBRATION)


def tiny_speech() -> Speech:
    """A Whisper of a few thousand parameters that has heard six recordings of noise."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    from benchmarks.quality.pack_whisper import PackedTokenizer
    from benchmarks.quality.recordings import END, PROMPT
    from examples.whisper.load import MULTILINGUAL_VOCAB_SIZE, Whisper

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=MULTILINGUAL_VOCAB_SIZE, d_model=8, num_mel_bins=4, max_source_positions=6, max_target_positions=12,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).half().float().eval()
    names = {name: 50_000 + n for n, name in enumerate((END, *PROMPT))}
    tokenizer = PackedTokenizer({str(n): f" w{n}" for n in range(MULTILINGUAL_VOCAB_SIZE)}, names)
    whisper = Whisper(model, tokenizer, WhisperFeatureExtractor(feature_size=4), (7,), (8,))  # type: ignore[arg-type]
    tokens = torch.tensor([[50_001, 50_002, 50_003, 50_004, 40_000, 3, 50_000, PADDING]])
    groups = [
        Recordings(torch.randn(2, 4, 12).half().float(), tokens.expand(2, -1), said) for said in (("a b", "c"),) * 3
    ]
    return Speech(whisper, None, *groups)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Speech, Speech]:
    """What went in, and what came out of files of a few kB."""
    heard, target = tiny_speech(), tmp_path_factory.mktemp("packed") / "w"
    data = pack(heard, num_frequent=100)
    for index, start in enumerate(range(0, len(data), 5000)):
        target.with_name(f"w.{index}").write_bytes(data[start : start + 5000])
    assert len(parts_of(target)) > 1
    return heard, unpack(target)


def test_a_packed_encoder_and_its_recordings_are_what_they_were(packed):
    heard, found = packed
    for name, x in heard.whisper.model.model.encoder.state_dict().items():
        torch.testing.assert_close(found.whisper.model.model.encoder.state_dict()[name], x, rtol=0, atol=0)
    assert torch.equal(found.long.features, heard.long.features)
    assert torch.equal(found.short.tokens, heard.short.tokens)
    assert found.calibration.words == heard.calibration.words


def test_packed_tokens_are_those_in_use_and_the_frequent_ones(packed):
    _, found = packed
    assert set(found.kept.tolist()) == {*range(100), 40_000, *range(50_000, 50_005)}
    assert found.whisper.tokenizer.decode([3, 40_000]) == " w3 w40000"
    assert {7, 100, 39_999, 51_000} <= set(found.whisper.suppress)
    assert not {3, 40_000} & set(found.whisper.suppress)


def test_packed_logits_are_the_whole_model_s_at_the_kept_tokens(packed):
    from benchmarks.quality.whisper import Encoder, Judge

    heard, found = packed
    judges = [Judge(x, Encoder(x.whisper.model.model.encoder), "cpu", torch.float32) for x in packed]
    states, tokens = torch.randn(1, 6, 8), heard.long.tokens[:1]
    whole, kept = (judge.logits(states, tokens) for judge in judges)
    torch.testing.assert_close(kept, whole[:, found.kept])
    assert whole.shape[0] == 3  # two words and the end: neither the prompt nor padding is judged
    assert judges[1].metric((states, tokens), (states, tokens)) == 0
    assert judges[1].metric((states, tokens), (states + 1, tokens)) > 0


@functools.cache
def loaded(name: str) -> Task:
    return TASKS[name].load()


@pytest.mark.parametrize("name", [name for name, entry in TASKS.items() if not entry.missing() and entry.default])
@pytest.mark.slow
def test_a_task_loads_and_its_metric_is_zero_for_the_exact_model(name):
    task = loaded(name)
    args, kwargs = task.calibration_inputs[0]
    with torch.no_grad():
        output = task.model(*args, **kwargs)
    assert task.metric(output, output) == 0
    assert task.name == name
    assert task.sites > 0


@pytest.mark.slow
@pytest.mark.skipif(bool(TASKS["lightglue"].missing()), reason="needs LightGlue's packages")
def test_the_matcher_is_lightglue_without_early_stopping_and_pruning():
    matcher = loaded("lightglue").model
    generator = torch.Generator().manual_seed(0)
    points = [200 * torch.rand(1, 60, 2, generator=generator) for _ in range(2)]
    descriptors = [nn.functional.normalize(torch.randn(1, 60, 128, generator=generator), dim=-1)] * 2
    size = torch.tensor([[200.0, 200.0]])
    images = [{"keypoints": x, "descriptors": y, "image_size": size} for x, y in zip(points, descriptors, strict=True)]
    expected = matcher.lightglue({"image0": images[0], "image1": images[1]})["matches0"][0]
    found = matcher(*((x - 100) / 100 for x in points), *descriptors)
    assert torch.equal(found, expected)
    assert (found >= 0).any()
