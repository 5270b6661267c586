"""An attention backend of diffusers: its own "native" one, inside a context."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch

from monarch_compile.errors import ConfigError


def add_backend(name: str, context: AbstractContextManager[Any]) -> None:
    """Make `name` a backend of diffusers that runs the native one, as it is for every argument, inside `context`.

    A name that was added before gets the new context. Code that torch.compile or torch.export traces runs the native
    backend alone.

    Raises:
        ConfigError: the name is one of diffusers' own, or not in lower case, as diffusers looks names up.
        ImportError: diffusers is not installed, or is older than its attention backends.
    """
    from diffusers.models import attention_dispatch

    names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
    if not name.isidentifier() or name != name.lower():
        raise ConfigError(f"the name of a diffusers backend must be an identifier in lower case; found {name!r}")
    if any(member.value == name and registry._backends.get(member) not in _ADDED for member in names):
        raise ConfigError(f"diffusers has a backend {name!r} of its own; choose another name, such as 'monarch'")
    native = registry._backends[names.NATIVE]

    @functools.wraps(native)  # diffusers hands over the arguments that the signature names
    def attention(**kwargs: Any) -> Any:
        if kwargs.get("_parallel_config") is not None:
            raise ValueError(f"diffusers' attention backend {name!r} does not support context parallelism")
        if torch.compiler.is_compiling():
            return native(**kwargs)
        with context:
            return native(**kwargs)

    _ADDED.add(attention)
    registry.register(_member(names, name), constraints=registry._constraints[names.NATIVE])(attention)


_ADDED: set[Any] = set()
"""What was registered here."""


def _member(names: Any, name: str) -> Any:
    """The member of diffusers' enum with this value, added where it is new: a backend is always chosen by a member."""
    if name in names._value2member_map_:
        return names(name)
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    setattr(names, member._name_, member)  # before it is a member, which cannot be assigned to
    names._member_map_[member._name_] = names._value2member_map_[name] = member
    names._member_names_.append(member._name_)
    return member
