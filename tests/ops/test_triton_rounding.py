"""The Triton kernels with the roundings of a GPU that the interpreter lacks.

test_triton.py runs this file under the interpreter.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'rbfast[gpu]'")

import gpu_rounding
from column_cases import EPS32
from column_cases import make as make_columns
from covering import covering
from row_cases import TAUGHT, assert_close_to_fp64, extreme
from row_cases import make as make_rows
from triton_cases import INTERPRETED, OnDevice, assert_below, assert_within_budget

from rbfast.kernels import columns

BETAS = (0.0, 0.3, 1.0)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="test_everything_under_the_interpreter runs this"),
]


@pytest.mark.parametrize(
    "products, expected",
    (
        ([2.0**30, -(2.0**30), 1.0], 0.0),  # 1 is below the last of 26 bits
        ([2.0**25, -(2.0**25), 1.0], 1.0),
        ([1.0, 2.0**-24, 2.0**-24], 1 + 2.0**-23),  # kept for the sum
        ([1.0, 2.0**-24 + 2.0**-25], 1.0),  # truncated, not rounded
        ([-1.0, -(2.0**-24) - 2.0**-25], -1.0),
    ),
)
def test_tensor_core_sum_truncates(products, expected):
    a, zero = np.zeros((1, gpu_rounding.DEPTH)), np.zeros((1, 1))
    a[0, : len(products)] = products
    assert gpu_rounding.tensor_core_sum(a, np.ones((gpu_rounding.DEPTH, 1)), zero) == expected


def test_a_long_sum_of_products_is_rounded(monkeypatch):
    """Tensor cores truncate what they add: 792 times for these 2100 features, if they compute the whole sum."""
    gpu_rounding.add_as_tensor_cores(monkeypatch)
    g = torch.Generator().manual_seed(0)
    x, m = torch.randn(20, 2100, generator=g).half(), torch.randn(2100, 4, generator=g)
    error = (columns._project(x, m, 1.0).double() - x.double() @ m.double()).abs()
    assert_below("x m", error, EPS32 / 2 * (x.double().abs() @ m.double().abs()))


@pytest.mark.parametrize("name", ("column_grad", "column_linear_", "column_scatter_"))
@pytest.mark.parametrize("shape", ((1, 1, 1, 1, 1), (65, 90, 77, 33, 3)))
def test_columns_match_fp64_on_tensor_cores(name, shape, monkeypatch):
    gpu_rounding.add_as_tensor_cores(monkeypatch)
    assert_within_budget(name, make_columns(shape, torch.float16))


@covering(
    2, kind=TAUGHT, beta=(0.0, 0.3, 1.0), size=((1, 1), (5, 5), (5, 1), (37, 50)), gap=(3.0, 0.001), head=(False, True)
)
def test_rows_match_fp64_with_fused_products(kind, beta, size, gap, head, monkeypatch):
    gpu_rounding.fuse_products(monkeypatch)
    assert_close_to_fp64(make_rows(kind, *size, gap=gap, head=head, beta=beta), OnDevice)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gap", (3.0, 0.001))
def test_one_id_has_no_divergence_with_fused_products(beta, gap, monkeypatch):
    gpu_rounding.fuse_products(monkeypatch)
    assert_close_to_fp64(make_rows("dense", 1, 1, gap=gap, beta=beta), OnDevice)


@pytest.mark.parametrize("kind", TAUGHT)
def test_extreme_logits_with_fused_products(kind, monkeypatch):
    gpu_rounding.fuse_products(monkeypatch)
    assert_close_to_fp64(extreme(kind, 0.3), OnDevice)
