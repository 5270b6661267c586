"""What is installed is what is on disk, from a checkout and from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from monarch_compile.codegen.tuning import store
from monarch_compile.sources import digest_of, source_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".jinja"}
LINKED = ("passes", "codegen")
"""Folders at the top level that are imported as parts of monarch_compile."""
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _folders() -> dict[str, str]:
    """The folder of every package, by its name, as they are on disk."""
    tops = {"monarch_compile": "monarch_compile"} | {f"monarch_compile.{name}": name for name in LINKED}
    found = {}
    for package, top in tops.items():
        for folder, _, names in os.walk(ROOT / top):
            if any(name.endswith(".py") for name in names):
                inner = Path(folder).relative_to(ROOT / top).parts
                found[".".join((package, *inner))] = "/".join((top, *inner))
    return found


FOLDERS = _folders()


def _data(folder: str) -> set[str]:
    """What a package ships beside its modules: files of its folder and of subfolders that are no packages."""
    inside = [p for p in (ROOT / folder).rglob("*") if p.suffix == ".jinja" or p.name == "py.typed"]
    packages = {ROOT / other for other in FOLDERS.values()}
    owner = lambda p: next(parent for parent in p.parents if parent in packages)  # noqa: E731
    return {p.relative_to(ROOT / folder).as_posix() for p in inside if owner(p) == ROOT / folder}


def test_the_package_list_is_what_is_on_disk() -> None:
    assert sorted(SETTINGS["packages"]) == sorted(FOLDERS)
    assert SETTINGS["package-dir"] == {p: f for p, f in FOLDERS.items() if p.replace(".", "/") != f}
    for name in LINKED:
        link = ROOT / "monarch_compile" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_the_data_list_is_what_is_on_disk() -> None:
    listed = SETTINGS["package-data"]
    for package, folder in FOLDERS.items():
        patterns = listed.get(package, [])
        found = {p.relative_to(ROOT / folder).as_posix() for x in patterns for p in (ROOT / folder).glob(x)}
        assert found == _data(folder), package
    assert set(listed) <= set(FOLDERS)


def test_the_cache_key_covers_every_source_and_template() -> None:
    root = ROOT / "monarch_compile"
    found = {path.resolve() for path in source_files(root)}
    wanted = {p for top in ("monarch_compile", *LINKED) for p in (ROOT / top).rglob("*") if p.suffix in SUFFIXES}
    assert found == wanted


def test_the_key_of_tuning_changes_with_every_file_that_emits(tmp_path: Path) -> None:
    copied = shutil.copytree(ROOT / "codegen", tmp_path / "codegen", ignore=shutil.ignore_patterns("__pycache__"))
    others = []
    for number, path in enumerate(store.meaning_files("attention")):
        (folder := tmp_path / str(number)).mkdir()  # two may have one name
        others.append(Path(shutil.copy(path, folder)))
    before = digest_of(copied, *others)
    assert before == store.emitter_digest("attention")
    for path in [*source_files(copied), *others]:
        text = path.read_bytes()
        path.write_bytes(text + b"#")
        assert digest_of(copied, *others) != before, path
        path.write_bytes(text)
    assert digest_of(copied, *others) == before


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
    own = {"MAKEFLAGS", "MAKEOVERRIDES", "TORCH", "VENV"}  # of a make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
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
        for name in {p.name for p in (ROOT / folder).glob("*.py")} | _data(folder)
    }
    assert sorted(names) == sorted(expected)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import monarch_compile.passes.pipeline, monarch_compile.codegen.render as render, monarch_compile as m\n"
        f"assert render.__file__.startswith({str(tmp_path)!r}), render.__file__\n"
        "print(m.__version__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip()
