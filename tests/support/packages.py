"""Build or run a package of AOTInductor in a process of its own.

python packages.py build|run linear|attention DEVICE FOLDER. What goes wrong below Python (a crash of the loader, for
one) is an exit code then, not the end of the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPTIONS = {"policy": "always", "strict": True, "block_size": 16}


class Attention(nn.Module):
    """Self-attention under a key-padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (4 * self.qkv(x)).view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind()
        visible = (torch.arange(x.shape[1], device=x.device) < x.shape[1] - 9)[None, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out(y.transpose(1, 2).flatten(2))


def build(kind: str, device: str, folder: Path) -> None:
    """Write the package, an input, and what the model and the lowered program make of it."""
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = (nn.Linear(64, 64) if kind == "linear" else Attention()).to(device, dtype).eval()
    x = torch.randn(2, 100, 64, device=device, dtype=dtype)
    program = torch.export.export(model, (x,))
    exact = program.module()(x)
    if kind == "attention":
        from monarch_compile import lower_exported

        program = lower_exported(program, OPTIONS)
    torch.save((x, program.module()(x), exact), folder / f"{kind}.pt")
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{kind}.pt2"))


def run(kind: str, device: str, folder: Path) -> None:
    """Load the package, without this library, and compare its output with what it must be."""
    sys.modules["monarch_compile"] = None  # type: ignore[assignment]  # an import of it would fail
    x, expected, exact = torch.load(folder / f"{kind}.pt", map_location=device)
    found = torch._inductor.aoti_load_package(str(folder / f"{kind}.pt2"))(x)
    tolerance = 5e-3 if x.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if kind == "attention" and torch.allclose(found, exact, rtol=0, atol=10 * tolerance):
        raise AssertionError("the package computes exact attention")


if __name__ == "__main__":
    step, kind, device, folder = sys.argv[1:]
    with torch.no_grad():
        {"build": build, "run": run}[step](kind, device, Path(folder))
