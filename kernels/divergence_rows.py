"""Losses of rows of logits and their gradient in Triton: divergence_rows_ as in rbfast/ops/reference.py.

Maths: one program per row, in passes over blocks of V. The first finds the maximum and the sums of exponentials (of the
student, and of a dense teacher); scalars between the passes are fp64. A row with a top-k teacher, or with none, then
needs one pass for dz. A dense row needs one more for reverse KL and JS, whose gradient contains a mean over the row.
Checking ids and labels would synchronise with the device, so a row with one outside the vocabulary becomes NaN.

Traffic of a row in bytes, dz in bf16: top-k and text 4 V (sums) + 6 V (dz); dense forward KL 8 V + 10 V, the others 8 V
more; 8 V more if the head has a bias, scale or softcap. FLOPs: about 40 (top-k) to 150 (JS) per logit.

Memory: dz may overlap the logits, and by construction no warp overwrites what another has yet to load. Every store to a
row directly follows a barrier, at which all warps have loaded all blocks up to this one. And the store of block [a, b)
reaches no later block: it covers logits [a, b) if dz is fp32, [a / 2, b / 2) in 16 bits. Each row of dz starts at the
same address as its logits, so programs do not overlap.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbfast.kernels.columns import _launch
from rbfast.kernels.divergence_terms import (
    FORWARD,
    JS,
    NONE,
    REVERSE,
    at_least_none,
    bucket,
    dense_term,
    tanh,
    teacher_buckets,
)


@triton.jit
def _load_label_logit(row, label, V):
    """The label's logit, fp64; NaN if the label is outside the vocabulary."""
    is_there = (label >= 0) & (label < V)
    return at_least_none(tl.load(row + label, mask=is_there, other=float("nan"))).to(tl.float64)


@triton.jit
def _load_logits(row, v, end):
    """A block of logits, NONE from `end` on."""
    return at_least_none(tl.load(row + v, mask=v < end, other=NONE))


@triton.jit
def _of_row(values, factor, i, mask=None):
    """values[i] * factor; just the factor if values is None."""
    # In one expression: Triton 3.6 also compiles code after a return.
    return factor + 0.0 if values is None else tl.load(values + i, mask=mask) * factor


# ---- passes over a row ----


