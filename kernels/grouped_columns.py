"""The ops of stacked experts in Triton: one launch for all experts, without reading anything back from the device.

Rows are sorted by expert; those of expert e end at ends[e]. A tile of rows belongs to one expert. There are at most
S / BLOCK_T + E tiles, depending on the counts; a program finds its tile from `ends`, and programs beyond the last tile
write nothing. The gradient takes four launches and reads dy twice. Precision and order are those of `columns`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbfast.kernels.columns import _assume_runs, _dot, _launch, _rank_block
from rbfast.kernels.columns import _update_ as _fold_

BLOCK_T = 32  # rows of a tile


@triton.jit
def _tile(ends, E, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """The expert of this program's tile, its rows [BLOCK_T, 1], and where the expert's rows end."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (end - start + BLOCK_T - 1) // BLOCK_T
    last = tl.cumsum(tiles, 0)
    pid = tl.program_id(0).to(tl.int64)
    expert = tl.sum((last <= pid).to(tl.int32), 0)  # the number of experts whose tiles all precede this one
    is_it = e == expert
    first = tl.sum(tl.where(is_it, start, 0), 0) + BLOCK_T * (pid - tl.sum(tl.where(is_it, last - tiles, 0), 0))
    t = first + tl.arange(0, BLOCK_T)[:, None]
    return tl.minimum(expert, E - 1).to(tl.int64), t, tl.sum(tl.where(is_it, end, 0), 0)


