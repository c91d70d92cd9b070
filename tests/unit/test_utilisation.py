"""How much of a device's arithmetic is used."""

from __future__ import annotations

import pytest

from model.config import SIZES
from model.flops import train_flops
from train.report.utilisation import peak_tflops, utilisation


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA A1000", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_name(name: str, tflops: float | None):
    assert peak_tflops(name) == tflops


def test_utilisation_is_of_all_devices_and_only_where_the_peak_is_known():
    model = SIZES["vit_l_16"]
    images_per_s = 8 * 500e12 / train_flops(model)
    found = utilisation(
        train_flops(model), images_per_s=images_per_s, world_size=8, peak=1000.0
    )
    assert found == {
        "tflops_per_device": pytest.approx(500.0),
        "mfu": pytest.approx(0.5),
    }
    assert (
        utilisation(
            train_flops(model), images_per_s=images_per_s, world_size=8, peak=None
        )["mfu"]
        is None
    )
