"""A torch.compile backend that lowers attention to MonarchAttention kernels."""

from monarch_compile.version import __version__

__all__ = ["__version__"]
