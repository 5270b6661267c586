"""The operator that carries Monarch attention through torch.compile."""

from __future__ import annotations

from torch import Tensor
from torch.library import triton_op

from monarch_compile.reference import reference


@triton_op("monarch_compile::attention", mutates_args={})
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    block_size: int,
    num_iters: int,
    init: str,
    pad: str,
) -> Tensor:
    """Monarch attention; the meaning is `reference`, kernels run on CUDA."""
    if q.device.type != "cuda":
        return reference(
            q, k, v, key_mask, block_size=block_size, scale=scale, num_iters=num_iters, init=init, pad=pad
        )
    from monarch_compile.codegen.launch import launch

    return launch(
        q, k, v, key_mask, scale=scale, block_size=block_size, num_iters=num_iters, init=init, pad=pad
    )
