"""The head's products against fp64 on every instruction set, and the thresholds of its filter."""

import pytest
import torch
from head_products import DTYPES, SHAPES, assert_product, draw, head_backward
from torch import Tensor

from rbfast import ops
from rbfast.ops import reference

pytestmark = pytest.mark.usefixtures("isa")


def head_forward(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = torch.full((len(hidden), len(weight)), torch.nan)
    ops.head_forward_(logits, hidden, weight)
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_match_fp64(shape, dtype):
    T, H, V = shape
    hidden, weight, dz = draw(T, H, dtype=dtype), draw(V, H, dtype=dtype, seed=1), draw(T, V, dtype=dtype, seed=2)
    assert_product(head_forward(hidden, weight), hidden, weight.T)
    assert_product(head_backward(dz, weight), dz, weight)
    start = draw(V, H, dtype=torch.float32, seed=3)
    dW = start.clone()
    ops.head_grad_(dW, dz, hidden)
    assert_product(dW, dz.T, hidden, start)


@pytest.mark.parametrize("dz_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_may_differ_in_dtype(dtype, dz_dtype):
    hidden, weight, dz = draw(9, 70, dtype=dtype), draw(60, 70, dtype=dtype, seed=1), draw(9, 60, dtype=dz_dtype)
    assert_product(head_backward(dz, weight), dz, weight)
    dW = torch.zeros(60, 70)
    ops.head_grad_(dW, dz, hidden)
    assert_product(dW, dz.T, hidden)


def test_strided_operands(isa):
    wide = draw(9, 240, dtype=torch.bfloat16)
    transposed, weight = draw(70, 9, dtype=torch.bfloat16).T, draw(120, 70, dtype=torch.bfloat16, seed=1)
    assert_product(head_backward(wide[:, :120], weight), wide[:, :120], weight)
    thresholds = torch.linspace(0.1, 2, 9)
    assert_product(
        head_backward(wide[:, :120], weight, thresholds), reference.zero_below(wide[:, :120], thresholds), weight
    )
    assert_product(head_forward(transposed, weight), transposed, weight.T)
    assert_product(
        head_forward(draw(9, 120, dtype=torch.bfloat16), weight.T), draw(9, 120, dtype=torch.bfloat16), weight
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_may_have_gaps_between_rows(shape):
    """The same bits, and nothing between the rows is touched."""
    T, H, V = shape
    hidden, weight = draw(T, H, dtype=torch.bfloat16), draw(V, H, dtype=torch.bfloat16, seed=1)
    room = torch.full((T, V + 3), 7.0)
    ops.head_forward_(room[:, :V], hidden, weight)
    assert torch.equal(room[:, :V], head_forward(hidden, weight))
    assert bool((room[:, V:] == 7).all())


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty(shape):
    T, H, V = shape
    hidden, weight, dz = torch.randn(T, H), torch.randn(V, H), torch.randn(T, V)
    assert torch.equal(head_forward(hidden, weight), torch.zeros(T, V))
    assert torch.equal(head_backward(dz, weight), torch.zeros(T, H))
    dW = torch.ones(V, H)
    ops.head_grad_(dW, dz, hidden)
    assert torch.equal(dW, torch.ones(V, H))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_rows_threads_or_chunks(dtype, threads):
    hidden, weight = draw(100, 577, dtype=dtype), draw(1001, 577, dtype=dtype, seed=1)
    dz = draw(100, 1001, dtype=dtype, seed=2)
    threads(1)
    logits, gradient, dW = head_forward(hidden, weight), head_backward(dz, weight), torch.zeros(1001, 577)
    ops.head_grad_(dW, dz, hidden)
    for count, chunk in ((1, 1), (2, 7), (3, 64), (5, 100)):
        threads(count)
        step = 3 if chunk == 1 else chunk  # single rows: one for every position in a block of 32
        for part in (slice(i, i + chunk) for i in range(0, 100, step)):
            assert torch.equal(head_forward(hidden[part], weight), logits[part])
            assert torch.equal(head_backward(dz[part], weight), gradient[part])
    for chunk in (32, 64, 96):  # multiples of the rows that are summed at once
        again = torch.zeros(1001, 577)
        for i in range(0, 100, chunk):
            ops.head_grad_(again, dz[i : i + chunk], hidden[i : i + chunk])
        assert torch.equal(again, dW)


def peaked(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values of many sizes: a few make up most of a row."""
    sizes = (4 * draw(*shape, dtype=torch.float32, seed=3)).exp()
    return (draw(*shape, dtype=torch.float32, seed=2) * sizes).clamp(-6e4, 6e4).to(dtype)


def sums_below(dz: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """By row, in fp64: the magnitudes below the threshold, and all of them."""
    size = dz.double().abs()
    return size.masked_fill(size >= thresholds.double().unsqueeze(1), 0.0).sum(1), size.sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (20, 70, 4999)])
def test_filtered_products_match_fp64(shape, dtype):
    T, H, V = shape
    dz, weight = draw(T, V, dtype=dtype, seed=2), draw(V, H, dtype=dtype, seed=1)
    for thresholds in (torch.zeros(T), torch.linspace(0.01, 3, T), torch.full((T,), 100.0)):
        kept = reference.zero_below(dz, thresholds)
        assert_product(head_backward(dz, weight, thresholds), kept, weight)
    assert_product(
        head_backward(dz, weight.float(), thresholds / 90), reference.zero_below(dz, thresholds / 90), weight
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_filtered_rows_do_not_depend_on_others(dtype, threads):
    dz, weight = peaked(100, 2999, dtype=dtype), draw(2999, 100, dtype=dtype, seed=1)
    thresholds = ops.row_thresholds(dz, 0.01)[0]
    threads(1)
    gradient = head_backward(dz, weight, thresholds)
    for count, chunk in ((1, 1), (2, 7), (3, 64), (64, 100)):
        threads(count)
        parts = [slice(i, i + chunk) for i in range(0, 100, chunk)]
        assert torch.equal(torch.cat([head_backward(dz[p], weight, thresholds[p]) for p in parts]), gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.004, 0.02, 0.3])
def test_sum_below_a_threshold_is_bounded(share, dtype):
    for dz in (peaked(9, 4999, dtype=dtype), draw(9, 33, dtype=dtype), draw(3, 1, dtype=dtype)):
        thresholds, left_out = ops.row_thresholds(dz, share)
        below, total = sums_below(dz, thresholds)
        assert bool((below <= left_out).all()) and bool((left_out <= share * total * (1 + 1e-6)).all())
        expected = reference.row_thresholds(dz, share)[0]
        # A sum very close to the limit may fall on either side of it. Then the threshold is the next one.
        ratio = thresholds / expected
        assert bool(((ratio - 1).abs() < 1e-5).float().mean() >= 0.8) and bool(((ratio > 0.49) & (ratio < 2.01)).all())
    assert share == 0 or bool((ops.row_thresholds(peaked(9, 4999, dtype=dtype), share)[0] > 1e-30).all())


def test_thresholds_of_extreme_rows():
    dz = torch.zeros(6, 40)
    dz[1, :] = torch.nan
    dz[2, 0] = torch.inf
    dz[3] = 3e38  # the sum of the row overflows in fp32
    dz[4] = 1e-44
    dz[5, :20], dz[5, 20] = 1e-5, 1.0
    thresholds, left_out = ops.row_thresholds(dz, 0.02)
    below = dz.abs() < thresholds.unsqueeze(1)
    assert below.sum(1).tolist() == [40, 0, 39, 0, 0, 39]
    assert left_out[:5].tolist() == [0, 0, 0, 0, 0] and 2e-4 <= float(left_out[5]) <= 2.001e-4
    others = [0, 1, 2, 4, 5]
    torch.testing.assert_close(thresholds[others], reference.row_thresholds(dz[others], 0.02)[0], atol=0, rtol=1e-6)
    gradient = head_backward(dz, torch.ones(40, 3), thresholds)
    assert bool(gradient[1].isnan().all()) and bool(gradient[2].isinf().all()) and float(gradient[5, 0]) == 1


def test_bad_operands_are_refused_by_name():
    with pytest.raises(RuntimeError, match=r"head_forward_: weight must be \[7, 5\]"):
        head_forward(torch.randn(3, 5), torch.randn(7, 6))
    with pytest.raises(RuntimeError, match="head_forward_: logits must have contiguous rows"):
        ops.head_forward_(torch.zeros(7, 3).T, torch.randn(3, 5), torch.randn(7, 5))
    with pytest.raises(RuntimeError, match="head_forward_: logits must have contiguous rows that do not overlap"):
        ops.head_forward_(torch.zeros(20).as_strided((3, 7), (5, 1)), torch.randn(3, 5), torch.randn(7, 5))
    with pytest.raises(RuntimeError, match=r"head_backward_: weight must be \[7, 5\]"):
        head_backward(torch.randn(3, 7), torch.randn(6, 5))
    with pytest.raises(RuntimeError, match=r"head_backward_: d_hidden must be \[3, 5\]"):
        ops.head_backward_(torch.zeros(3, 6), torch.randn(3, 7), torch.randn(7, 5))
    with pytest.raises(RuntimeError, match="head_backward_: d_hidden must be float32 and contiguous"):
        ops.head_backward_(torch.zeros(5, 3).T, torch.randn(3, 7), torch.randn(7, 5))
    with pytest.raises(RuntimeError, match=r"head_grad_: dW must be \[7, 5\]"):
        ops.head_grad_(torch.zeros(5, 7), torch.randn(3, 7), torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="head_grad_: dW must be float32 and contiguous"):
        ops.head_grad_(torch.zeros(7, 5).bfloat16(), torch.randn(3, 7), torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        head_forward(torch.randn(3, 5).double(), torch.randn(7, 5).double())
    with pytest.raises(RuntimeError, match=r"head_backward_: thresholds must be \[3\]"):
        head_backward(torch.randn(3, 7), torch.randn(7, 5), torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"thresholds must be \[3\], one for each row of dz, and contiguous"):
        head_backward(torch.randn(3, 7), torch.randn(7, 5), torch.zeros(6)[::2])
    with pytest.raises(RuntimeError, match="head_backward_: thresholds must be float32"):
        head_backward(torch.randn(3, 7), torch.randn(7, 5), torch.zeros(3).double())


def test_opcheck():
    hidden, weight, dz = torch.randn(3, 5), torch.randn(7, 5), torch.randn(3, 7)
    torch.library.opcheck(ops.head_forward_, (torch.zeros(3, 7), hidden, weight))
    torch.library.opcheck(ops.head_backward_, (torch.zeros(3, 5), dz, weight))
    torch.library.opcheck(ops.head_backward_, (torch.zeros(3, 5), dz, weight, torch.ones(3)))
    torch.library.opcheck(ops.row_thresholds, (dz, 0.1))
    torch.library.opcheck(ops.head_grad_, (torch.zeros(7, 5), dz, hidden))
