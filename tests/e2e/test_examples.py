"""The examples: reader of CTranslate2 files, audio, word error rate, the demo's plumbing; real Whisper where it is."""

from __future__ import annotations

import struct
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("transformers", reason="the examples need transformers")

from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from examples import demo
from examples.progress import median_seconds, step, table
from examples.whisper.audio import AudioError, log_mel, read_clips, read_wav
from examples.whisper.ctranslate2_weights import DTYPES, ModelFileError, parse, read
from examples.whisper.load import (
    PACKAGES,
    Whisper,
    config_of,
    fill,
    load_whisper,
    packages_installed,
)
from examples.whisper.transcribe import transcribe, word_error_rate

needs_weights = pytest.mark.skipif(not packages_installed(), reason=f"needs the packages {' and '.join(PACKAGES)}")
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def text(value: str) -> bytes:
    raw = value.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def model_file(variables, aliases=(), version=6, spec="WhisperSpec") -> bytes:
    """What CTranslate2 writes for `variables`, a dict of arrays."""
    out = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        head = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += [text(name), head, struct.pack("<BI", CODES[value.dtype], value.nbytes), value.tobytes()]
    out += [struct.pack("<I", len(aliases)), *(text(alias) + text(name) for alias, name in aliases)]
    return b"".join(out)


arrays = st.sampled_from(sorted(DTYPES.values(), key=str)).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(st.dictionaries(names, arrays, max_size=4))
def test_a_written_file_reads_back(variables):
    read_back = parse(model_file(variables))
    assert list(read_back) == list(variables)
    for name, value in variables.items():
        assert read_back[name].dtype == value.dtype
        np.testing.assert_array_equal(read_back[name], value)


SMALL = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.array(8, dtype=np.int16)}


def test_aliases_stand_for_variables():
    read_back = parse(model_file(SMALL, aliases=[("b/weight", "a/weight")]))
    np.testing.assert_array_equal(read_back["b/weight"], SMALL["a/weight"])


@given(st.integers(0, len(model_file(SMALL, aliases=[("b", "n")])) - 1))
def test_a_truncated_file_is_refused_wherever_it_ends(size):
    with pytest.raises(ModelFileError, match="truncated at byte"):
        parse(model_file(SMALL, aliases=[("b", "n")])[:size])


def _with_byte(data: bytes, find: bytes, replace: bytes) -> bytes:
    assert data.count(find) == 1
    return data.replace(find, replace)


