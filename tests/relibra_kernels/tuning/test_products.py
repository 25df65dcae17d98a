"""GPUs by the names that torch and users give them."""

import pytest

from relibra_kernels.configs.products import product_named, product_of
from relibra_kernels.planner.errors import InputError

NAMES = [
    ("NVIDIA H100 80GB HBM3", "sm_90", "H100"),
    ("NVIDIA H200", "sm_90", "H200"),
    ("NVIDIA A100-SXM4-80GB", "sm_80", "A100"),
    ("NVIDIA GB200", "sm_100", "B200"),
    ("NVIDIA B300 SXM6 AC", "sm_103", "B200"),
    ("NVIDIA H200", "sm_103", "NVIDIA-H200"),
    ("AMD Instinct MI300X", "gfx942", "MI300X"),
    ("AMD Instinct MI325X", "gfx942", "MI300X"),
    ("NVIDIA GeForce RTX 4090", "sm_89", "NVIDIA-GeForce-RTX-4090"),
    ("NVIDIA L40S", "sm_89", "NVIDIA-L40S"),
    ("../../etc", "sm_90", "etc"),
    ("A100 imitation", "sm_90", "A100-imitation"),  # another architecture
    ("", "sm_90", "sm_90"),
]


@pytest.mark.parametrize(("name", "target", "product"), NAMES)
def test_products_by_the_name_of_the_gpu(name, target, product):
    assert product_of(name, target) == product


def test_unknown_products_are_refused_with_those_that_are_known():
    with pytest.raises(InputError, match=r"device is 'H900' .*must be one of A100, H100"):
        product_named("H900")
