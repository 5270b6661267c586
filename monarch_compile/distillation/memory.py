"""Which parameters of a model lie in the memory of another of its tensors: a change of one changes the other, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


def sharers(model: nn.Module) -> dict[str, str]:
    """For every parameter whose memory meets that of another tensor of the model, by name, the name of one that does.

    Parameters that are one object, as tied weights are, have one memory and do not count. Memory is compared from the
    first to the last element: of two tensors that take turns in it, each counts.
    """
    pieces = sorted(_pieces(model))
    found: dict[str, str] = {}
    device, reach, owner = "", 0, ""
    for where, start, stop, name in pieces:
        if where != device:
            device, reach = where, 0
        if start < reach:
            found.setdefault(name, owner)
            found.setdefault(owner, name)
        if stop > reach:
            reach, owner = stop, name
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def _pieces(model: nn.Module) -> Iterator[tuple[str, int, int, str]]:
    """Of every tensor of a model, each once: its device, where its memory starts and stops, and its name."""
    seen: set[int] = set()
    for name, tensor in _named_tensors(model):
        has_memory = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
        if id(tensor) in seen or not has_memory or tensor.numel() == 0 or tensor.is_meta:
            continue
        seen.add(id(tensor))
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        yield str(tensor.device), start, start + (last + 1) * tensor.element_size(), name


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, by the names of `named_parameters`, buffers, and tensors that are plain attributes of modules."""
    for path, module in model.named_modules():
        held: Iterable[Mapping[str, object]] = (module._parameters, module._buffers, vars(module))
        for name, value in ((name, value) for values in held for name, value in values.items()):
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value
