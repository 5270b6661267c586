"""How far a kernel may be from the float64 reference, from the unit roundoff of its dtype.

With u the unit roundoff (half a step of the mantissa), four quantities are rounded to the dtype on the way: the weights
of both stages, the summaries a and y, and the output. Each is good to u; an error of u in `a` moves a logit of standard
normal inputs by about u * |q| * |a|, a few u. Errors of single elements average out, so that the Frobenius norm stays
within about 4 u an iteration, and the bound is twice that. The largest single error, next to the largest element, is
not an average: its bound is 8 times wider. Iterations feed rounded queries to the next, hence the factor.
In float32 sums are not rounded less than their terms: order of summation and tf32x3 products cost a few more u.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
FROBENIUS = {torch.float16: 8.0, torch.bfloat16: 8.0, torch.float32: 32.0}
MAX_OVER_FROBENIUS = 8.0


def assert_close(found: Tensor, expected: Tensor, num_iters: int = 1) -> None:
    """Assert that `found` is finite, and near `expected` (float64) in norm and everywhere, as its dtype allows."""
    assert found.isfinite().all(), f"{int((~found.isfinite()).sum())} of {found.numel()} elements are not finite"
    bound = num_iters * FROBENIUS[found.dtype] * UNIT_ROUNDOFF[found.dtype]
    difference = found.double() - expected
    norm = (difference.norm() / expected.norm().clamp(min=1e-30)).item()
    largest = (difference.abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    assert norm <= bound, f"relative Frobenius error {norm:.2e} > {bound:.2e}"
    assert largest <= MAX_OVER_FROBENIUS * bound, f"relative max error {largest:.2e} > {MAX_OVER_FROBENIUS * bound:.2e}"
