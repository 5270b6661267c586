"""The command line, called in process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monarch_compile.tools import autotune, cli
from monarch_compile.version import __version__

MODEL = """
import torch

def build():
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    return attend, (q, k), {"value": v}

def wrong():
    return 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "some_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    yield "some_model"
    sys.modules.pop("some_model", None)


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"monarch_compile {__version__} (torch ")


def test_explain_prints_and_writes(module, tmp_path, capsys):
    options = ["--options", "policy=always", "block_size=16"]
    outputs = ["--html", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")]
    assert cli.main(["explain", f"{module}:build", *options, *outputs]) == 0
    assert "1 of 1 attention sites lowered" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["sites"][0]["block_size"] == 16
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("some_model", "written module:function; found 'some_model'"),
        ("some_model:nothing", "cannot load 'some_model:nothing'"),
        ("no_such_model:build", "cannot load 'no_such_model:build'"),
        ("some_model:wrong", "must return (model, args) or (model, args, kwargs)"),
    ],
)
def test_bad_targets_are_explained(module, target, message, capsys):
    assert cli.main(["explain", target]) == 2
    assert message in capsys.readouterr().err


def test_bad_options_are_explained(module, capsys):
    assert cli.main(["explain", f"{module}:build", "--options", "policy"]) == 2
    assert "an option is written key=value; found 'policy'" in capsys.readouterr().err
    assert cli.main(["explain", f"{module}:build", "--options", "blocksize=3"]) == 2
    assert "unknown option 'blocksize'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo"], ["bench", "quality", "--fresh"]])
def test_what_needs_a_checkout_says_so(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "monarch_compile" / "tools" / "cli.py"))
    assert cli.main(command) == 2
    assert "lives in a checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "cpu", "--seq-lens", "32", "--seconds", "0.01", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert content["machine"]["threads"] == 1
    assert [row["window"] for row in content["rows"]] == [None, 1]
    for row in content["rows"]:
        assert row["shape"] == [1, 12, 32, 64]
        assert row["max_error"] < 1e-5
        assert row["exact"]["p20"] <= row["exact"]["p50"] <= row["exact"]["p80"]
        assert f"{row['speedup']:.2f}x" in printed


def test_the_quality_benchmark_gets_its_own_arguments(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append((command[1:], options["cwd"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert cli.main(["bench", "quality", "--tasks", "whisper", "--fresh"]) == 3
    assert commands == [(["-m", "benchmarks.quality", "--tasks", "whisper", "--fresh"], Path(cli.__file__).parents[2])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_tuning_needs_a_device(capsys):
    assert cli.main(["tune", "--lengths", "256"]) == 2
    assert "tuning needs a CUDA device, and this machine has none" in capsys.readouterr().err


def test_what_to_tune_comes_from_the_arguments(monkeypatch):
    asked = {}
    here = autotune.Machine(torch.device("cuda", 0), "NVIDIA H200", (9, 0), "3.6.0")
    monkeypatch.setattr(autotune.Machine, "here", lambda: here)
    monkeypatch.setattr(autotune, "run", lambda irs, machine, **options: asked.update(irs=irs, **options))
    sizes = ["--lengths", "4096", "--windows", "none", "2", "--heads", "3", "--head-dim", "128", "--dtype", "bfloat16"]
    assert (
        cli.main(["tune", *sizes, "--iters", "2", "--block-size", "48", "--seconds", "7", "--masked", "--fresh"]) == 0
    )
    assert (asked["seconds"], asked["fresh"]) == (7.0, True)
    assert [str(ir) for ir in asked["irs"]] == [
        "monarch.attention<bf16> q[1,3,4096,128] k[1,3,4096,128] v[1,3,4096,128] blocks=86x48 iters=2 init=identity "
        f"pad=post mask=key_padding causal=false window={window} prefix=0 scale=0.0883883"
        for window in (None, 2)
    ]


def test_an_unknown_argument_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "cpu", "--fresh"])
    assert "unrecognized arguments: --fresh" in capsys.readouterr().err


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "command" in capsys.readouterr().err
