"""Reader of CTranslate2's ``model.bin``: nothing is unpickled or executed, every length is checked before it is used.

Layout, little-endian: u32 version, string spec, u32 revision, u32 count, then `count` variables, each a string name,
u8 rank, u32 dims[rank], u8 dtype, u32 size in bytes, data; then u32 count of aliases, each two strings (alias, name).
A string is a u16 length and that many bytes, NUL-terminated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SUPPORTED_VERSION = 6
DTYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class ModelFileError(ValueError):
    """A model.bin is not what this reader understands."""


class _Cursor:
    """Reads forward through bytes; a read past the end says where and for what."""

    def __init__(self, data: bytes) -> None:
        self.data, self.offset = memoryview(data), 0

    def take(self, size: int, what: str) -> memoryview:
        end = self.offset + size
        if end > len(self.data):
            left = len(self.data) - self.offset
            raise ModelFileError(f"truncated at byte {self.offset}: {what} needs {size} bytes, {left} are left")
        piece, self.offset = self.data[self.offset : end], end
        return piece

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return int(value)

    def string(self, what: str) -> str:
        raw = bytes(self.take(self.number("H", f"length of {what}"), what))
        try:
            return raw.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{what} before byte {self.offset} is not UTF-8 text: {raw[:40]!r}") from error


def parse(data: bytes) -> dict[str, np.ndarray]:
    """Variables and aliases by name, as read-only views of `data` in the dtypes they are stored in.

    Raises:
        ModelFileError: wrong version or spec, unknown dtype, sizes that disagree, truncated or trailing bytes.
    """
    cursor = _Cursor(data)
    version = cursor.number("I", "version")
    if version != SUPPORTED_VERSION:
        raise ModelFileError(f"model.bin has version {version}; only version {SUPPORTED_VERSION} is supported")
    spec = cursor.string("name of the spec")
    if spec != "WhisperSpec":
        raise ModelFileError(f"model.bin holds a {spec!r}; only 'WhisperSpec' is supported")
    cursor.number("I", "revision")
    variables = dict(_variable(cursor) for _ in range(cursor.number("I", "number of variables")))
    for _ in range(cursor.number("I", "number of aliases")):
        alias, name = cursor.string("alias"), cursor.string("name behind an alias")
        if name not in variables:
            raise ModelFileError(f"alias {alias!r} stands for {name!r}, which the file does not hold")
        variables[alias] = variables[name]
    if cursor.offset != len(data):
        raise ModelFileError(f"{len(data) - cursor.offset} unexpected bytes after the end of the model")
    return variables


def read(parts: Sequence[Path]) -> dict[str, np.ndarray]:
    """Parse the model.bin that `parts` give when concatenated in order.

    Raises:
        ModelFileError: see `parse`; the message begins with the files' names.
        OSError: a file cannot be read.
    """
    data = b"".join(path.read_bytes() for path in parts)
    try:
        return parse(data)
    except ModelFileError as error:
        raise ModelFileError(f"{' + '.join(str(path) for path in parts)}: {error}") from error


def _variable(cursor: _Cursor) -> tuple[str, np.ndarray]:
    name = cursor.string("name of a variable")
    dims = [cursor.number("I", f"shape of {name}") for _ in range(cursor.number("B", f"rank of {name}"))]
    code = cursor.number("B", f"dtype of {name}")
    size = cursor.number("I", f"size of {name}")
    if code not in DTYPES:
        raise ModelFileError(f"{name} has unknown dtype {code}; known are {sorted(DTYPES)}")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    if size != math.prod(dims) * dtype.itemsize:
        raise ModelFileError(f"{name} has shape {dims} of {dtype.name} but {size} bytes of data")
    return name, np.frombuffer(cursor.take(size, f"data of {name}"), dtype).reshape(dims)