N_HEADER = text("n") + struct.pack("<BBI", 0, 2, 2)
BAD_FILES = {
    "version": (model_file(SMALL, version=5), "version 5; only version 6"),
    "spec": (model_file(SMALL, spec="TransformerSpec"), "holds a 'TransformerSpec'"),
    "pickle": (b"\x80\x04\x95" + bytes(40), "only version 6"),
    "trailing": (model_file(SMALL) + b"xy", "2 unexpected bytes"),
    "alias": (model_file(SMALL, aliases=[("b", "missing")]), "alias 'b' stands for 'missing'"),
    "dtype": (_with_byte(model_file(SMALL), N_HEADER, text("n") + struct.pack("<BBI", 0, 9, 2)), "unknown dtype 9"),
    "size": (_with_byte(model_file(SMALL), N_HEADER, text("n") + struct.pack("<BBI", 0, 2, 4)), "but 4 bytes"),
    "name": (_with_byte(model_file(SMALL), text("n"), struct.pack("<H", 2) + b"\xff\0"), "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_says_what_is_wrong(case):
    data, message = BAD_FILES[case]
    with pytest.raises(ModelFileError, match=message):
        parse(data)


def test_parts_are_joined_and_named_in_errors(tmp_path: Path):
    data = model_file(SMALL)
    first, second = tmp_path / "part1", tmp_path / "part2"
    first.write_bytes(data[:17])
    second.write_bytes(data[17:])
    assert read([first, second])["n"] == 8
    with pytest.raises(ModelFileError, match=r"part2 \+ .*part1: "):
        read([second, first])


def tiny_config() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=48, d_model=16, num_mel_bins=8, max_source_positions=12, max_target_positions=10,
        encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=20, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip


def as_ctranslate2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The variables of CTranslate2 for `model`, written out independently of the loader's tables."""
    state = {name: value.detach().numpy() for name, value in model.model.state_dict().items()}
    out: dict[str, np.ndarray] = {}

    def put(theirs: str, *ours: str) -> None:
        norm = ours[0].endswith("norm")
        for part, name in (("weight", "gamma" if norm else "weight"), ("bias", "beta" if norm else "bias")):
            width = state[f"{ours[0]}.weight"].shape[:1]
            pieces = [state.get(f"{o}.{part}", np.zeros(width, np.float32)) for o in ours]
            out[f"{theirs}/{name}"] = np.concatenate(pieces)

    for side, layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        out[f"{side}/num_heads"] = np.array(2, dtype=np.int16)
        out[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(layers):
            new, old = f"{side}/layer_{i}", f"{side}.layers.{i}"
            qkv = [f"{old}.self_attn.{x}_proj" for x in "qkv"]
            put(f"{new}/self_attention/linear_0", *qkv)
            put(f"{new}/self_attention/linear_1", f"{old}.self_attn.out_proj")
            put(f"{new}/self_attention/layer_norm", f"{old}.self_attn_layer_norm")
            put(f"{new}/ffn/linear_0", f"{old}.fc1")
            put(f"{new}/ffn/linear_1", f"{old}.fc2")
            put(f"{new}/ffn/layer_norm", f"{old}.final_layer_norm")
            if side == "decoder":
                put(f"{new}/attention/linear_0", f"{old}.encoder_attn.q_proj")
                put(f"{new}/attention/linear_1", f"{old}.encoder_attn.k_proj", f"{old}.encoder_attn.v_proj")
                put(f"{new}/attention/linear_2", f"{old}.encoder_attn.out_proj")
                put(f"{new}/attention/layer_norm", f"{old}.encoder_attn_layer_norm")
    for conv in ("conv1", "conv2"):
        put(f"encoder/{conv}", f"encoder.{conv}")
    out["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    return out


@pytest.fixture(scope="module")
def tiny() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(tiny_config()).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def test_weights_reach_their_parameters(tiny):
    variables = parse(model_file(as_ctranslate2(tiny)))
    config = config_of(variables)
    for field in ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "num_mel_bins"):
        assert getattr(config, field) == getattr(tiny.config, field), field
    copy = WhisperForConditionalGeneration(tiny_config()).eval()
    fill(copy, variables)
    mel, tokens = torch.randn(1, 8, 24), torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(
        copy(input_features=mel, decoder_input_ids=tokens).logits,
        tiny(input_features=mel, decoder_input_ids=tokens).logits,
    )


def test_missing_misshapen_or_biased_weights_are_refused(tiny):
    variables = as_ctranslate2(tiny)
    copy = WhisperForConditionalGeneration(tiny_config())
    with pytest.raises(ModelFileError, match=r"no weights in the file for encoder\.conv1\.bias"):
        fill(copy, {name: value for name, value in variables.items() if name != "encoder/conv1/bias"})
    with pytest.raises(ModelFileError, match=r"conv2\.bias has shape \(3,\); the model has \(16,\)"):
        fill(copy, variables | {"encoder/conv2/bias": np.zeros(3, np.float32)})
    with pytest.raises(ModelFileError, match="bias of the keys is not zero"):
        fill(copy, variables | {"encoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float32)})
    with pytest.raises(ModelFileError, match="no variable 'decoder/embeddings/weight'"):
        config_of({})


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.astype("<i2").tobytes())
    return path


def test_wav_samples_are_scaled_to_one(tmp_path: Path):
    samples = read_wav(write_wav(tmp_path / "a.wav", np.array([0, 16384, -32768])))
    np.testing.assert_array_equal(samples, np.array([0, 0.5, -1], np.float32))


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2)])
def test_other_rates_and_channels_are_refused(tmp_path: Path, rate, channels):
    path = write_wav(tmp_path / "a.wav", np.zeros(8), rate, channels)
    with pytest.raises(AudioError, match=f"found {rate} Hz, {channels} channels"):
        read_wav(path)


def test_a_file_that_is_no_wav_is_refused(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"not sound at all")
    with pytest.raises(AudioError, match="not a PCM WAV file"):
        read_wav(tmp_path / "a.wav")


def test_the_five_clips_are_there_with_their_words():
    clips = read_clips()
    assert [len(clip.words.split()) for clip in clips] == [22, 8, 14, 18, 8]
    assert sum(len(read_wav(clip.path)) for clip in clips) / 16_000 == pytest.approx(24.7, abs=0.05)


@pytest.mark.parametrize("line", ["a.wav and words", "missing.wav\twords", "a.wav\t "])
def test_a_bad_line_of_transcripts_is_refused(tmp_path: Path, line):
    write_wav(tmp_path / "a.wav", np.zeros(8))
    (tmp_path / "transcripts.tsv").write_text(f"a.wav\tgood\n{line}\n")
    with pytest.raises(AudioError, match=r"line 2 of transcripts\.tsv"):
        read_clips(tmp_path)


def test_log_mel_pads_to_thirty_seconds():
    features = log_mel(WhisperFeatureExtractor(feature_size=80), [read_wav(read_clips()[1].path), np.zeros(1600)])
    assert features.shape == (2, 80, 3000)
    assert features[0].std() > 0.1
    assert features[1].std() == 0


def test_word_error_rate_counts_words_after_normalising():
    pytest.importorskip("jiwer", reason="word error rates need jiwer (the demo extra)")
    assert word_error_rate(["mister dashwood was ill disposed"], ["Mr. Dashwood was ill-disposed."]) == 0
    assert word_error_rate(["he was not young", "a man"], ["he has not", "a man"]) == pytest.approx(2 / 6)
    assert word_error_rate(["one"], [""]) == 1


class WordTokenizer:
    """Tokens are numbers; the special ones sit above the end of text, as Whisper's do."""

    def convert_tokens_to_ids(self, name):
        return {"<|endoftext|>": 40, "<|startoftranscript|>": 41, "<|notimestamps|>": 42}[name]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def test_decoding_is_greedy_suppresses_and_agrees_with_decoding_without_a_cache(tiny):
    states = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    whisper = Whisper(
        tiny, WordTokenizer(), WhisperFeatureExtractor(feature_size=8), suppress=(5,), suppress_first=(40,)
    )
    texts = transcribe(whisper, states, max_new_tokens=6)
    for row, got in zip(states.split(1), texts, strict=True):
        assert got == _decoded_without_cache(tiny, row)
    assert len(set(texts)) > 1


@torch.no_grad()
def _decoded_without_cache(model, states) -> str:
    tokens, out = [41, 42], []
    for step_number in range(6):
        logits = model.proj_out(model.model.decoder(torch.tensor([tokens]), encoder_hidden_states=states)[0][0, -1])
        logits[[5, 40] if step_number == 0 else [5]] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 40:
            break
        out += [tokens[-1]] if tokens[-1] < 40 else []
    return " ".join(map(str, out))


def test_the_command_line(capsys):
    assert demo.parse_arguments([]).part == "all"
    assert demo.parse_arguments(["--device", "cpu", "--whisper", "some/model"]).whisper == "some/model"
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--device", "tpu"])
    assert "invalid choice: 'tpu'" in capsys.readouterr().err


def test_the_demo_says_which_packages_are_missing(monkeypatch, capsys):
    monkeypatch.setattr("examples.whisper.load.packages_installed", lambda: False)
    assert demo.main(["--part", "whisper", "--device", "cpu"]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in PACKAGES)


def test_steps_report_time_and_failure(capsys):
    with step("fine"):
        pass
    with pytest.raises(ZeroDivisionError), step("broken"):
        _ = 1 / 0
    out = capsys.readouterr().out
    assert "fine  0.0 s" in out
    assert "broken  failed after 0.0 s" in out


def test_calls_are_timed_in_turns():
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}
    seconds = median_seconds(calls, 3)
    assert order == ["a", "b"] * 3
    assert seconds["b"] >= 0.01 > seconds["a"]


def test_tables_align():
    assert table([["n", "name"], ["10", "x"]]) == "n   name\n--  ----\n10  x"


@pytest.mark.slow
@needs_weights
def test_real_whisper_reads_the_clips():
    pytest.importorskip("jiwer", reason="word error rates need jiwer (the demo extra)")
    whisper = load_whisper()
    clips = read_clips()[:2]
    features = log_mel(whisper.features, [read_wav(clip.path) for clip in clips])
    with torch.no_grad():
        states = whisper.model.model.encoder(features).last_hidden_state
    assert word_error_rate([clip.words for clip in clips], transcribe(whisper, states)) == 0
    assert word_error_rate([clip.words for clip in clips], transcribe(whisper, torch.zeros_like(states))) > 0.5
