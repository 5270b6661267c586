"""How fast GPUs send to each other: links as data, and the time of an all-to-all on them."""

from __future__ import annotations

from dataclasses import dataclass

from monarch_compile.errors import InputError


@dataclass(frozen=True)
class Link:
    """bytes_per_s: what one GPU sends, and receives meanwhile. call_s: of a collective whatever its size. message_s: of
    each other rank that is sent to."""

    bytes_per_s: float
    call_s: float
    message_s: float


@dataclass(frozen=True)
class Fabric:
    """GPUs of one host by a link, and of different hosts by another. per_host: GPUs of a host."""

    name: str
    inside: Link
    between: Link
    per_host: int

    def all_to_all_s(self, sent: float, ranks: int) -> float:
        """Seconds of an all-to-all in which each rank has `sent` bytes, as many for each rank, itself among them."""
        if ranks <= 1:
            return 0.0
        near = min(ranks, self.per_host) - 1
        far = ranks - 1 - near
        inside_s = near * (sent / ranks / self.inside.bytes_per_s + self.inside.message_s)
        between_s = far * (sent / ranks / self.between.bytes_per_s + self.between.message_s)
        call_s = self.between.call_s if far else self.inside.call_s
        return call_s + max(inside_s, between_s)

    def send_s(self, sent: float, ranks: int) -> float:
        """Seconds in which each rank sends `sent` bytes to a neighbour, and some of them to another host."""
        if ranks <= 1:
            return 0.0
        link = self.between if ranks > self.per_host else self.inside
        return link.call_s + link.message_s + sent / link.bytes_per_s


# Inside an NVLink host fitted to two H200 (benchmarks/results/scale_graphs_h200.json); others are rates of data sheets,
# less what NCCL usually leaves of them.
FABRICS: dict[str, Fabric] = {
    "nvlink": Fabric("nvlink", Link(220e9, 45e-6, 1e-6), Link(42e9, 45e-6, 3e-6), per_host=8),
    "pcie": Fabric("pcie", Link(22e9, 30e-6, 2e-6), Link(22e9, 50e-6, 3e-6), per_host=8),
    "cpu": Fabric("cpu", Link(1e9, 300e-6, 100e-6), Link(1e9, 300e-6, 100e-6), per_host=8),
}
"""NVLink 4 inside a host and one 400 Gb/s adapter a GPU between hosts; PCIe 4; gloo."""


def fabric_of(device_type: str, name: str | None = None) -> Fabric:
    """The fabric of a name; by default "nvlink" for CUDA devices and "cpu" for others.

    Raises:
        InputError: there is none of this name.
    """
    found = name or ("nvlink" if device_type == "cuda" else "cpu")
    if found not in FABRICS:
        raise InputError(f"fabric must be one of {', '.join(FABRICS)}; found {found!r}")
    return FABRICS[found]
