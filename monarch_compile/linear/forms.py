"""The forms in which a block linear is computed: which exist for it, what each takes, and which is the fastest."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from monarch_compile.cost.devices import DEVICES, Device, installed
from monarch_compile.cost.prediction import Cost
from monarch_compile.linear.costs import between_bytes, cost, dense_cost, expansion_cost, spelled_cost, split_bytes
from monarch_compile.linear.ir import (
    DENSE,
    FORMS,
    FUSED,
    KERNEL_FORMS,
    MONARCH,
    PRODUCTS,
    SPLIT,
    STAGED,
    BlockLinear,
)

AUTO, KERNELS = "auto", "kernels"
"""What may be asked for beside a form: the fastest one, and the fastest one that runs on the emitted kernels."""
REQUESTS = (AUTO, KERNELS, *FORMS)

MEASURED = (STAGED,)
"""Forms with kernels that the automatic choice looks at: `STAGED` was the fastest of those that ran on an H100
(benchmarks/results/linear_h100.json), and `SPLIT` has not run on a GPU. The others run where they are asked for."""
FEW = 16
"""Up to so many tokens, time is that of reading the weight."""
USUAL_TOKENS = 1024
"""What an unknown number of tokens is taken for."""
SWITCH = 1.05
"""Another form, which is another compilation where tokens are symbolic, has to be so many times as fast."""
MOST_PROBED = 1 << 17
"""Beyond so many tokens, the fastest form is that of so many."""
MOST_RANK = 256
"""Of a block, for forms that keep in registers what is between the factors, for a tile of tokens."""
MOST_BLOCKS = 64
"""Of the input, for BLAST: a program of its coupling holds a tile of each."""
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (9, 0)
"""The kernels' schedules are made for the shared memory of such devices and later ones."""


@dataclass(frozen=True)
class Rates:
    """How fast a form runs. flops: share of the device's best rate of products. launches: kernels; of BLAST: `blast`.

    bytes: share of the rate of copies. cached: times that rate, for what is read again through the cache.
    """

    flops: float
    launches: int
    blast: int
    bytes: float = 1.0
    cached: float = 2.2


GPU: dict[str, Rates] = {
    SPLIT: Rates(flops=0.3, launches=2, blast=2),
    FUSED: Rates(flops=0.6, launches=1, blast=1),
    STAGED: Rates(flops=0.75, launches=2, blast=3, bytes=0.9),
    PRODUCTS: Rates(flops=0.9, launches=3, blast=5),
    DENSE: Rates(flops=0.9, launches=4, blast=5),
}
"""Those of `PRODUCTS` and `DENSE` are fitted to CUDA-graph replays on an H100 of 80 GB HBM3, in float16; those of
kernels were set before they ran, and are to be fitted to benchmarks/results/linear_h100.json."""
GRADIENTS = Rates(flops=0.6, launches=5, blast=8, bytes=0.9)
"""Of the kernels of gradients; a guess, too."""
SINGLE = 0.6
"""Rate of the kernels' products of float32 numbers, as a share of PyTorch's; a guess."""
OVERLAP = 1.6
"""Exponent with which the times of products and of memory combine, as in `Device.overlap`."""
TILE = 128
"""Tokens of a program, and columns of a product, where there are many."""
MULTIPROCESSORS = 132
IDLE = 0.7
"""Exponent of the time of fewer programs than multiprocessors, in their ratio."""


def why_not(ir: BlockLinear, form: str) -> str:
    """Why a form has no kernels for `ir`, whatever the device; "" where it has."""
    if ir.dtype not in KERNEL_DTYPES:
        return "kernels are for f16, bf16 and f32"
    if ir.kind != MONARCH and form in (FUSED, SPLIT):
        return f"form {form} is for Monarch alone"
    if form in (FUSED, SPLIT) and ir.rank > MOST_RANK:
        return f"form {form} is for blocks of rank at most {MOST_RANK}"
    if ir.kind != MONARCH and ir.in_blocks > MOST_BLOCKS:
        return f"kernels of BLAST are for at most {MOST_BLOCKS} input blocks"
    return ""


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether kernels run on such a device. Where there is none to ask, a CUDA device is taken for one."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def kernel_forms(ir: BlockLinear) -> tuple[str, ...]:
    """The forms that have kernels for `ir`, whatever the device."""
    return tuple(form for form in KERNEL_FORMS if not why_not(ir, form))


def seconds(ir: BlockLinear, form: str, device: Device) -> float:
    """Predicted seconds of a forward pass in a form, of a known number of tokens."""
    rates = GPU[form]
    found = _combined(_work(ir, form), rates, ir, device, _read_again(ir, form))
    if form in (FUSED, SPLIT):
        found *= max(1.0, MULTIPROCESSORS / _programs(ir, form)) ** IDLE
    launches = rates.launches if ir.kind == MONARCH else rates.blast
    return found if device.kind == "cpu" else found + (launches - 1) * device.monarch.launch_s


def gradient_seconds(ir: BlockLinear, on_kernels: bool, device: Device) -> float:
    """Predicted seconds of a backward pass: by kernels, or by batched products."""
    if not on_kernels or ir.kind != MONARCH or device.kind == "cpu":
        return 2 * seconds(ir, PRODUCTS, device)
    once = cost(ir)
    work = Cost(2.5 * once.flops, 3 * once.bytes + 2.5 * between_bytes(ir), 0)
    return _combined(work, GRADIENTS, ir, device) + (GRADIENTS.launches - 1) * device.monarch.launch_s


