"""What is installed is what is on disk, from a checkout and from a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
