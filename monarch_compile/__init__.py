"""A torch.compile backend that lowers attention to MonarchAttention (arXiv 2505.18698) kernels.

torch.compile(model, backend="monarch")
print(monarch_compile.explain(model, *inputs))
"""

from monarch_compile.calibration import calibrate
from monarch_compile.config import MonarchConfig
from monarch_compile.errors import (
    CodegenError,
    ConfigError,
    InputError,
    IRError,
    LoweringError,
    MonarchError,
    PlanError,
)
from monarch_compile.explainer import explain
from monarch_compile.export import lower_exported
from monarch_compile.functional import monarch_attention
from monarch_compile.plan import Plan
from monarch_compile.report import Report
from monarch_compile.version import __version__

__all__ = [
    "CodegenError",
    "ConfigError",
    "IRError",
    "InputError",
    "LoweringError",
    "MonarchConfig",
    "MonarchError",
    "Plan",
    "PlanError",
    "Report",
    "__version__",
    "calibrate",
    "explain",
    "lower_exported",
    "monarch_attention",
]