@triton.jit
def _store(at, x, mask):
    """Stores to a row whose logits up to here this warp has loaded; the barrier waits for the other warps."""
    tl.debug_barrier()
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _apply_head(row, bias, V, logit_scale, softcap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Replaces the logits by cap(logit_scale * (logits + bias)), in place."""
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = _load_logits(row, v, V)
        if bias is not None:
            z += _load_logits(bias, v, V)
        z *= logit_scale
        if HAS_CAP:
            z = softcap * tanh(z / softcap)
        _store(row + v, z, v < V)
    tl.debug_barrier()


@triton.jit
def _log_sum(row, begin, end, inv_tau, BLOCK: tl.constexpr):
    """The maximum of logits [begin, end), and the sums of exp((z - max) * inv_tau) and exp(z - max), fp64.

    The sums are meaningless if the maximum is NONE.
    """
    top = NONE + 0.0
    at_tau, at_one = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        z = _load_logits(row, start + tl.arange(0, BLOCK), end)
        higher = tl.maximum(top, tl.max(z, 0))
        x = z - higher
        at_tau = at_tau * tl.exp((top - higher) * inv_tau) + tl.exp(x * inv_tau)
        at_one = at_one * tl.exp(top - higher) + tl.exp(x)
        top = higher
    return top, tl.sum(at_tau, 0).to(tl.float64), tl.sum(at_one, 0).to(tl.float64)


@triton.jit
def _raw_logit_gradient(gradient, z, logit_scale, softcap, HAS_CAP: tl.constexpr):
    """Converts the gradient in the capped and scaled logits z to that in the raw logits."""
    if HAS_CAP:
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    return gradient * logit_scale


@triton.jit
def _store_gradient(dz, gradient, z, v, V, label, ce_weight, logit_scale, softcap, HAS_CAP: tl.constexpr):
    gradient -= tl.where(v == label, ce_weight, 0.0)
    gradient = _raw_logit_gradient(gradient, z, logit_scale, softcap, HAS_CAP)
    _store(dz + v, gradient, v < V)


# ---- rows with a top-k teacher, and rows of text ----


@triton.jit
def sparse_rows_kernel(
    logits, dz, labels, kl_weight, ce_weight, temperature, ids, logprobs, bias, values, ces,
    V, k, logits_row, dz_row, kl_factor, ce_factor, temperature_factor, beta, logit_scale, softcap,
    HAS_HEAD: tl.constexpr, HAS_CAP: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row with k log-probs of its teacher; ids None: text only."""
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * logits_row
    label, a = tl.load(labels + i), _of_row(ce_weight, ce_factor, i)
    if HAS_HEAD:
        _apply_head(row, bias, V, logit_scale, softcap, HAS_CAP, BLOCK)
    z_label = _load_label_logit(row, label, V)
    tau = _of_row(temperature, temperature_factor, i)
    inv_tau = 1.0 / tau
    if ids is not None:
        slot = tl.arange(0, BLOCK_K)
        id = tl.load(ids + i * k + slot, mask=slot < k, other=-1)
        used = (id >= 0) & (id < V)
        is_padding = id == -1
        z_in = at_least_none(tl.load(row + id, mask=used, other=float("nan")))
        _store(row + id, tl.full((BLOCK_K,), NONE, tl.float32), used)  # the remaining logits are the tail
        tl.debug_barrier()
    tail_top, tail_tau, tail_one = _log_sum(row, 0, V, inv_tau, BLOCK)
    has_tail = (tail_top > NONE) | (tail_one != tail_one)
    at_tau = 0.0
    log_one = tail_top + tl.log(tail_one)
    value = 0.0
    if ids is not None:
        top = tl.maximum(tl.max(tl.where(used, z_in, NONE), 0), tail_top).to(tl.float64)
        x, below = tl.where(is_padding, float("-inf"), z_in.to(tl.float64) - top), tail_top.to(tl.float64) - top
        sum_tau = tl.sum(tl.exp(x * inv_tau), 0) + tl.where(has_tail, tail_tau * tl.exp(below * inv_tau), 0.0)
        sum_one = tl.sum(tl.exp(x), 0) + tl.where(has_tail, tail_one * tl.exp(below), 0.0)
        log_one = top + tl.log(sum_one)
        log_q = x * inv_tau - tl.log(sum_tau)
        log_q_tail = tl.where(has_tail, below * inv_tau + tl.log(tail_tau) - tl.log(sum_tau), float("-inf"))
        log_p = tl.load(logprobs + i * k + slot, mask=used, other=float("-inf"))
        log_p, log_p_tail = teacher_buckets(log_p, used, has_tail, tail_tau, tail_one, inv_tau)
        term, q, pull = bucket(log_p, log_q, beta, KIND)
        tail_term, tail_q, tail_pull = bucket(log_p_tail, log_q_tail, beta, KIND)
        value = tl.sum(term, 0) + tail_term
        if KIND != FORWARD:
            mean = tl.sum(q * pull, 0) + tail_q * tail_pull
            factor = (1 - beta) if KIND == JS else 1.0
            pull, tail_pull = factor * q * (pull - mean), factor * tail_q * (tail_pull - mean)
        scale = _of_row(kl_weight, kl_factor, i) * tau
        at_tau = tl.where(has_tail, scale * tail_pull / tail_tau, 0.0).to(tl.float32)
        gradient_in = scale * pull + a * tl.exp(z_in.to(tl.float64) - log_one)
    tl.store(values + i, tl.where(value < 0, 0.0, value).to(tl.float32))
    tl.store(ces + i, (log_one - z_label).to(tl.float32))
    if dz is not None:
        to = dz + i * dz_row
        at_one = tl.where(has_tail, a * tl.exp(tail_top - log_one), 0.0).to(tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = _load_logits(row, v, V)
            gradient = tl.exp(z - tail_top) * at_one
            if ids is not None:
                gradient += tl.exp((z - tail_top) * inv_tau) * at_tau
            _store_gradient(to, gradient, z, v, V, label, a, logit_scale, softcap, HAS_CAP)
        if ids is not None:
            gradient = gradient_in.to(tl.float32) - tl.where(id == label, a, 0.0)
            gradient = _raw_logit_gradient(gradient, z_in, logit_scale, softcap, HAS_CAP)
            _store(to + id, gradient, used)


# ---- rows with the teacher's own logits ----


@triton.jit
def dense_rows_kernel(
    logits, dz, labels, kl_weight, ce_weight, temperature, teacher, bias, values, ces,
    V, shared, logits_row, dz_row, teacher_row, kl_factor, ce_factor, temperature_factor, beta, logit_scale, softcap,
    HAS_HEAD: tl.constexpr, HAS_CAP: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row with its teacher's logits; ids below `shared` are in both vocabularies."""
    i = tl.program_id(0).to(tl.int64)
    row, teacher_at = logits + i * logits_row, teacher + i * teacher_row
    label = tl.load(labels + i)
    if HAS_HEAD:
        _apply_head(row, bias, V, logit_scale, softcap, HAS_CAP, BLOCK)
    z_label = _load_label_logit(row, label, V)
    tau = _of_row(temperature, temperature_factor, i)
    inv_tau = 1.0 / tau
    z_max, z_tau, z_one = _log_sum(row, 0, shared, inv_tau, BLOCK)
    r_max, _, r_one = _log_sum(row, shared, V, inv_tau, BLOCK)
    t_max, t_tau, _ = _log_sum(teacher_at, 0, shared, inv_tau, BLOCK)
    top = tl.maximum(z_max, r_max)
    z_log, t_log = tl.log(z_tau), tl.log(t_tau)
    log_one = tl.log(z_one * tl.exp(z_max.to(tl.float64) - top) + r_one * tl.exp(r_max.to(tl.float64) - top))
    shift = (t_log - z_log).to(tl.float32)
    tl.store(ces + i, (log_one - (z_label - top)).to(tl.float32))
    z_log, t_log = z_log.to(tl.float32), t_log.to(tl.float32)
    unknown = tl.where(t_max > NONE, 0.0, float("nan"))  # a teacher row of only -inf is no distribution: NaN

    terms, scores = tl.zeros((BLOCK,), tl.float32) + unknown, tl.zeros((BLOCK,), tl.float32)
    if (KIND != FORWARD) or (dz is None):
        for start in range(0, shared, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, t = _load_logits(row, v, shared), _load_logits(teacher_at, v, shared)
            term, q, pull = dense_term(z, t, z_max, z_log, t_max, t_log, shift, inv_tau, beta, KIND)
            terms += tl.where(v < shared, term, 0.0)
            scores += tl.where(v < shared, q * pull, 0.0)
    if dz is not None:
        # Loaded only here (the label again), so that they occupy no registers before.
        label, a = tl.load(labels + i), _of_row(ce_weight, ce_factor, i)
        coefficient = _of_row(kl_weight, kl_factor, i) * tau + unknown
        if KIND == JS:
            coefficient *= 1 - beta
        mean = tl.sum(scores, 0)
        at_one = a * tl.exp(-log_one).to(tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, t = _load_logits(row, v, V), _load_logits(teacher_at, v, shared)
            term, q, pull = dense_term(z, t, z_max, z_log, t_max, t_log, shift, inv_tau, beta, KIND)
            if KIND == FORWARD:
                terms += tl.where(v < shared, term, 0.0)
            else:
                pull = q * (pull - mean)
            gradient = tl.where(v < shared, coefficient * pull, 0.0) + at_one * tl.exp(z - top)
            _store_gradient(dz + i * dz_row, gradient, z, v, V, label, a, logit_scale, softcap, HAS_CAP)
    value = tl.sum(terms, 0)
    tl.store(values + i, tl.where(value < 0, 0.0, value))


# ---- weighted losses ----

BLOCK_ROWS = 256  # rows per program


@triton.jit
def weighted_loss_kernel(
    values, ces, losses, kl_weight, ce_weight, temperature, rows, kl_factor, ce_factor, temperature_factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted losses of rows. A separate kernel, because the dense kernel has no registers left for it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    w, a = _of_row(kl_weight, kl_factor, i, inside), _of_row(ce_weight, ce_factor, i, inside)
    tau = _of_row(temperature, temperature_factor, i, inside)
    value, ce = tl.load(values + i, mask=inside), tl.load(ces + i, mask=inside)
    tl.store(losses + i, w * tau * tau * value + a * ce, mask=inside)


# ---- the op ----


def divergence_rows_(
    logits: Tensor,
    dz: Tensor | None,
    labels: Tensor,
    kl_weight: Tensor | None,
    ce_weight: Tensor | None,
    temperature: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    teacher: Tensor | None,
    bias: Tensor | None,
    beta: float,
    logit_scale: float,
    softcap: float | None,
    kl_factor: float = 1.0,
    ce_factor: float = 1.0,
    temperature_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_planes(logits, dz, bias)
    T, V = logits.shape
    labels = _per_row("labels", labels, T, torch.int64).contiguous()
    named = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}
    parameters = [x if x is None else _per_row(n, x, T, torch.float32).contiguous() for n, x in named.items()]
    values, ces, losses = logits.new_empty(T), logits.new_empty(T), logits.new_empty(T)
    bias = None if bias is None else bias.contiguous()
    has_head = bias is not None or logit_scale != 1 or softcap is not None
    kind = (FORWARD if beta == 0 else REVERSE if beta == 1 else JS).value
    factors = (float(kl_factor), float(ce_factor), float(temperature_factor))
    head = (*factors, float(beta), float(logit_scale), float(softcap or 0), has_head, softcap is not None, kind)
    strides = (logits.stride(0), 0 if dz is None else dz.stride(0))
    # JS with a head keeps so much of a block between passes that a wide one does not fit in registers. No autotuning:
    # the block sets the order of the sums, so a choice by timing would make the bits vary between runs.
    widest = 1024 if teacher is not None and has_head and kind == JS.value else 2048
    block = min(max(64, triton.next_power_of_2(V)), widest)
    warps = 8 if block == widest else 4
    if teacher is not None and (ids is None or logprobs is None):
        _per_row("teacher", teacher, T, torch.float32, 2)
        _check_plane("teacher", teacher, T)
        rows = (logits, dz, labels, *parameters, teacher, bias, values, ces, V, min(V, teacher.shape[1]))
        _launch(dense_rows_kernel, (T,), *rows, *strides, teacher.stride(0), *head, block, num_warps=warps)
    else:
        signal = _top_k(ids, logprobs, T) if ids is not None and logprobs is not None else (None, None)
        k = 0 if signal[0] is None else signal[0].shape[1]
        rows = (logits, dz, labels, *parameters, *signal, bias, values, ces, V, k)
        block_k = triton.next_power_of_2(max(k, 2))
        _launch(sparse_rows_kernel, (T,), *rows, *strides, *head, block_k, block, num_warps=warps)
    grid = (triton.cdiv(T, BLOCK_ROWS),)
    _launch(weighted_loss_kernel, grid, values, ces, losses, *parameters, T, *factors, BLOCK_ROWS)
    return values, ces, losses


# ---- checks: labels and ids are not compared with V, which would synchronise with the device ----


def _top_k(ids: Tensor, logprobs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    ids, logprobs = _per_row("ids", ids, rows, torch.int64, 2), _per_row("logprobs", logprobs, rows, torch.float32, 2)
    if ids.shape != logprobs.shape:
        raise ValueError(f"divergence_rows_: ids and logprobs must both be [T, k], got {ids.shape, logprobs.shape}")
    return ids.contiguous(), logprobs.contiguous()


def _per_row(name: str, x: Tensor, rows: int, dtype: torch.dtype, dims: int = 1) -> Tensor:
    if x.dtype != dtype or x.dim() != dims or len(x) != rows:
        wanted = f"{dtype} with one entry per row of logits ({rows}) and dim() == {dims}"
        raise ValueError(f"divergence_rows_: {name} must be {wanted}, got {x.dtype} {list(x.shape)}")
    return x


def _check_plane(name: str, x: Tensor, rows: int) -> None:
    if x.dim() != 2 or len(x) != rows or x.shape[1] == 0 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"divergence_rows_: {name} must be [{rows}, columns] with dense rows; call contiguous() on it")


def _check_planes(logits: Tensor, dz: Tensor | None, bias: Tensor | None) -> None:
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[1] == 0:
        got = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"divergence_rows_: logits must be float32 [T, V] with V > 0, got {got}")
    _check_plane("logits", logits, len(logits))
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != logits.shape[1:]):
        got = f"{bias.dtype} {list(bias.shape)}"
        raise ValueError(f"divergence_rows_: bias must be float32 [{logits.shape[1]}], got {got}")
    if dz is None:
        return
    if dz.dtype not in (torch.float32, torch.bfloat16, torch.float16) or dz.shape != logits.shape:
        raise ValueError(
            "divergence_rows_: dz must be float32, bfloat16 or float16 of the shape of logits, "
            f"{list(logits.shape)}, got {dz.dtype} {list(dz.shape)}"
        )
    _check_plane("dz", dz, len(logits))
    same_memory = dz.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    steps = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in (logits, dz)]
    if same_memory and len(logits) and steps[0] != steps[1]:
        raise ValueError("divergence_rows_: dz may overlap logits only if each row starts where its logits start")
