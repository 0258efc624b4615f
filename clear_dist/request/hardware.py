"""Kinds of GPUs and links. A GPU's rates are those of NVIDIA's data sheets, without sparsity; programs reach less.

Memory is what programs get, a little less than on the data sheet. A link's rate is per GPU and direction, for large
messages: about 85 % of the nominal rate.
"""

from dataclasses import dataclass

GB, GIB, TFLOPS = 1e9, 2**30, 1e12
BFLOAT16_CAPABILITY, FLOAT8_CAPABILITY = 8.0, 8.9
"""Compute capabilities from which GPUs multiply in these."""


@dataclass(frozen=True, kw_only=True)
class Link:
    name: str
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU, or one found here: usable memory in bytes, bandwidth in bytes per second, its usual link."""

    name: str
    memory: int
    flops: float
    """16-bit matrix products with float32 sums, in operations per second; 0: unknown."""
    bandwidth: float
    link: str
    float8: bool = True
    """Whether it multiplies in float8, at twice the rate."""


def _gpu(name: str, gib: float, tflops: float, gb_per_second: float, link: str, float8: bool = True) -> Gpu:
    return Gpu(
        name=name,
        memory=round(gib * GIB),
        flops=tflops * TFLOPS,
        bandwidth=gb_per_second * GB,
        link=link,
        float8=float8,
    )


GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        _gpu("H100", 79.1, 989, 3350, "nvlink"),
        _gpu("H200", 139.8, 989, 4800, "nvlink"),
        _gpu("B200", 178.3, 2250, 7700, "nvlink5"),
        _gpu("A100-80", 79.2, 312, 2039, "nvlink3", float8=False),
        _gpu("A100-40", 39.4, 312, 1555, "nvlink3", float8=False),
        _gpu("L40S", 44.4, 362, 864, "pcie4"),
        _gpu("RTX6000Ada", 47.4, 364, 960, "pcie4"),
        _gpu("RTX5090", 31.3, 209.5, 1792, "pcie5"),
        _gpu("RTX4090", 23.6, 165.2, 1008, "pcie4"),
        _gpu("RTX3090", 23.6, 71, 936, "pcie4", float8=False),
    )
}
"""Kinds by the word for `--gpu`; the first is planned for where none is named or found."""

LINKS: dict[str, Link] = {
    name: Link(name=name, bytes_per_second=gb_per_second * GB)
    for name, gb_per_second in {
        "nvlink": 380,
        "nvlink3": 250,
        "nvlink5": 760,
        "pcie5": 50,
        "pcie4": 25,
        "pcie3": 12,
        "400gbe": 42,
        "200gbe": 21,
        "100gbe": 10.5,
        "25gbe": 2.6,
        "10gbe": 1.05,
        "1gbe": 0.105,
        "memory": 2,
    }.items()
}
"""Kinds by the word for `--link`. nvlink: Hopper's; 3: Ampere's; 5: Blackwell's; memory: ranks on one machine's CPU."""


def named_like(device: str) -> Gpu | None:
    """Kind of a GPU by its driver's name for it, such as `NVIDIA GeForce RTX 4090`; None: not in the table."""
    squeezed = "".join(device.lower().replace("generation", "").split()).replace("-", "")
    found = [gpu for word, gpu in GPUS.items() if word.split("-")[0].replace("-", "") in squeezed]
    sizes = [gpu for gpu in found if "-" in gpu.name and gpu.name.split("-")[1] + "gb" in squeezed]
    return next(iter(sizes or found), None)


def unknown(name: str, memory: int) -> Gpu:
    """A GPU known by its memory only, for which no time is estimated."""
    return Gpu(name=name, memory=memory, flops=0.0, bandwidth=0.0, link="pcie4")
