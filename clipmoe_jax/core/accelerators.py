"""The vendors' figures for the accelerators that runs are planned for and measured against."""

from typing import NamedTuple

import jax


class Accelerator(NamedTuple):
    """One device.

    platform: as `sharding.platform`. peak_flops: per second, dense, bfloat16. memory: bytes of HBM. link:
    bytes per second to and from all other devices of its slice or node (half of it each way). domain: number
    of devices that share such links, in the largest slice or in a node. network: bytes per second to and from
    devices outside the domain: a device's share of its host's ports (half of it each way).
    """

    name: str
    platform: str
    peak_flops: float
    memory: float
    link: float
    domain: int
    network: float


# Sources. TPUs: the system architecture pages of cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x). A chip of
# TPU7x is two devices to JAX, each with half of its 2,307 TFLOP/s and 192 GiB: its two cores do not run as
# one (jax/_src/pallas/mosaic/tpu_info.py). GPUs: NVIDIA's data sheets of the SXM modules, without sparsity;
# link is NVLink. B200: 2.25 PFLOP/s, and an eighth of a DGX B200's 1,440 GB. GB200: a 72nd of a GB200 NVL72's
# 180 PFLOP/s and 13.4 TB. network, each way: on the same pages 6.4 Tbit/s for the 256 chips of a v5e pod, 50
# Gbit/s for a v5p chip, 25.6 Tbit/s for 256 chips of v6e, as much a chip for TPU7x; in NVIDIA's user guides
# InfiniBand of 200 (DGX A100) and 400 Gbit/s (DGX H100, H200 and B200, GB200 NVL72) for each GPU.
ACCELERATORS = {
    "v5e": Accelerator("TPU v5e", "tpu", 197e12, 16e9, 400e9, 256, 6.25e9),
    "v5p": Accelerator("TPU v5p", "tpu", 459e12, 95 * 2**30, 1200e9, 6144, 12.5e9),
    "v6e": Accelerator("TPU v6e", "tpu", 918e12, 32e9, 800e9, 256, 25e9),
    "tpu7x": Accelerator("TPU7x, half a chip", "tpu", 2307e12 / 2, 96 * 2**30, 600e9, 2 * 9216, 12.5e9),
    "a100": Accelerator("A100 80 GB", "cuda", 312e12, 80e9, 600e9, 8, 50e9),
    "h100": Accelerator("H100 80 GB", "hopper", 989e12, 80e9, 900e9, 8, 100e9),
    "h200": Accelerator("H200 141 GB", "hopper", 989e12, 141e9, 900e9, 8, 100e9),
    "b200": Accelerator("B200 180 GB", "cuda", 2250e12, 180e9, 1800e9, 8, 100e9),
    "gb200": Accelerator("GB200 186 GB", "cuda", 2500e12, 186e9, 1800e9, 72, 100e9),
}

# By JAX's names for them (`device_kind`).
DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
}


def of_kind(device_kind: str) -> Accelerator | None:
    """Returns the accelerator with this JAX device kind; None if its figures are not known here."""
    return ACCELERATORS[DEVICE_KINDS[device_kind]] if device_kind in DEVICE_KINDS else None


def flops_of_compilation() -> float:
    """Returns about how many FLOPs this process's device computes while a step compiles: 10 s at 100 GFLOP/s
    on a few CPU cores, 60 s at 170 TFLOP/s elsewhere."""
    return 1e12 if jax.default_backend() == "cpu" else 1e16


def take_none() -> None:
    """Leaves JAX the CPU alone, whatever JAX_PLATFORMS says: for commands that have no use for accelerators.

    They work where there are none, on a login node, and take no TPU from another process.
    """
    jax.config.update("jax_platforms", "cpu")
