"""The head's products on a GPU that widen their operands, which is plain torch: run on the CPU, against fp64."""

import pytest
import torch
from head_products import DTYPES, SHAPES, assert_product, draw, head_backward

from rbfast.ops import head_gemm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("shape", (*SHAPES, (0, 5, 7), (3, 0, 7), (3, 5, 0)))
def test_widened_products_match_fp64(monkeypatch, shape, other, dtype):
    """dtype: of the head or the hidden states. other: of the other operand."""
    if dtype == other != torch.float32:
        pytest.skip("this product needs a CUDA torch: tests/ops/test_cuda.py")
    T, H, V = shape
    monkeypatch.setattr(head_gemm, "SLICE_BYTES", 4 * H * 48)  # of 48 rows: several slices, the last one cut
    hidden, weight, dz = draw(T, H, dtype=other), draw(V, H, dtype=dtype, seed=1), draw(T, V, dtype=other, seed=2)
    logits = torch.full((T, V), torch.nan)
    head_gemm.head_forward_(logits, hidden, weight)
    assert_product(logits, hidden, weight.T)
    assert_product(head_backward(dz, weight, ops=head_gemm), dz, weight)
    thresholds = torch.full((T,), 0.5)
    assert_product(head_backward(dz, weight, thresholds, head_gemm), dz.masked_fill(dz.abs() < 0.5, 0.0), weight)
    start, x = draw(V, H, dtype=torch.float32, seed=3), draw(T, H, dtype=dtype)
    dW = start.clone()
    head_gemm.head_grad_(dW, dz, x)
    assert_product(dW, dz.T, x, start)


def test_one_slice_is_widened_at_a_time(monkeypatch):
    widened = []
    wide = head_gemm.wide
    monkeypatch.setattr(head_gemm, "wide", lambda x: widened.append(x.numel()) or wide(x))
    monkeypatch.setattr(head_gemm, "SLICE_BYTES", 4 * 64 * 48)
    hidden, weight, dz = torch.randn(3, 64), draw(1001, 64, dtype=torch.float16), torch.randn(3, 1001)
    head_gemm.head_forward_(torch.empty(3, 1001), hidden, weight)
    head_backward(dz, weight, ops=head_gemm)
    head_gemm.head_grad_(torch.zeros(1001, 64), dz, hidden.half())
    assert max(widened) == 48 * 64