def dense_seconds(ir: BlockLinear, device: Device) -> float:
    """Predicted seconds of a dense layer, whose weight is there, of a known number of tokens."""
    return _combined(dense_cost(ir), GPU[DENSE], ir, device)


def _combined(work: Cost, rates: Rates, ir: BlockLinear, device: Device, again: float = 0.0) -> float:
    """Seconds without launches. again: bytes that are read through the cache beside those of `work`."""
    if device.kind == "cpu":
        return float(work.flops / device.exact.flops.of(ir.dtype) + work.bytes / device.exact.bytes_per_s)
    moved = device.ceiling.bytes_per_s if device.ceiling else device.monarch.bytes_per_s
    parts = (
        work.flops / _products_per_s(rates, ir, device),
        work.bytes / (rates.bytes * moved),
        again / (rates.cached * moved),
    )
    return float(math.fsum(part**OVERLAP for part in parts) ** (1 / OVERLAP))


def _products_per_s(rates: Rates, ir: BlockLinear, device: Device) -> float:
    """FLOP per second of products: in 16 bits a share of the device's best, else of what exact attention reaches."""
    usual = device.exact.flops.of(ir.dtype)
    if ir.dtype.itemsize == 2:
        return rates.flops * device.ceiling.half_flops if device.ceiling else usual
    return usual if rates.flops == GPU[PRODUCTS].flops else SINGLE * usual


def _work(ir: BlockLinear, form: str) -> Cost:
    if form == PRODUCTS:
        return spelled_cost(ir)
    once = cost(ir)
    if form == DENSE:
        made, product = expansion_cost(ir), dense_cost(ir)
        return Cost(made.flops + product.flops, made.bytes + product.bytes, 0)
    if form == STAGED:
        return replace(once, bytes=once.bytes + between_bytes(ir))
    if form == SPLIT:
        return replace(once, flops=once.flops * -(-int(ir.tokens) // FEW) * FEW / int(ir.tokens))
    return once


def _read_again(ir: BlockLinear, form: str) -> float:
    """Bytes that the programs of a form read from the cache, each for itself."""
    tokens, size = int(ir.tokens), ir.dtype.itemsize
    tiles = -(-tokens // TILE)
    if form == FUSED:
        across = ir.out_blocks * -(-(ir.out_features // ir.out_blocks) // (2 * TILE))
        return float(size * (tokens * ir.in_features * across + tiles * ir.parameters))
    if form == STAGED:
        return float(size * (tiles * ir.parameters + tokens * ir.inner))
    if form == SPLIT:
        return float(split_bytes(ir))
    return 0.0


def _programs(ir: BlockLinear, form: str) -> int:
    """Programs of the kernel that multiplies; of the split form, as many as input blocks share an output block."""
    width = ir.out_features // ir.out_blocks
    rows, parts = (TILE, 1) if form == FUSED else (FEW, ir.in_blocks)
    return -(-int(ir.tokens) // rows) * ir.out_blocks * parts * -(-width // (2 * TILE))


Ranges = tuple[tuple[float, str], ...]
"""Forms by the largest number of tokens that each is for, in rising order; the last one's is infinite."""


@functools.lru_cache(maxsize=1024)
def ranges(ir: BlockLinear, device: Device, kernels: bool, request: str = AUTO) -> Ranges:
    """The fastest form by the number of tokens, of `ir` with any; looked at for powers of two.

    request: `AUTO`, `KERNELS` (as long as there are any, else as `AUTO`), or the name of a form, which is then the only
    one, whether it can compute `ir` or not.
    """
    if request in FORMS:
        return ((math.inf, request),)
    own = tuple(form for form in kernel_forms(ir) if form in MEASURED) if kernels else ()
    choices = own if own and request == KERNELS else (*own, PRODUCTS)
    made: list[tuple[float, str]] = []
    tokens = 1
    while tokens <= MOST_PROBED:
        sized = replace(ir, tokens=tokens)
        best = min(choices, key=lambda form: seconds(sized, form, device))
        if made and seconds(sized, made[-1][1], device) <= SWITCH * seconds(sized, best, device):
            _, best = made.pop()
        made.append((tokens, best))
        tokens *= 2
    return (*made[:-1], (math.inf, made[-1][1]))


def usual(ir: BlockLinear) -> str:
    """The form with kernels that is predicted to be the fastest on an H100; a symbolic number of tokens is taken for
    `USUAL_TOKENS`."""
    tokens = ir.tokens if isinstance(ir.tokens, int) else USUAL_TOKENS
    return form_of(ranges(replace(ir, tokens="M"), DEVICES["h100"], True, KERNELS), tokens)


def form_of(found: Ranges, tokens: Any) -> str:
    """The form for a number of tokens; of a symbolic one, only the range that it is in is guarded on."""
    return next(form for most, form in found if most == math.inf or tokens <= most)


def in_words(found: Ranges) -> str:
    """Ranges as the report has them: "split up to 16 tokens, staged beyond"."""
    if len(found) == 1:
        return found[0][1]
    parts = [f"{form} up to {most:.0f} tokens" for most, form in found[:-1]]
    return f"{', '.join(parts)}, {found[-1][1]} beyond"


def resolved(ir: BlockLinear, tokens: Any, device: torch.device, request: str) -> str:
    """The form that the operator runs for `ir`, whose own number of tokens does not matter."""
    return form_of(_ranges_on(ir, device, request), tokens)


@functools.lru_cache(maxsize=1024)
def _ranges_on(ir: BlockLinear, device: torch.device, request: str) -> Ranges:
    return ranges(ir, installed(device), has_kernels(device), request)