@triton.jit
def grouped_project_kernel(
    x, m, ends, h, E, n, k, scale, x_row, x_col, m_expert, m_row, m_col,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [S, k] = scale * x m_e for the rows x [S, n] of each expert e, with m [E, n, k]."""
    expert, t, end = _tile(ends, E, BLOCK_E, BLOCK_T)
    i = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    m += expert * m_expert
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = t * x_row + j[None, :].to(tl.int64) * x_col
        tile = tl.load(x + at, mask=(t < end) & (j[None, :] < n), other=0.0)
        w = tl.load(m + j[:, None].to(tl.int64) * m_row + i * m_col, mask=(j[:, None] < n) & (i < k), other=0.0)
        acc = _dot(tile, w, acc)
    tl.store(h + t * k + i, scale * acc, mask=(t < end) & (i < k))


@triton.jit
def grouped_contract_kernel(
    x, w, ends, out, n, k, x_row, x_col, out_expert, out_row, out_col,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [E, n, k] = x^T w over the rows x [S, n] and w [S, k] of each expert."""
    expert = tl.program_id(1)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(first, last, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        at = t * x_row + j[None, :].to(tl.int64) * x_col
        tile = tl.load(x + at, mask=(t < last) & (j[None, :] < n), other=0.0)
        acc = _dot(tl.trans(tile), tl.load(w + t * k + i, mask=(t < last) & (i < k), other=0.0), acc)
    at_out = expert.to(tl.int64) * out_expert + j[:, None].to(tl.int64) * out_row + i * out_col
    tl.store(out + at_out, acc, mask=(j[:, None] < n) & (i < k))


@triton.jit
def grouped_update_kernel(
    target, cols, left, right, ends, E, n, k, target_row, target_col, right_expert, right_row, right_col,
    HAS_COLS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """target[:, cols] += left right_e over the rows of each expert, with left [S, k] and right [E, k, n]."""
    expert, t, end = _tile(ends, E, BLOCK_E, BLOCK_T)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (t < end) & (j < n)
    j = j.to(tl.int64)
    right += expert * right_expert
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for i in range(k):
        a = tl.load(left + t * k + i, mask=t < end, other=0.0)
        acc += a * tl.load(right + i * right_row + j * right_col, mask=j < n, other=0.0)
    column = _assume_runs(tl.load(cols + j, mask=j < n, other=0), RUN) if HAS_COLS else j
    at = target + t * target_row + column * target_col
    tl.store(at, (tl.load(at, mask=mask).to(tl.float32) + acc).to(target.dtype.element_ty), mask=mask)


# ---- launches ----


def _project(x: Tensor, m: Tensor, ends: Tensor, scale: float) -> Tensor:
    (S, n), (E, _, k) = x.shape, m.shape
    h = torch.empty(S, k, dtype=torch.float32, device=x.device)
    block_k = _rank_block(x, k)
    block_n = 128 if x.dtype == torch.bfloat16 and block_k == 16 else 64
    grid = (_tiles(S, E), triton.cdiv(k, block_k))
    sizes, strides = (E, n, k, scale), (*x.stride(), *m.stride())
    blocking = (triton.next_power_of_2(E), BLOCK_T, block_n, block_k)
    _launch(grouped_project_kernel, grid, x, m, ends, h, *sizes, *strides, *blocking, num_warps=4)
    return h


def _contract(x: Tensor, w: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """x^T w [E, n, k] (or its transpose [E, k, n])."""
    n, k, E = x.shape[1], w.shape[1], len(ends)
    out = torch.empty(E, *((k, n) if transposed else (n, k)), dtype=torch.float32, device=x.device)
    block_n, block_k = 128, _rank_block(x, k)
    grid = (triton.cdiv(n, block_n), E, triton.cdiv(k, block_k))
    strides = (*x.stride(), n * k, *((1, n) if transposed else (k, 1)))
    warps = 8 if x.dtype == torch.float16 or block_k == 32 else 4
    _launch(grouped_contract_kernel, grid, x, w, ends, out, n, k, *strides, BLOCK_T, block_n, block_k, num_warps=warps)
    return out


def _update_(target: Tensor, cols: Tensor | None, left: Tensor, right: Tensor, ends: Tensor, run: int = 1) -> None:
    E, k, n = right.shape
    grid = (_tiles(len(target), E), triton.cdiv(n, 128))
    strides = (*target.stride(), *right.stride())
    blocking = (cols is not None, run, triton.next_power_of_2(E), BLOCK_T, 128)
    _launch(grouped_update_kernel, grid, target, cols, left, right, ends, E, n, k, *strides, *blocking, num_warps=4)


def _tiles(rows: int, experts: int) -> int:
    """An upper bound of the number of tiles."""
    return rows // BLOCK_T + min(rows, experts)


# ---- ops ----


def grouped_column_grad(
    dy: Tensor, xs: Tensor, ends: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    _expect("grouped_column_grad", (dy, xs), ends, A, B, dy.shape[-1], xs.shape[-1])
    h = _project(xs, A.mT, ends, scale)
    dB = _contract(dy, h, ends, transposed=False)
    return _contract(xs, _project(dy, B, ends, scale), ends, transposed=True), dB


def grouped_column_linear_(y: Tensor, xs: Tensor, ends: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    _expect("grouped_column_linear_", (y, xs), ends, A, B, y.shape[-1], xs.shape[-1])
    _update_(y, None, _project(xs, A.mT, ends, scale), B.mT, ends)


def grouped_column_scatter_(
    dx: Tensor, dy: Tensor, ends: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1
) -> None:
    _expect("grouped_column_scatter_", (dx, dy), ends, A, B, dy.shape[-1], len(cols))
    _update_(dx, cols.contiguous(), _project(dy, B, ends, scale), A, ends, run)


def grouped_column_fold_(
    weight: Tensor, base_columns: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1
) -> None:
    E, out, _ = weight.shape
    if base_columns.dtype != weight.dtype or tuple(base_columns.shape) != (E, out, len(cols)):
        raise ValueError(
            f"grouped_column_fold_: base_columns must be {weight.dtype} {[E, out, len(cols)]}, got "
            f"{base_columns.dtype} {list(base_columns.shape)}"
        )
    _expect_delta("grouped_column_fold_", A, B, E, out, len(cols))
    if A.shape[1] == 0:
        weight[..., cols] = base_columns  # bitwise: a sum would turn -0 into +0
        return
    _fold_(weight, base_columns, cols.contiguous(), B, A, scale, run)


def _expect(op: str, rows: tuple[Tensor, ...], ends: Tensor, A: Tensor, B: Tensor, out: int, s: int) -> None:
    """Checks shapes and dtypes: a wrong shape would read out of bounds. The values of `ends` are not checked."""
    for x in rows:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dim() != 2 or len(x) != len(rows[0]):
            raise ValueError(
                f"{op}: expected as many rows of float32, bfloat16 or float16 in both, got {x.dtype} {list(x.shape)} "
                f"beside {list(rows[0].shape)}"
            )
    if ends.dtype != torch.int64 or ends.dim() != 1 or not ends.is_contiguous():
        raise ValueError(f"{op}: ends must be int64 [E], got {ends.dtype} {list(ends.shape)}")
    _expect_delta(op, A, B, len(ends), out, s)


def _expect_delta(op: str, A: Tensor, B: Tensor, E: int, out: int, s: int) -> None:
    k = A.shape[1] if A.dim() == 3 else 0
    for name, x, shape in (("A", A, (E, k, s)), ("B", B, (E, out, k))):
        if x.dtype != torch.float32 or tuple(x.shape) != shape:
            raise ValueError(f"{op}: {name} must be float32 {list(shape)}, got {x.dtype} {list(x.shape)}")
