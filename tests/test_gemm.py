"""The head's products, head_forward_, head_backward and head_grad_, against fp64 on every instruction set."""

import pytest
import torch
from torch import Tensor

from rbfast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps
# T, H, V: below one vector, odd, an exact tile, more rows than a block, more of k than one block and than one panel.
SHAPES = ((1, 1, 1), (3, 5, 7), (16, 192, 96), (17, 33, 49), (130, 577, 1001), (300, 4100, 50))

pytestmark = pytest.mark.usefixtures("isa")


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def head_forward(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = torch.full((len(hidden), len(weight)), torch.nan)
    ops.head_forward_(logits, hidden, weight)
    return logits


def assert_product(ours: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None) -> None:
    """ours = start + a @ b within the error that any order of an fp32 sum may have."""
    a, b = a.double(), b.double()
    truth, size = a @ b, a.abs() @ b.abs()
    if start is not None:
        truth, size = truth + start, size + start.abs()
    assert ours.dtype == torch.float32
    assert bool(((ours - truth).abs() <= (a.shape[1] + 1) * EPS32 * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_match_fp64(shape, dtype):
    T, H, V = shape
    hidden, weight, dz = draw(T, H, dtype=dtype), draw(V, H, dtype=dtype, seed=1), draw(T, V, dtype=dtype, seed=2)
    assert_product(head_forward(hidden, weight), hidden, weight.T)
    assert_product(ops.head_backward(dz, weight), dz, weight)
    start = draw(V, H, dtype=torch.float32, seed=3)
    dW = start.clone()
    ops.head_grad_(dW, dz, hidden)
    assert_product(dW, dz.T, hidden, start)


@pytest.mark.parametrize("dz_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_may_differ_in_dtype(dtype, dz_dtype):
    hidden, weight, dz = draw(9, 70, dtype=dtype), draw(60, 70, dtype=dtype, seed=1), draw(9, 60, dtype=dz_dtype)
    assert_product(ops.head_backward(dz, weight), dz, weight)
    dW = torch.zeros(60, 70)
    ops.head_grad_(dW, dz, hidden)
    assert_product(dW, dz.T, hidden)


def test_strided_operands(isa):
    wide = draw(9, 240, dtype=torch.bfloat16)
    transposed, weight = draw(70, 9, dtype=torch.bfloat16).T, draw(120, 70, dtype=torch.bfloat16, seed=1)
    assert_product(ops.head_backward(wide[:, :120], weight), wide[:, :120], weight)
    assert_product(head_forward(transposed, weight), transposed, weight.T)
    assert_product(
        head_forward(draw(9, 120, dtype=torch.bfloat16), weight.T), draw(9, 120, dtype=torch.bfloat16), weight
    )


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty(shape):
    T, H, V = shape
    hidden, weight, dz = torch.randn(T, H), torch.randn(V, H), torch.randn(T, V)
    assert torch.equal(head_forward(hidden, weight), torch.zeros(T, V))
    assert torch.equal(ops.head_backward(dz, weight), torch.zeros(T, H))
    dW = torch.ones(V, H)
    ops.head_grad_(dW, dz, hidden)
    assert torch.equal(dW, torch.ones(V, H))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_rows_threads_or_chunks(dtype, threads):
    hidden, weight = draw(100, 577, dtype=dtype), draw(1001, 577, dtype=dtype, seed=1)
    dz = draw(100, 1001, dtype=dtype, seed=2)
    threads(1)
    logits, gradient, dW = head_forward(hidden, weight), ops.head_backward(dz, weight), torch.zeros(1001, 577)
    ops.head_grad_(dW, dz, hidden)
    for count, chunk in ((1, 1), (2, 7), (3, 64), (5, 100)):
        threads(count)
        parts = [slice(i, i + chunk) for i in range(0, 100, chunk)]
        assert torch.equal(torch.cat([head_forward(hidden[p], weight) for p in parts]), logits)
        assert torch.equal(torch.cat([ops.head_backward(dz[p], weight) for p in parts]), gradient)
    for chunk in (2, 16, 64):  # an even number of rows: a pair is never split
        again = torch.zeros(1001, 577)
        for i in range(0, 100, chunk):
            ops.head_grad_(again, dz[i : i + chunk], hidden[i : i + chunk])
        assert torch.equal(again, dW)


def test_wrong_shapes_are_named():
    with pytest.raises(RuntimeError, match=r"head_forward_: weight must be \[7, 5\]"):
        head_forward(torch.randn(3, 5), torch.randn(7, 6))
    with pytest.raises(RuntimeError, match=r"head_backward: weight must be \[7, 5\]"):
        ops.head_backward(torch.randn(3, 7), torch.randn(6, 5))
    with pytest.raises(RuntimeError, match=r"head_grad_: dW must be \[7, 5\]"):
        ops.head_grad_(torch.zeros(5, 7), torch.randn(3, 7), torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="head_grad_: dW must be float32 and contiguous"):
        ops.head_grad_(torch.zeros(7, 5).bfloat16(), torch.randn(3, 7), torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        head_forward(torch.randn(3, 5).double(), torch.randn(7, 5).double())


def test_opcheck():
    hidden, weight, dz = torch.randn(3, 5), torch.randn(7, 5), torch.randn(3, 7)
    torch.library.opcheck(ops.head_forward_, (torch.zeros(3, 7), hidden, weight))
    torch.library.opcheck(ops.head_backward, (dz, weight))
    torch.library.opcheck(ops.head_grad_, (torch.zeros(7, 5), dz, hidden))
