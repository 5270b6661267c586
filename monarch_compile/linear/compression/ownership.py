"""Which block linears of a model can be refined by themselves, and why the others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator

from torch import nn

from monarch_compile.distillation.memory import sharers
from monarch_compile.linear.compression.layers import Kept
from monarch_compile.linear.compression.parts import Part, parts_of
from monarch_compile.linear.modules import BlockLinearModule


def refinable(model: nn.Module, teacher: nn.Module, called: Container[str]) -> tuple[list[Part], list[Kept]]:
    """The parts of a model with the block linears that nothing else depends on, and the block linears that stay.

    called: paths of the modules that run.
    """
    both = nn.ModuleList([model, teacher])
    owners = Counter(id(p) for module in both.modules() for p in module._parameters.values() if p is not None)
    sharing = sharers(both)
    tied = {id(p) for name, p in both.named_parameters() if name in sharing or owners[id(p)] > 1}
    places = list(_places(model))
    kept = [
        Kept(name, "unreached", "the first call does not run it")
        for name, module in model.named_modules()
        if isinstance(module, BlockLinearModule) and name not in called
    ]
    parts = []
    for part in parts_of(model, called):
        own, layers = model.get_submodule(part.name), list[str]()
        for layer in part.layers:
            name, module = f"{part.name}.{layer}".rstrip("."), own.get_submodule(layer)
            if any(module is found and own not in above for found, above in places):
                kept.append(Kept(name, "shared", f"the module stands outside of {part.name}, too"))
            elif any(id(p) in tied for p in module.parameters()):
                kept.append(Kept(name, "tied", "a parameter shares memory with another one, or with the teacher's"))
            else:
                layers.append(layer)
        if layers:
            parts.append(Part(part.name, tuple(layers)))
    return parts, kept


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every place of a block linear in a model: the module, and the modules on the path to it, itself among them."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BlockLinearModule):
            names = path.split(".")
            yield module, [model.get_submodule(".".join(names[: end + 1])) for end in range(len(names))]
