"""A compressed checkpoint into a model that is still dense."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from monarch_compile.errors import InputError
from monarch_compile.linear.compression.layers import block_module, find_layers
from monarch_compile.linear.modules import BlastLinear, BlockLinearModule, MonarchLinear


def load_compressed_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Give a dense model the block linears that a compressed one's `state_dict` has, and load it.

    Raises:
        InputError: the checkpoint has a block linear where the model has no linear that can be one.
        RuntimeError: keys or shapes differ otherwise (`torch.nn.Module.load_state_dict`).
    """
    suffix = ".first"
    names = [key.removesuffix(suffix) for key in state_dict if key.endswith(suffix)]
    wanted = {name: state_dict[f"{name}{suffix}"] for name in names if f"{name}.second" in state_dict}
    layers, kept = find_layers(model, lambda module, name: name in wanted)
    missing = {*wanted} - {layer.name for layer in layers} - {one.name for one in kept if one.code == "compressed"}
    if missing:
        raise InputError(f"the model has no linear that can become a block linear at {', '.join(sorted(missing))}")
    for layer in layers:
        first = wanted[layer.name]
        is_blast = f"{layer.name}.coupling" in state_dict
        made: type[BlockLinearModule] = BlastLinear if is_blast else MonarchLinear
        rank = first.shape[1] if is_blast else first.shape[0] * first.shape[2]
        layer.replace_by(block_module(layer, made, first.shape[0], rank))
    model.load_state_dict(dict(state_dict))
