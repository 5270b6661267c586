"""Every error that monarch_compile raises on purpose."""

from __future__ import annotations


class MonarchError(Exception):
    """Base of all errors raised by monarch_compile."""


class ConfigError(MonarchError, ValueError):
    """An option is unknown or has a value that is not allowed."""


class InputError(MonarchError, ValueError):
    """Tensors given to a public function do not fit together."""


class IRError(MonarchError, ValueError):
    """An IR value breaks one of its rules. The message carries the printed IR."""


class LoweringError(MonarchError, RuntimeError):
    """Raised in strict mode where the default would keep a site exact or fall back."""


class PlanError(MonarchError, ValueError):
    """A plan cannot be read, or does not fit the model that it is applied to."""


class DistillationError(MonarchError, RuntimeError):
    """A layer cannot learn: its loss is not finite. The message names it; the model is as it was."""


class CodegenError(MonarchError, RuntimeError):
    """No kernel can be emitted for an IR and a schedule."""
