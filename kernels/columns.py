"""The adapter's ops in Triton: same names, arguments and results as in rbfast/ops/reference.py.

Maths: with H = scale * xs A^T the gradients of y += H B^T are dB = dy^T H, dH = scale * dy B and dA = dH^T xs.

Traffic of column_grad, for dy [T, out] in bf16: dy is read once, 2 T out bytes. A program owns one block of features
and one group of tokens; it keeps its part of dB in registers and writes its part of dH. Parts are written once and read
once: 8 T k bytes for every 256 features and 8 out k for every group. For k below about 30 this traffic is small.
FLOPs: 4 T k (out + s), three times that on the tensor cores. column_gather moves 4 T s bytes (more if single columns
lie in separate sectors); column_linear_ and column_scatter_ read and write what they change once, after one read of xs
or dy.

Precision: sums are in fp32, and no product is rounded to less. Tensor cores multiply pieces of 8 bits, which bf16 holds
exactly: an fp32 factor is split into three pieces, an fp16 operand into two, a bf16 operand is one. Tensor cores
truncate sums towards 0, so they only sum within one tile, small pieces separately from large ones; fp32 additions,
which round, sum the tiles. Order: the split of a sum depends on the shapes alone and parts are added in order, so equal
inputs give equal bits; no atomics.

Column indices are not checked against the matrix on a GPU: that would synchronise with the device. Those of a saved
adapter are checked when it is read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter cannot multiply bf16, so it gets the same values in fp32.
PIECE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
PROGRAMS = 512  # a sum over tokens is split into groups until there are about this many programs


@triton.jit
def _top_bits(x):
    """x fp32 with its low 16 bits cleared: exact in bf16."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot(x, w, acc):
    """acc + x w in fp32, for w in fp32."""
    if x.dtype == tl.float32:
        return tl.dot(x, w, acc, input_precision="ieee")
    high = _top_bits(w)
    middle = _top_bits(w - high)
    low = (w - high - middle).to(PIECE)  # 8 bits are left
    high, middle = high.to(PIECE), middle.to(PIECE)
    if x.dtype == tl.float16:
        x_high = _top_bits(x.to(tl.float32))
        x_low = (x.to(tl.float32) - x_high).to(PIECE)  # 3 bits are left
        rest = _multiply(x_low, low, None)
        rest = _multiply(x_low, middle, rest)
        rest = _multiply(x_low, high, rest)
        rest = _multiply(x_high.to(PIECE), low, rest)
        x = x_high
    else:
        rest = _multiply(x.to(PIECE), low, None)
    rest = _multiply(x.to(PIECE), middle, rest)
    return acc + (_multiply(x.to(PIECE), high, None) + rest)


@triton.jit
def _multiply(x, w, acc):
    """acc (None: 0) + x w for pieces, whose products are exact in fp32. The sum is truncated, not rounded.

    With max_num_imprecise_acc=0 the compiler would fuse a later `+` into the accumulator, and truncate that sum too.
    """
    return tl.dot(x, w, acc, input_precision="ieee", max_num_imprecise_acc=1)


@triton.jit
def _assume_runs(column, RUN: tl.constexpr):
    """Tells the compiler that columns come in runs, so that it vectorises the accesses of a run."""
    return tl.max_contiguous(tl.multiple_of(column, (1, RUN)), (1, RUN))


