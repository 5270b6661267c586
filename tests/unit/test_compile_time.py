"""The benchmark of compile time: what it makes of its runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import compile_time
from benchmarks.compile_time import Compilation
from monarch_compile.tools import cli

RUNS = {
    ("inductor", "cold"): (20.0, 10.0, 0.0),
    ("inductor", "warm"): (4.0, 2.0, 0.0),
    ("monarch", "cold"): (30.0, 12.0, 1.0),
    ("monarch", "warm"): (5.0, 3.0, 0.5),
}


def test_the_least_of_each_row_counts():
    found = {
        f"{backend} {state}": [Compilation(wall, cpu + 1, passes, 0, 0), Compilation(wall + 1, cpu, passes, 0, 0)]
        for (backend, state), (wall, cpu, passes) in RUNS.items()
    }
    result = compile_time.summary(found)
    assert result["least"]["monarch cold"] == {"wall_s": 30.0, "cpu_s": 12.0, "passes_s": 1.0}
    assert result["ratios"] == {"cold": 1.2, "warm": 1.5}
    assert result["wall_ratios"] == {"cold": 1.5, "warm": 1.25}
    assert result["passes_over_inductor"] == {"cold": 0.1, "warm": 0.25}


def test_each_pair_has_an_empty_cache_folder_of_its_own(monkeypatch, tmp_path, capsys):
    folders = []

    def run(command, *, env=None, **_):
        if "compileall" in command:
            return subprocess.CompletedProcess(command, 0)
        folder = Path(env["TORCHINDUCTOR_CACHE_DIR"])
        folders.append((folder, [path.name for path in folder.iterdir()]))
        (folder / "filled").touch()
        wall, cpu, passes = RUNS[command[command.index("--one") + 1], "warm" if len(folders) % 2 == 0 else "cold"]
        run = {"wall_s": wall, "cpu_s": cpu, "passes_s": passes, "hits": 0, "lowered": 0}
        return subprocess.CompletedProcess(command, 0, stdout="noise\n" + json.dumps(run))

    monkeypatch.setattr(compile_time.subprocess, "run", run)
    path = tmp_path / "result.json"
    assert compile_time.main(["--repeats", "1", "--json", str(path)]) == 0
    assert [found for _, found in folders] == [[], ["filled"], [], ["filled"]]
    assert folders[0][0] == folders[1][0] != folders[2][0] == folders[3][0]
    content = json.loads(path.read_text())
    assert content["ratios"]["cold"] == pytest.approx(1.2)
    printed = capsys.readouterr().out
    assert "cold: whole compilation 1.200 of Inductor's in processor time, 1.500 by the clock" in printed
    assert "our passes alone add 10.0% to Inductor's (goal: at most 25%)" in printed
    assert content["machine"]["torch"]


def test_the_command_line_hands_its_arguments_on(monkeypatch):
    commands = []
    monkeypatch.setattr(cli, "_run_in_checkout", lambda *command: commands.append(command) or 0)
    assert cli.main(["bench", "compile", "--repeats", "2"]) == 0
    assert commands == [("benchmarks.compile_time", "--repeats", "2")]
