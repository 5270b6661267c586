"""Which layers of a model can be compressed, and why the others stay."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from monarch_compile.linear.modules import BlockLinearModule

FilterFn = Callable[[nn.Module, str], bool]
"""Of a layer and its path in the model: whether to compress it."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
READS_WEIGHTS: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that read the weights of the linears in them, beside calling these."""


@dataclass(frozen=True)
class Layer:
    """A dense linear that can be compressed: `getattr(parent, attribute)`, of type Linear or Conv1D."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features); no copy."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight if isinstance(self.module, nn.Linear) else weight.mT

    @property
    def bias(self) -> Tensor | None:
        """(out_features,)."""
        bias: Any = self.module.bias
        return None if bias is None else bias.detach()

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return self.weight.numel()

    def replace_by(self, made: BlockLinearModule) -> None:
        """Put a block linear in the layer's place, at once."""
        setattr(self.parent, self.attribute, made)


@dataclass(frozen=True)
class Kept:
    """A linear layer that stays as it is. code: short and stable; reason: one sentence."""

    name: str
    code: str
    reason: str


def find_layers(model: nn.Module, filter_fn: FilterFn | None) -> tuple[list[Layer], list[Kept]]:
    """The layers to compress, in the model's order, and those that stay. Layers that `filter_fn` leaves out are in
    neither list."""
    places = list(_places(model))
    uses = Counter(id(module) for _, _, _, module in places)
    owners = _owners(model)
    layers: list[Layer] = []
    kept: list[Kept] = []
    for name, parent, attribute, module in places:
        if isinstance(module, BlockLinearModule):
            kept.append(Kept(name, "compressed", "it is a block linear already"))
            continue
        if not is_linear(module) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        refusal = _refusal(parent, module, uses, owners)
        if refusal is None:
            layers.append(Layer(name, parent, attribute, module))
        else:
            kept.append(Kept(name, *refusal))
    return layers, kept


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place of a module in another: its path, the parent, the attribute and the module."""
    for path, parent in model.named_modules():
        for attribute, module in parent._modules.items():
            if module is not None:
                yield f"{path}.{attribute}".lstrip("."), parent, attribute, module


def conv1d_type() -> type[nn.Module] | None:
    """GPT-2's linear, whose weight is (in_features, out_features); None where transformers is not in use."""
    found: type[nn.Module] | None = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return found


def is_linear(module: Any) -> TypeGuard[nn.Module]:
    """Whether a module is a linear layer, or of a class made of one."""
    own = conv1d_type()
    return isinstance(module, nn.Linear) or (own is not None and isinstance(module, own))


def _refusal(
    parent: nn.Module, module: nn.Module, uses: Counter[int], owners: dict[int, set[tuple[int, str]]]
) -> tuple[str, str] | None:
    weight: Any = module.weight
    if type(module) not in (nn.Linear, conv1d_type()):
        return "subclass", f"it is a {type(module).__name__}, whose forward or weight may be its own"
    if not isinstance(weight, Tensor) or type(weight) not in (nn.Parameter, Tensor):
        return "tensor_subclass", f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOATS:
        return "quantised", f"its weight is of {weight.dtype}"
    if weight.device.type == "meta":
        return "meta", "its weight has no values yet"
    if uses[id(module)] > 1:
        return "shared", f"the module stands at {uses[id(module)]} places of the model"
    if len(owners[_memory(weight)]) > 1:
        return "tied", "its weight shares memory with another parameter or buffer"
    if isinstance(parent, READS_WEIGHTS):
        return "read_by_parent", f"{type(parent).__name__} reads its weight"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "hooks", "it has hooks, which a new module would not have"
    if not weight.numel():
        return "empty", "its weight is empty"
    if not bool(weight.isfinite().all()):
        return "not_finite", "its weight has an infinity or NaN"
    return None


def _owners(model: nn.Module) -> dict[int, set[tuple[int, str]]]:
    """Who owns each piece of memory: modules with the names of their parameters and buffers."""
    found: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type != "meta":
                found.setdefault(_memory(tensor), set()).add((id(module), name))
    return found


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass that holds no memory of its own
        return id(tensor)


def block_module(layer: Layer, made: type[BlockLinearModule], num_blocks: int, rank: int) -> BlockLinearModule:
    """An empty block linear for a layer: of its sizes, dtype, device, mode, and as trainable."""
    weight = layer.weight
    out_features, in_features = weight.shape
    module: BlockLinearModule = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        made,
        in_features,
        out_features,
        num_blocks,
        rank,
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    module.train(layer.module.training)
    trains = layer.module.weight.requires_grad
    for parameter in module.parameters():
        parameter.requires_grad_(bool(trains))
    if layer.bias is not None:
        bias: Any = layer.module.bias
        module.bias = bias
    return module
