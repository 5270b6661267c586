"""`monarch-compile doctor`, called in process."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from monarch_compile import monarch_attention
from monarch_compile.attention import trial
from monarch_compile.attention.family import FAMILY
from monarch_compile.tools import cli, doctor
from monarch_compile.version import __version__


def _no_compiler(*_: object, **__: object) -> None:
    raise RuntimeError("no C++ compiler")


def test_a_healthy_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MONARCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MONARCH_CACHDIR", "typo")
    (tmp_path / "kernel.py").write_text("x" * 2048)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"monarch_compile: {__version__}",
        f"torch: {torch.__version__}",
        f"{tmp_path}: kernels: 1, 2 KiB",
        f"MONARCH_CACHE_DIR={tmp_path}\n",
        "MONARCH_CACHDIR=typo (not a variable that monarch_compile reads)",
        "cpu: pass, relative error ",
        "cpu, gradients: pass, relative error ",
    ):
        assert f"  {line}" in printed


def test_json_and_a_failing_self_test(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", _no_compiler)
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is False
    assert found["self_tests"][0] == {
        "device": "cpu",
        "error": None,
        "bound": 1e-5,
        "failure": "RuntimeError: no C++ compiler",
        "what": "",
        "passed": False,
    }
    assert found["devices"][0]["cost_model"] == "cpu"
    assert cli.main(["doctor"]) == 1
    assert "cpu: FAIL, RuntimeError: no C++ compiler" in capsys.readouterr().out


@pytest.mark.parametrize(("fault", "passes"), [(0.0, True), (0.001, False), (float("nan"), False)])
def test_wrong_numbers_fail(monkeypatch, fault, passes):
    def with_fault(_, *, backend, options, dynamic):
        assert backend == "monarch"
        return lambda q, k, v: monarch_attention(q, k, v, **trial.FORM) + fault

    monkeypatch.setattr(torch, "compile", with_fault)
    test = doctor.self_test(FAMILY.trials[0], "cpu")
    assert test.passed is passes
    assert str(test).startswith(f"cpu: {'pass' if passes else 'FAIL'}, relative error ")


@pytest.mark.parametrize(("fault", "passes"), [(1.0, True), (1.01, False)])
def test_wrong_gradients_fail(monkeypatch, fault, passes):
    def with_fault(_, *, backend, options, dynamic):
        return lambda q, k, v: Scaled.apply(monarch_attention(q, k, v, **trial.FORM), fault)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None

    monkeypatch.setattr(torch, "compile", with_fault)
    test = doctor.self_test(FAMILY.trials[1], "cpu")
    assert test.passed is passes
    assert str(test).startswith(f"cpu, gradients: {'pass' if passes else 'FAIL'}, relative error ")


def test_without_triton_the_rest_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor._versions()["triton"].startswith("cannot be imported")
