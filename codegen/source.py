"""Emitted kernels as values and as files: text, key, and the module loaded from it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monarch_compile.errors import CodegenError

CACHE_DIR_VARIABLE = "MONARCH_CACHE_DIR"


@dataclass(frozen=True)
class KernelSource:
    """One Triton kernel: the name of its function, the text of the module that holds it, the function's parameters."""

    name: str
    text: str
    parameters: tuple[str, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """sha256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """Where the text lives inside a cache directory."""
        return f"{self.name}_{self.key[:16]}.py"

    def write(self, directory: Path | None = None) -> Path:
        """Put the text in `directory` (default: `cache_dir()`), atomically and only where it differs; its path."""
        path = (directory or cache_dir()) / self.file_name
        if not path.is_file() or path.read_text(encoding="utf-8") != self.text:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, self.text)
        return path

    def load(self) -> Any:
        """The kernel, from its file, as `triton.jit` made it (interpreted when TRITON_INTERPRET=1).

        A file, because Triton and Inductor read a kernel's source back through `inspect`.

        Raises:
            CodegenError: triton is not installed.
        """
        return _load(self.name, self.write(), is_interpreted())


def cache_dir() -> Path:
    """$MONARCH_CACHE_DIR, or else a folder of Inductor's own cache."""
    if chosen := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(chosen).expanduser()
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

    return Path(inductor_cache_dir()) / "monarch_compile"


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors.

    Raises:
        CodegenError: triton is not installed.
    """
    try:
        from triton import knobs
    except ImportError as error:
        raise CodegenError("kernels need triton >= 3.6, which is not installed; the reference runs without") from error
    return bool(knobs.runtime.interpret)


def replace_file(path: Path, text: str) -> None:
    """Put `text` at `path` in one step: a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.cache
def _load(name: str, path: Path, interpreted: bool) -> Any:
    module_name = f"monarch_compile_kernels.{path.stem}" + ("_interpreted" if interpreted else "")
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise CodegenError(f"cannot load the kernel file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # inspect and pickle look modules up by name
    spec.loader.exec_module(module)
    return getattr(module, name)
