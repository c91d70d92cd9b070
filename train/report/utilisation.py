"""How much of a device's arithmetic a run uses: model FLOP/s over the peak of its data sheet (MFU).
No torch."""

from __future__ import annotations

from collections.abc import Mapping

DENSE_TFLOPS: Mapping[str, float] = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 311.8,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense 16-bit tensor throughput in 10^12 operations a second, by a part of the device's name.
Source: data sheets (figures with sparsity halved)."""


def peak_tflops(device_name: str) -> float | None:
    """Look a device up; None if it is not in the table.

    Args:
        device_name: as CUDA reports it.
    """
    # Whole words, the longest names first: "A10" is part of "A100", "H100" of "H100 PCIe".
    words = device_name.replace("-", " ").split()
    for name in sorted(DENSE_TFLOPS, key=len, reverse=True):
        wanted = name.split()
        if all(word in words for word in wanted):
            return DENSE_TFLOPS[name]
    return None


def model_tflops(flops_per_image: int, *, images_per_s: float) -> float:
    """Turn images into arithmetic: what the model needs, without what checkpointing computes again.

    Args:
        flops_per_image: operations of one training step per image.
        images_per_s: trained, forward and backward.

    Returns:
        10^12 operations a second.
    """
    return flops_per_image * images_per_s / 1e12


def utilisation(
    flops_per_image: int, *, images_per_s: float, world_size: int, peak: float | None
) -> dict[str, float | None]:
    """Give what a line of metrics says of arithmetic.

    Args:
        flops_per_image: operations of one training step per image.
        images_per_s: over all ranks.
        world_size: devices.
        peak: of one device, in 10^12 operations a second; None if it is not known.

    Returns:
        tflops_per_device, and mfu from 0 to 1, None without a peak.
    """
    per_device = model_tflops(flops_per_image, images_per_s=images_per_s) / world_size
    return {"tflops_per_device": per_device, "mfu": per_device / peak if peak else None}
