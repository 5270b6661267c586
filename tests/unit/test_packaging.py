"""What is installed is what is on disk, from a checkout and from a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from monarch_compile.passes.pipeline import source_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "monarch_compile": "monarch_compile",
    "monarch_compile.passes": "passes",
    "monarch_compile.codegen": "codegen",
}


def _files(folder: Path) -> set[str]:
    kept = {".py", ".jinja", ".typed"}
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in kept or p.name == "py.typed"}


def test_the_package_list_is_what_is_on_disk() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"] == list(FOLDERS)
    for package, folder in settings["package-dir"].items():
        link = ROOT / package.replace(".", "/")
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_the_cache_key_covers_every_source_and_template() -> None:
    root = ROOT / "monarch_compile"
    found = {path.resolve() for path in source_files(root)}
    wanted = {p for folder in FOLDERS.values() for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".jinja"}}
    assert found == wanted


def test_templates_and_subfolders_are_sources(tmp_path: Path) -> None:
    for name in ("a.py", "deep/er/b.py", "deep/c.html.jinja", "d.pyc", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [str(path.relative_to(tmp_path)) for path in source_files(tmp_path)]
    assert names == ["a.py", "deep/c.html.jinja", "deep/er/b.py"]


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1", "2.13.0", "2.14.1", torch.__version__])
def test_the_metadata_takes_every_version_of_torch_that_is_supported(version: str) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (requirement,) = (found for found in map(Requirement, dependencies) if found.name == "torch")
    assert requirement.specifier.contains(version)
    assert not requirement.specifier.contains("2.15.0")
    assert "torch 2.11 to 2.14" in (ROOT / "README.md").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("given", "venv", "taken"),
    [((), ".venv", "--constraint constraints.txt"), (("TORCH=2.14.1",), ".venv-torch2.14.1", "torch==2.14.1")],
    ids=["pinned", "another"],
)
def test_make_test_runs_on_the_version_of_torch_that_is_asked_for(
    given: tuple[str, ...], venv: str, taken: str
) -> None:
    command = ["make", "--dry-run", "--always-make", "test", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert all(line.startswith(f"{venv}/bin/python ") and taken in line for line in installs)
    assert ("constraints.txt" in done.stdout) == (not given)
    assert f"{venv}/bin/python -m pytest" in done.stdout
    ignored = subprocess.run(["git", "check-ignore", f"{venv}/"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128)  # 128: no repository


@pytest.mark.slow
def test_a_wheel_holds_every_file_once_and_works(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
    ]
    source = tmp_path / "source"
    # From a copy: a build leaves a folder behind, whose stale files the next build would ship.
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    subprocess.run([*command, str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
        archive.extractall(tmp_path / "site")
    expected = {
        f"{package.replace('.', '/')}/{name}"
        for package, folder in FOLDERS.items()
        for name in _files(ROOT / folder)
        if not (package == "monarch_compile" and name.startswith(("passes/", "codegen/")))
    }
    assert sorted(names) == sorted(expected)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import monarch_compile.passes.pipeline, monarch_compile.codegen.emit as emit, monarch_compile as m\n"
        f"assert emit.__file__.startswith({str(tmp_path)!r}), emit.__file__\n"
        "print(m.__version__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip()
