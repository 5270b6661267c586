"""Weights of an ONNX file, read without the package onnx: protobuf's wire format and four of ONNX's messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GRAPH = 7
NODE, INITIALIZER = 1, 5
NODE_INPUT, NODE_NAME, NODE_TYPE = 1, 3, 4
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA = 1, 2, 8, 9
FLOAT = 1
"""Fields of ModelProto, GraphProto, NodeProto and TensorProto; a value of TensorProto.DataType."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""

Value = int | memoryview


@dataclass(frozen=True)
class OnnxNode:
    """An operator of the graph."""

    name: str
    op: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class OnnxWeights:
    """float32 initialisers by name, and the operators in the graph's order."""

    tensors: dict[str, Tensor]
    nodes: tuple[OnnxNode, ...]

    def product(self, name: str) -> Tensor:
        """The weight that the MatMul called `name` multiplies with, (out, in) as in nn.Linear: ONNX has (in, out)."""
        node = next(node for node in self.nodes if node.name == name)
        return self.tensors[next(x for x in node.inputs if x in self.tensors)].T.contiguous()


def read_onnx(path: Path) -> OnnxWeights:
    """What the file at `path` holds; initialisers of other types than float32 are left out."""
    graph = next(value for field, value in _fields(memoryview(path.read_bytes())) if field == GRAPH)
    assert isinstance(graph, memoryview)
    nodes, tensors = [], {}
    for field, value in _fields(graph):
        if field == NODE and isinstance(value, memoryview):
            nodes.append(_node(value))
        elif field == INITIALIZER and isinstance(value, memoryview):
            tensors.update(_tensor(value))
    return OnnxWeights(tensors, tuple(nodes))


def _node(message: memoryview) -> OnnxNode:
    texts: dict[int, list[str]] = {NODE_INPUT: [], NODE_NAME: [""], NODE_TYPE: [""]}
    for field, value in _fields(message):
        if field in texts and isinstance(value, memoryview):
            texts[field].append(bytes(value).decode())
    return OnnxNode(texts[NODE_NAME][-1], texts[NODE_TYPE][-1], tuple(texts[NODE_INPUT]))


def _tensor(message: memoryview) -> dict[str, Tensor]:
    """{name: tensor}, nothing where it is no float32 tensor whose data is raw bytes."""
    shape: list[int] = []
    name, kind, data = "", 0, None
    for field, value in _fields(message):
        if field == DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif field == DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == TENSOR_NAME and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif field == RAW_DATA:
            data = value
    if kind != FLOAT or not isinstance(data, memoryview):
        return {}
    return {name: torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32)).reshape(shape)}


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """(field number, value) of each field of a message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire)
        if size is None:
            if wire != BYTES:
                raise ValueError(f"no protobuf message: wire type {wire}")
            size, at = _varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _packed(values: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(values):
        value, at = _varint(values, at)
        found.append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
