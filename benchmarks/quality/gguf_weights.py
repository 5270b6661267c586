"""GGUF files, version 3: their metadata and their tensors, dequantized. Nothing in them is executed.

The layout of the file and of its quantized blocks is that of the GGUF specification and of ggml's block formats.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monarch_compile.errors import MonarchError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata -> their codes of `struct`."""
TEXT, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32


class GgufError(MonarchError):
    """A file is no GGUF file of version 3, or holds a type that is not read here."""


@dataclass(frozen=True, eq=False)
class Gguf:
    """metadata: numbers, strings and lists of them by key. A tensor is read when it is asked for."""

    metadata: Mapping[str, Any]
    places: Mapping[str, tuple[tuple[int, ...], int, int]]
    data: Bytes

    def tensor(self, name: str) -> Tensor:
        """In float32, of the shape that torch has for it: the fastest axis last.

        Raises:
            GgufError: the tensor has a type that is not read here.
        """
        shape, kind, start = self.places[name]
        if kind not in FORMATS:
            raise GgufError(f"tensor {name} has type {kind}; read are {sorted(FORMATS)}")
        values, size, decode = FORMATS[kind]
        count = int(np.prod(shape))
        raw = self.data[start : start + count // values * size].reshape(-1, size)
        return torch.from_numpy(np.array(decode(raw).reshape(shape)))  # writable


def read_gguf(path: Path) -> Gguf:
    """Read a file's header; its tensors are mapped.

    Raises:
        GgufError: it is no GGUF file of version 3.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    reader = _Reader(memoryview(data))
    magic, version = bytes(data[:4]), struct.unpack_from("<I", data, 4)[0]
    if magic != b"GGUF" or version != 3:
        raise GgufError(f"{path} is no GGUF file of version 3; found {magic!r}, version {version}")
    reader.at = 8
    num_tensors, num_keys = reader.scalar("Q"), reader.scalar("Q")
    metadata = {reader.text(): reader.value(reader.scalar("I")) for _ in range(num_keys)}
    places = {}
    for _ in range(num_tensors):
        name, rank = reader.text(), reader.scalar("I")
        shape = tuple(reader.scalar("Q") for _ in range(rank))[::-1]
        places[name] = (shape, reader.scalar("I"), reader.scalar("Q"))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    start = -(-reader.at // alignment) * alignment
    return Gguf(metadata, places, np.asarray(data[start:]))


class _Reader:
    """Reads little-endian values one after another; `at` is where the next one begins."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        found = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{code}")
        return found

    def text(self) -> str:
        size = self.scalar("Q")
        self.at += size
        return bytes(self.data[self.at - size : self.at]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in (TEXT, ARRAY):
            return [self.value(kind) for _ in range(count)]
        found = struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{SCALARS[kind]}")
        return list(found)


# ---- blocks of quantized numbers, (blocks, bytes of one) -> (blocks, numbers of one) ---------------------------------


def _half(raw: Bytes, start: int) -> Floats:
    """One float16 of each block, (blocks, 1)."""
    return np.ascontiguousarray(raw[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """The low halves of bytes, then the high ones, along the last axis."""
    return np.concatenate([raw & 15, raw >> 4], -1)


def _f32(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float32)


def _f16(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _q8_0(raw: Bytes) -> Floats:
    """32 numbers d * q: d float16, q int8."""
    return _half(raw, 0) * raw[:, 2:].view(np.int8)


def _q5_0(raw: Bytes) -> Floats:
    """32 numbers d * (q - 16): d float16, the fifth bits of all q, their low halves."""
    fifth = np.unpackbits(np.ascontiguousarray(raw[:, 2:6]), axis=-1, bitorder="little")
    return _half(raw, 0) * ((_nibbles(raw[:, 6:]) | (fifth << 4)).astype(np.float32) - 16)


def _q4_k(raw: Bytes) -> Floats:
    """8 x 32 numbers d * scale * q - least * offset; scales and offsets of 6 bits in 12 bytes."""
    packed = raw[:, 4:16]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], -1)
    offset = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], -1)
    numbers = _nibbles(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    scaled = (_half(raw, 0) * scale)[..., None] * numbers - (_half(raw, 2) * offset)[..., None]
    return np.asarray(scaled, np.float32)


def _q6_k(raw: Bytes) -> Floats:
    """16 x 16 numbers d * scale * (q - 32): low halves of q, then their two high bits, then int8 scales."""
    low = _nibbles(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pairs = raw[:, 128:192].reshape(-1, 2, 1, 32)
    high = (pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    numbers = (low | (high << 4)).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return _half(raw, 208)[..., None] * scales[..., None] * numbers


FORMATS: dict[int, tuple[int, int, Callable[[Bytes], Floats]]] = {
    0: (1, 4, _f32),
    1: (1, 2, _f16),
    6: (32, 22, _q5_0),
    8: (32, 34, _q8_0),
    12: (256, 144, _q4_k),
    14: (256, 210, _q6_k),
}
"""Types of tensors -> numbers in a block, bytes of a block, and how it is decoded."""
