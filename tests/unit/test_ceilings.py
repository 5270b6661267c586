"""GPUs without a description: measured once, kept in a file, and a reason to guess where that is not possible."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.work import predict
from monarch_compile.cost import ceilings
from monarch_compile.cost.devices import DEVICES, MEASURED, Ceiling, installed, scaled

FOUND = Ceiling(half_flops=300e12, bytes_per_s=1.9e12, launch_s=5e-6)
A100 = "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[int]]:
    """A machine with a GPU of a name and a capability; what is returned fills with the measurements that are made."""

    def here(
        name: str = A100, capability: tuple[int, int] = (8, 0), error: Exception | None = None, capturing: bool = False
    ) -> list[int]:
        made: list[int] = []

        def measure(index: int) -> Ceiling:
            made.append(index)
            if error is not None:
                raise error
            return FOUND

        monkeypatch.setenv("MONARCH_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(ceilings, "_found", {})
        monkeypatch.setattr(ceilings, "measure", measure)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        return made

    return here


def site(seq_len: int = 4096) -> MonarchAttention:
    return MonarchAttention(1, 12, 12, seq_len, seq_len, 64, 64, torch.float16, Form(64), 0.125)


def test_a_gpu_is_measured_once_and_kept(gpu: Callable[..., list[int]]) -> None:
    made = gpu()
    assert installed("cuda") == installed("cuda:0") == scaled(FOUND)
    assert made == [0]
    assert ceilings.read() == {A100: FOUND}
    assert gpu() == []
    assert installed("cuda").name == MEASURED  # from the file: another process would not measure


def test_known_gpus_and_the_cpu_are_not_measured(gpu: Callable[..., list[int]]) -> None:
    for name, described in (("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100")):
        made = gpu(name)
        assert installed("cuda") is DEVICES[described]
        assert installed("cpu") is DEVICES["cpu"]
        assert made == []


@pytest.mark.parametrize("how", [{"capability": (7, 5)}, {"capturing": True}])
def test_nothing_is_measured_where_it_would_do_harm_or_no_good(
    gpu: Callable[..., list[int]], how: dict[str, object]
) -> None:
    made = gpu(**how)
    assert installed("cuda") is DEVICES["cuda"]
    assert made == []
    assert ceilings.read() == {}


def test_where_measuring_fails_a_guess_stands_in_and_it_is_not_tried_again(
    gpu: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    made = gpu(error=torch.OutOfMemoryError("no memory"))
    with caplog.at_level(logging.WARNING):
        assert installed("cuda") is installed("cuda") is DEVICES["cuda"]
    assert made == [0]
    assert "could not be measured" in caplog.text


@pytest.mark.parametrize(
    "text", ["{", '{"format": 2, "gpus": {}}', '{"format": 1, "gpus": {"x": {"half_flops": 1}}}', "[]",
             '{"format": 1, "gpus": {"x": {"half_flops": 1, "bytes_per_s": 0, "launch_s": 1}}}'],
)  # fmt: skip
def test_a_file_of_something_else_is_measured_anew(gpu: Callable[..., list[int]], text: str) -> None:
    made = gpu()
    ceilings.ceilings_path().write_text(text, encoding="utf-8")
    assert installed("cuda") == scaled(FOUND)
    assert made == [0]
    assert json.loads(ceilings.ceilings_path().read_text(encoding="utf-8"))["gpus"].keys() == {A100}


def test_other_gpus_of_the_file_stay(gpu: Callable[..., list[int]]) -> None:
    gpu()
    ceilings.write("another", replace(FOUND, launch_s=7e-6))
    installed("cuda")
    assert ceilings.read() == {A100: FOUND, "another": replace(FOUND, launch_s=7e-6)}


def test_real_tensors_are_made_under_fake_ones() -> None:
    with FakeTensorMode(), ceilings.real_tensors():
        assert type(torch.zeros(1)) is torch.Tensor


def test_a_description_is_scaled_by_its_ceilings() -> None:
    like = DEVICES["h100"]
    assert like.ceiling is not None
    same = scaled(like.ceiling)
    assert replace(same, name=like.name) == like
    rates = {name: getattr(like.ceiling, name) / 2 for name in ("half_flops", "bytes_per_s")}
    full, half = (predict(site(65536), device) for device in (like, scaled(replace(like.ceiling, **rates))))
    assert 1.9 < half.exact_s / full.exact_s < 2
    assert 1.9 < half.monarch_s / full.monarch_s < 2
    slow = scaled(replace(like.ceiling, launch_s=2 * like.ceiling.launch_s)).compiled
    assert slow is not None
    assert like.compiled is not None
    assert slow.exact_s == 2 * like.compiled.exact_s
    assert slow.near == like.compiled.near
