"""The ops of stacked experts against the op of one matrix on the rows of each expert."""

import pytest
import torch

from rbfast import ops
from rbfast.ops import reference

EXPERTS, OUT, IN, COLUMNS, RANK = 5, 12, 20, 8, 3
ENDS = ([4, 4, 9, 9, 15], [0, 0, 0, 0, 7], [7, 7, 7, 7, 7], [0, 0, 0, 0, 0])  # some experts have no rows


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(ends):
    rows = ends[-1]
    x, dy, A, B = draw(rows, IN), draw(rows, OUT), draw(EXPERTS, RANK, COLUMNS), draw(EXPERTS, OUT, RANK)
    cols = torch.arange(0, 2 * COLUMNS, 2)
    return x, dy, torch.tensor(ends), cols, A, B


@pytest.mark.parametrize("ends", ENDS)
def test_grouped_ops_match_one_op_per_expert(ends):
    x, dy, at, cols, A, B = arguments(ends)
    weight, xs = draw(EXPERTS, OUT, IN, seed=1), x[:, cols]
    y, dx = dy.clone(), x.clone()
    ops.grouped_column_linear_(y, xs, at, A, B, 0.7)
    ops.grouped_column_scatter_(dx, dy, at, cols, A, B, 0.7)
    dA, dB = ops.grouped_column_grad(dy, xs, at, A, B, 0.7)
    product = ops.grouped_linear(x, weight, at)
    start = 0
    for expert, end in enumerate(ends):
        one, a, b = slice(start, end), A[expert], B[expert]
        torch.testing.assert_close((dA[expert], dB[expert]), reference.column_grad(dy[one], xs[one], a, b, 0.7))
        torch.testing.assert_close(product[one], x[one] @ weight[expert].T)
        torch.testing.assert_close(y[one], dy[one] + 0.7 * xs[one] @ a.T @ b.T)
        expected = x[one].clone()
        expected[:, cols] += 0.7 * dy[one] @ b @ a
        torch.testing.assert_close(dx[one], expected)
        start = end


@pytest.mark.parametrize("k", [RANK, 0])
def test_grouped_fold_matches_one_fold_per_expert_bitwise(k):
    weight = draw(EXPERTS, IN, OUT).bfloat16().mT  # as gpt-oss keeps it
    A, B, cols = draw(EXPERTS, k, COLUMNS), draw(EXPERTS, OUT, k), torch.arange(0, 2 * COLUMNS, 2)
    base = draw(EXPERTS, OUT, COLUMNS, seed=1).bfloat16()
    expected = weight.clone()
    for expert in range(EXPERTS):
        reference.column_fold_(expected[expert], base[expert], cols, A[expert], B[expert], 0.7)
    ops.grouped_column_fold_(weight, base, cols, A, B, 0.7)
    assert torch.equal(weight, expected)


def test_grouped_ops_pass_opcheck():
    x, dy, at, cols, A, B = arguments(ENDS[0])
    weight = draw(EXPERTS, OUT, IN)
    for name, given in (
        ("grouped_linear", (x.requires_grad_(), weight, at)),
        ("grouped_column_grad", (dy, x[:, cols].detach(), at, A, B, 0.7)),
        ("grouped_column_grad", (dy, x[:, cols].detach(), at, A.mT.contiguous().mT, B.mT.contiguous().mT, 0.7)),
        ("grouped_column_linear_", (dy, x[:, cols].detach(), at, A, B, 0.7)),
        ("grouped_column_scatter_", (x.detach().clone(), dy, at, cols, A, B, 0.7)),
        ("grouped_column_fold_", (weight.clone(), weight[..., cols], cols, A, B, 0.7)),
    ):
        torch.library.opcheck(getattr(torch.ops.rbfast, name).default, given)


def test_gradcheck_of_grouped_linear():
    x, _, at, *_ = arguments(ENDS[0])
    weight = draw(EXPERTS, IN, OUT, seed=1).mT.double()  # as gpt-oss keeps it
    assert torch.autograd.gradcheck(lambda x: ops.grouped_linear(x, weight, at), x.double().requires_grad_())


@pytest.mark.parametrize("fold", [True, False])
def test_delta_and_gradients_match_the_plain_formula(fold):
    """In fold mode y contains the delta already. In side mode the delta is added, and x gets a gradient through it."""
    x, dy, at, cols, A, B = arguments(ENDS[0])
    x, A, B = (tensor.requires_grad_() for tensor in (x, A, B))
    expert = torch.searchsorted(at, torch.arange(at[-1]), right=True)
    delta = 0.7 * torch.einsum("rs,rks,rok->ro", x[:, cols], A[expert], B[expert])
    expected = torch.autograd.grad(delta, (A, B) if fold else (A, B, x), dy)
    xs = x[:, cols].detach()
    if fold:
        y = ops.column_tap(torch.zeros_like(dy), xs, A, B, 0.7, at)
    else:
        y = ops.column_side(torch.zeros_like(dy), x, xs, cols, A, B, 0.7, 1, at)
        torch.testing.assert_close(y, delta)
    torch.testing.assert_close(torch.autograd.grad(y, (A, B) if fold else (A, B, x), dy), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_grouped_linear_on_a_gpu_matches_fp64(dtype, is_transposed):
    ends = torch.tensor([40, 40, 77, 80, 203], device="cuda")
    x = draw(203, 64).to("cuda", dtype).requires_grad_()
    weight = draw(5, *((64, 96) if is_transposed else (96, 64)), seed=1).to("cuda", dtype)
    weight = weight.mT if is_transposed else weight
    y = ops.grouped_linear(x, weight, ends)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expert = torch.searchsorted(ends, torch.arange(203, device="cuda"), right=True)
    whole = weight.double()[expert]
    for actual, expected in ((y, torch.einsum("ri,roi->ro", x.double(), whole)), (dx, whole.sum(1))):
        assert (actual - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