@triton.jit
def gather_kernel(x, cols, xs, T, s, x_row, x_col, RUN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    j = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    mask = (t < T) & (j < s)
    column = _assume_runs(tl.load(cols + j, mask=j < s, other=0), RUN)
    tl.store(xs + t * s + j, tl.load(x + t * x_row + column * x_col, mask=mask), mask=mask)


@triton.jit
def project_kernel(
    x, m, h, T, n, k, scale, x_row, x_col, m_row, m_col,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [T, k] = scale * x m, with x [T, n] and m [n, k]."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    i = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = t * x_row + j[None, :].to(tl.int64) * x_col
        tile = tl.load(x + at, mask=(t < T) & (j[None, :] < n), other=0.0)
        w = tl.load(m + j[:, None] * m_row + i * m_col, mask=(j[:, None] < n) & (i < k), other=0.0)
        acc = _dot(tile, w, acc)
    tl.store(h + t * k + i, scale * acc, mask=(t < T) & (i < k))


@triton.jit
def contract_kernel(
    x, w, m, sums, parts, T, n, k, group, x_row, x_col, m_row, m_col, sum_row, sum_col,
    HAS_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For a group of tokens and a block of columns of x [T, n]: writes a partial x^T w [n, k], with w [T, k], to sums.

    With m [n, k] also writes this block's part of x m to parts [blocks, T, k].
    """
    block, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    in_m = (j[:, None] < n) & (i < k)
    if HAS_M:
        other = tl.load(m + j[:, None].to(tl.int64) * m_row + i * m_col, mask=in_m, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first = g * group
    last = tl.minimum(first + group, T)
    for start in range(first, last, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        at_x = t * x_row + j[None, :].to(tl.int64) * x_col
        tile = tl.load(x + at_x, mask=(t < last) & (j[None, :] < n), other=0.0)
        at = t * k + i
        in_w = (t < last) & (i < k)
        if HAS_M:
            part = _dot(tile, other, tl.zeros((BLOCK_T, BLOCK_K), tl.float32))
            tl.store(parts + block.to(tl.int64) * T * k + at, part, mask=in_w)
        acc = _dot(tl.trans(tile), tl.load(w + at, mask=in_w, other=0.0), acc)
    tl.store(sums + g * n * k + j[:, None].to(tl.int64) * sum_row + i * sum_col, acc, mask=in_m)


@triton.jit
def add_parts_kernel(parts, total, count, size, scale, BLOCK: tl.constexpr):
    """total [size] = scale * the sum of parts [count, size], in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        acc += tl.load(parts + i, mask=i < size, other=0.0)
        parts += size
    tl.store(total + i, scale * acc, mask=i < size)


@triton.jit
def update_kernel(
    target, base, cols, left, right, rows, n, k, scale,
    target_row, target_col, base_row, base_col, left_row, left_col, right_row, right_col,
    target_expert, base_expert, left_expert, right_expert,
    HAS_COLS: tl.constexpr, RUN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """target[:, cols] = base + (scale * left) right over `rows` rows and n columns, with left [rows, k], right [k, n];
    in a stack, for each expert.

    The sum runs in order from zero, and every product is rounded: compiled without fused multiply-add, the result is
    bitwise the reference's.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    expert = tl.program_id(2).to(tl.int64)
    target += expert * target_expert
    left += expert * left_expert
    right += expert * right_expert
    mask = (r < rows) & (j < n)
    j = j.to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for i in range(k):
        a = scale * tl.load(left + r * left_row + i * left_col, mask=r < rows, other=0.0)
        acc += a * tl.load(right + i * right_row + j * right_col, mask=j < n, other=0.0)
    column = _assume_runs(tl.load(cols + j, mask=j < n, other=0), RUN) if HAS_COLS else j
    if base is None:
        old = tl.load(target + r * target_row + column * target_col, mask=mask)
    else:
        old = tl.load(base + expert * base_expert + r * base_row + j * base_col, mask=mask)
    new = old.to(tl.float32) + acc
    tl.store(target + r * target_row + column * target_col, new.to(target.dtype.element_ty), mask=mask)


# ---- launches ----


def _launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], *args: object, enable_fp_fusion: bool = True, **options: Any
) -> None:
    if all(grid):
        kernel[grid](*args, enable_fp_fusion=enable_fp_fusion, **options)


def _rank_block(x: Tensor, k: int) -> int:
    """The number of ranks per program: as many as its registers hold, because it reads x once for all of them."""
    return min(max(16, triton.next_power_of_2(k)), 32 if x.dtype == torch.bfloat16 else 16)


def _project(x: Tensor, m: Tensor, scale: float) -> Tensor:
    """scale * x m [T, k] in fp32, with x [T, n] and m [n, k]."""
    (T, n), k = x.shape, m.shape[1]
    h = torch.empty(T, k, dtype=torch.float32, device=x.device)
    block_t, block_k = 32, _rank_block(x, k)
    block_n = 128 if x.dtype == torch.bfloat16 and block_k == 16 else 64
    grid = (triton.cdiv(T, block_t), triton.cdiv(k, block_k))
    strides = (*x.stride(), *m.stride())
    _launch(project_kernel, grid, x, m, h, T, n, k, scale, *strides, block_t, block_n, block_k, num_warps=4)
    return h


def _group_tokens(tokens: int, blocks: int) -> int:
    """Tokens per partial sum: at least 256; more if the blocks of features already give many programs."""
    groups = triton.cdiv(PROGRAMS, max(1, blocks))
    return max(256, triton.cdiv(triton.cdiv(tokens, groups), 32) * 32)


def _contract(x: Tensor, w: Tensor, m: Tensor | None, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """x^T w [n, k] (or its transpose), of x [T, n] and w [T, k]; with m [n, k] also the parts [blocks, T, k] of x m."""
    (T, n), k = x.shape, w.shape[1]
    block_t, block_k = 32, _rank_block(x, k)
    block_n = 256 if n >= 2048 and block_k == 16 and x.dtype == torch.bfloat16 else 128
    blocks = triton.cdiv(n, block_n)
    group = _group_tokens(T, blocks)
    grid = (blocks, max(1, triton.cdiv(T, group)), triton.cdiv(k, block_k))
    sums = torch.empty(grid[1], *((k, n) if transposed else (n, k)), dtype=torch.float32, device=x.device)
    parts = None if m is None else torch.empty(blocks, T, k, dtype=torch.float32, device=x.device)
    strides = (*x.stride(), *((0, 0) if m is None else m.stride()), *((1, n) if transposed else (k, 1)))
    blocking = (m is not None, block_t, block_n, block_k)
    options: dict[str, Any] = {
        "num_warps": 8 if block_n * block_k == 4096 or x.dtype == torch.float16 else 4,
        "num_stages": 4 if x.dtype == torch.bfloat16 else 2,
    }
    _launch(contract_kernel, grid, x, w, m, sums, parts, T, n, k, group, *strides, *blocking, **options)
    return _add_parts(sums, 1.0), parts


def _add_parts(parts: Tensor, scale: float) -> Tensor:
    """scale * parts [count, ...] summed over the first dimension."""
    total = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    size = total.numel()
    _launch(add_parts_kernel, (triton.cdiv(size, 1024),), parts, total, len(parts), size, scale, 1024)
    return total


def _update_(
    target: Tensor, base: Tensor | None, cols: Tensor | None, left: Tensor, right: Tensor, scale: float, run: int = 1
) -> None:
    """target[:, cols] = base + (scale * left) right, with left [rows, k], right [k, n]; base None: target[:, cols]. For
    stacks of experts, all but cols have an extra leading dimension."""
    rows, (k, n) = target.shape[-2], right.shape[-2:]
    tensors = (target, base, cols, left, right)
    given = [(0,) * target.dim() if t is None else t.stride() for t in (target, base, left, right)]
    strides = (*(stride for one in given for stride in one[-2:]), *(one[0] if len(one) == 3 else 0 for one in given))
    block_r, block_n = 32, 128
    grid = (triton.cdiv(rows, block_r), triton.cdiv(n, block_n), len(target) if target.dim() == 3 else 1)
    sizes = (rows, n, k, scale)
    blocking = (cols is not None, run, block_r, block_n)
    # Without fused multiply-add the products are rounded, as in the reference.
    _launch(update_kernel, grid, *tensors, *sizes, *strides, *blocking, num_warps=4, enable_fp_fusion=False)


# ---- ops ----


def column_gather(x: Tensor, cols: Tensor, run: int = 1) -> Tensor:
    _expect("column_gather", "x", x, (None, None))
    _expect_columns("column_gather", cols, run)
    (T, _), s = x.shape, len(cols)
    xs = torch.empty(T, s, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(T, 16), triton.cdiv(s, 128))
    _launch(gather_kernel, grid, x, cols.contiguous(), xs, T, s, *x.stride(), run, 16, 128, num_warps=4)
    return xs


def column_grad(dy: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    op = "column_grad"
    _expect(op, "dy", dy, (None, None))
    _expect(op, "xs", xs, (len(dy), None))
    _expect_delta(op, A, B, xs.shape[1], dy.shape[1])
    h = _project(xs, A.T, scale)
    dB, parts = _contract(dy, h, B, transposed=False)
    assert parts is not None
    dA, _ = _contract(xs, _add_parts(parts, scale), None, transposed=True)
    return dA, dB


def column_linear_(y: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    op = "column_linear_"
    _expect(op, "y", y, (None, None))
    _expect(op, "xs", xs, (len(y), None))
    _expect_delta(op, A, B, xs.shape[1], y.shape[1])
    _expect_writable(op, "y", y)
    _update_(y, None, None, _project(xs, A.T, scale), B.T, 1.0)


def column_scatter_(dx: Tensor, dy: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1) -> None:
    op = "column_scatter_"
    _expect(op, "dx", dx, (None, None))
    _expect(op, "dy", dy, (len(dx), None))
    _expect_columns(op, cols, run)
    _expect_delta(op, A, B, len(cols), dy.shape[1])
    _expect_writable(op, "dx", dx)
    _update_(dx, None, cols.contiguous(), _project(dy, B, scale), A, 1.0, run)


def column_fold_(
    weight: Tensor, base_columns: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1
) -> None:
    op = "column_fold_"
    _expect(op, "weight", weight, (None, None))
    _expect_columns(op, cols, run)
    _expect(op, "base_columns", base_columns, (len(weight), len(cols)))
    if base_columns.dtype != weight.dtype:
        raise ValueError(f"{op}: base_columns must have the dtype of weight, {weight.dtype}, got {base_columns.dtype}")
    _expect_delta(op, A, B, len(cols), len(weight))
    _expect_writable(op, "weight", weight)
    if len(A) == 0:
        weight[:, cols] = base_columns  # bitwise: a sum would turn -0 into +0
        return
    _update_(weight, base_columns, cols.contiguous(), B, A, scale, run)


# ---- checks: a wrong shape would read out of bounds ----


def _expect(op: str, name: str, x: Tensor, shape: tuple[int | None, int | None]) -> None:
    """x must be a matrix of a dtype the kernels take; None in `shape` stands for any size."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: the ops take float32, bfloat16 or float16, got {x.dtype} for {name}; cast it")
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} must have 2 dimensions, got {x.dim()}")
    wanted = [got if want is None else want for got, want in zip(x.shape, shape, strict=True)]
    if list(x.shape) != wanted:
        raise ValueError(f"{op}: {name} must be {wanted} to fit the other arguments, got {list(x.shape)}")


def _expect_delta(op: str, A: Tensor, B: Tensor, s: int, out: int) -> None:
    for name, x, shape in (("A", A, (None, s)), ("B", B, (out, A.shape[0]))):
        if x.dtype != torch.float32:
            raise ValueError(f"{op}: {name} must be float32, got {x.dtype}")
        _expect(op, name, x, shape)


def _expect_columns(op: str, cols: Tensor, run: int) -> None:
    if cols.dtype != torch.int64 or cols.dim() != 1:
        raise ValueError(f"{op}: cols must be int64 with 1 dimension, got {cols.dtype} with {cols.dim()}")
    if run not in (1, 2, 4, 8, 16) or len(cols) % run:
        raise ValueError(f"{op}: run must be 1, 2, 4, 8 or 16 and divide the {len(cols)} columns, got {run}")


def _expect_writable(op: str, name: str, x: Tensor) -> None:
    """Raises for an expanded tensor: several programs would write the same element."""
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{op}: {name} is an expanded view, which cannot be written to: clone it")
