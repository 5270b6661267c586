"""A torch.compile backend that lowers attention to MonarchAttention (arXiv 2505.18698), and long convolutions.

    compiled = torch.compile(model, backend="monarch")
    print(monarch_compile.explain(model, *inputs))

`compress_` makes block low-rank layers of a trained model's linear layers.

Options of the backend: `MonarchConfig`. Without torch.compile: `monarch_compile.integrations`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from monarch_compile.attention.functional import monarch_attention
from monarch_compile.config import MonarchConfig
from monarch_compile.errors import (
    CodegenError,
    ConfigError,
    DistillationError,
    InputError,
    IRError,
    LoweringError,
    MonarchError,
    PlanError,
)
from monarch_compile.version import __version__

if TYPE_CHECKING:
    from monarch_compile.calibration.plan import Plan
    from monarch_compile.calibration.search import calibrate
    from monarch_compile.distillation.distill import distill
    from monarch_compile.distillation.report import DistillReport
    from monarch_compile.export import lower_exported
    from monarch_compile.linear.compression.compress import compress_
    from monarch_compile.linear.compression.configs import BlastLinearConfig, MonarchLinearConfig
    from monarch_compile.linear.compression.refine import refine_
    from monarch_compile.linear.compression.report import CompressionReport, RefineReport
    from monarch_compile.report.explainer import explain
    from monarch_compile.report.report import Report

__all__ = [
    "BlastLinearConfig",
    "CodegenError",
    "CompressionReport",
    "ConfigError",
    "DistillReport",
    "DistillationError",
    "IRError",
    "InputError",
    "LoweringError",
    "MonarchConfig",
    "MonarchError",
    "MonarchLinearConfig",
    "Plan",
    "PlanError",
    "RefineReport",
    "Report",
    "__version__",
    "calibrate",
    "compress_",
    "distill",
    "explain",
    "lower_exported",
    "monarch_attention",
    "refine_",
]

_LATER = {
    "BlastLinearConfig": "linear.compression.configs",
    "CompressionReport": "linear.compression.report",
    "DistillReport": "distillation.report",
    "MonarchLinearConfig": "linear.compression.configs",
    "Plan": "calibration.plan",
    "Report": "report.report",
    "calibrate": "calibration.search",
    "compress_": "linear.compression.compress",
    "distill": "distillation.distill",
    "explain": "report.explainer",
    "lower_exported": "export",
    "RefineReport": "linear.compression.report",
    "refine_": "linear.compression.refine",
}
"""Names that a compilation does without, and the modules they come from when they are asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
