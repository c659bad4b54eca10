"""The plain-torch definition of every op: readable, for any floating dtype up to fp64, and the oracle of the tests.

Shapes: T tokens, `in`/`out` features of a frozen weight [out, in], s columns in the support, k the rank, V vocabulary;
E experts, and S rows sorted by expert, of which those of expert e end at ends[e].
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rbfast.ops.dtypes import wide


def column_gather(x: Tensor, cols: Tensor, run: int = 1) -> Tensor:
    """A copy [T, s] of the support's columns of x [T, in]. (`run` only helps faster kernels; unused here and below.)"""
    return x.index_select(1, cols)


def column_grad(dy: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of A [k, s] and B [out, k] in `y += scale * (xs A^T) B^T`, given dy [T, out] and xs [T, s]."""
    dy, xs, A, B = wide(dy), wide(xs), wide(A), wide(B)
    dB = scale * (dy.T @ (xs @ A.T))
    dA = scale * ((dy @ B).T @ xs)
    return dA, dB


def column_grad_all(
    dy: Sequence[Tensor], xs: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """column_grad for many matrices that share xs: lists of dA and of dB.

    Calls column_grad for each matrix, through the dispatcher. A native kernel saves those calls.
    """
    calls = zip(dy, [xs] * len(dy), A, B, strict=True)
    results = [torch.ops.rbfast.column_grad(*tensors, scale) for tensors in calls]
    return [dA for dA, _ in results], [dB for _, dB in results]


def column_linear_(y: Tensor, xs: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Adds the delta beside the weight: y [T, out] += scale * (xs A^T) B^T."""
    y.copy_(wide(y) + scale * (wide(xs) @ wide(A).T) @ wide(B).T)


def column_scatter_(dx: Tensor, dy: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1) -> None:
    """Adds the delta's part of the input gradient: dx[:, cols] += scale * (dy B) A, with dx [T, in], dy [T, out]."""
    delta = scale * (wide(dy) @ wide(B)) @ wide(A)
    dx[:, cols] = (wide(dx[:, cols]) + delta).to(dx.dtype)


def column_fold_(
    weight: Tensor, base_columns: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1
) -> None:
    """Writes the delta into the weight [out, in]: weight[:, cols] = cast(base_columns + scale * B A).

    The sum over k runs in order, and each product is rounded before it is added, so a fold gives the same bits on every
    machine. With k = 0 the base columns are copied bit by bit.
    """
    if len(A) == 0:
        weight[:, cols] = base_columns
        return
    delta = torch.zeros_like(wide(base_columns))
    for b, a in zip((scale * wide(B)).unbind(1), wide(A).unbind(0), strict=True):
        delta = delta + torch.outer(b, a)
    weight[:, cols] = (wide(base_columns) + delta).to(weight.dtype)


def column_fold_all_(
    weights: Sequence[Tensor],
    base_columns: Sequence[Tensor],
    cols: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: float,
    runs: Sequence[int],
) -> None:
    """column_fold_ for many matrices on one device; the i-th entries of the lists belong together.

    Calls column_fold_ for each matrix, through the dispatcher. A native kernel saves those calls.
    """
    for *tensors, run in zip(weights, base_columns, cols, A, B, runs, strict=True):
        torch.ops.rbfast.column_fold_(*tensors, scale, run)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y [S, out] = x W_e^T for the rows x [S, in] of each expert e, with weight [E, out, in]."""
    is_aligned = not (weight.shape[1] % 8 or weight.shape[2] % 8)  # to 16 bytes, which the kernel requires
    if x.is_cuda and x.dtype == torch.bfloat16 and is_aligned:
        return torch.nn.functional.grouped_mm(x.contiguous(), weight.mT, offs=ends.to(torch.int32))
    y = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in rows_of_experts(ends):
        torch.mm(x[rows], weight[expert].T, out=y[rows])
    return y


def grouped_column_grad(
    dy: Tensor, xs: Tensor, ends: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """column_grad for each expert: gradients of A [E, k, s] and B [E, out, k], given dy [S, out] and xs [S, s]."""
    dA, dB = A.new_zeros(A.shape), B.new_zeros(B.shape)
    for expert, rows in rows_of_experts(ends):
        dA[expert], dB[expert] = torch.ops.rbfast.column_grad(dy[rows], xs[rows], A[expert], B[expert], scale)
    return dA, dB


def grouped_column_linear_(y: Tensor, xs: Tensor, ends: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """column_linear_ for each expert: y [S, out] += scale * (xs A_e^T) B_e^T."""
    for expert, rows in rows_of_experts(ends):
        torch.ops.rbfast.column_linear_(y[rows], xs[rows], A[expert], B[expert], scale)


def grouped_column_scatter_(
    dx: Tensor, dy: Tensor, ends: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1
) -> None:
    """column_scatter_ for each expert: dx [S, in][:, cols] += scale * (dy B_e) A_e."""
    for expert, rows in rows_of_experts(ends):
        torch.ops.rbfast.column_scatter_(dx[rows], dy[rows], cols, A[expert], B[expert], scale, run)


def grouped_column_fold_(
    weight: Tensor, base_columns: Tensor, cols: Tensor, A: Tensor, B: Tensor, scale: float, run: int = 1
) -> None:
    """column_fold_ for each expert, into weight [E, out, in], with base_columns [E, out, s]."""
    parts = [list(stack.unbind()) for stack in (weight, base_columns, A, B)]
    experts = len(weight)
    torch.ops.rbfast.column_fold_all_(*parts[:2], [cols] * experts, *parts[2:], scale, [run] * experts)


def rows_of_experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each expert that has rows. Reads `ends` on the host."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def head_forward_(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Sets logits [T, V], fp32 or wider, to hidden [T, H] times the head [V, H]^T."""
    torch.mm(wide(hidden), wide(weight).T, out=logits)


def head_backward_(d_hidden: Tensor, dz: Tensor, weight: Tensor, thresholds: Tensor | None = None) -> None:
    """Sets d_hidden [T, H], fp32 or wider, to dz [T, V] weight [V, H], the gradient of hidden.

    Entries of dz smaller in magnitude than the threshold [T] of their row count as 0.
    """
    torch.mm(wide(zero_below(dz, thresholds)), wide(weight), out=d_hidden)


def zero_below(dz: Tensor, thresholds: Tensor | None) -> Tensor:
    """dz [T, V] with entries smaller in magnitude than the threshold [T] of their row set to 0."""
    return dz if thresholds is None else dz.masked_fill(wide(dz).abs() < thresholds.unsqueeze(1), 0.0)


THRESHOLDS = tuple(2.0**-n for n in range(8, 16))  # candidates, as fractions of the sum that may be left out
_SUM_ERROR = 2.0**-12  # exceeds the relative rounding error of sums in fp32


def row_thresholds(dz: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(thresholds [T], left_out [T]). In each row of dz [T, V] the entries below the threshold sum, in magnitude, to at
    most `share` of the row's sum.

    The threshold is the largest of THRESHOLDS for which this holds, or the smallest positive number. left_out is the
    sum of the entries below it, rounded up. Infinities and NaNs are below no threshold and are not in the sums.
    """
    size = wide(dz).abs()
    allowed = share * size.masked_fill(~size.isfinite(), 0.0).sum(1, dtype=torch.float64)
    left_out = size.new_zeros(len(size))
    thresholds = torch.nextafter(left_out, torch.ones_like(left_out))
    for part in reversed(THRESHOLDS):
        limit = part * allowed.to(size.dtype)
        bound = (1 + _SUM_ERROR) * size.masked_fill(~(size < limit.unsqueeze(1)), 0.0).sum(1, dtype=torch.float64)
        holds = (bound <= allowed) & (limit > thresholds) & limit.isfinite()
        thresholds, left_out = torch.where(holds, limit, thresholds), torch.where(holds, bound.to(size.dtype), left_out)
    return thresholds, left_out


def head_grad_(dW: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """Adds the head's gradient: dW [V, H] += dz^T hidden, with dz [T, V], hidden [T, H] and dW in fp32 or wider."""
    dW += wide(dz).T @ wide(hidden)


def scaled_(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """Sets out, which may be x, to x * factor. factor is one number in fp32 or wider, and so are the products."""
    torch.mul(x, factor.reshape(1), out=out)


# The kernels clamp the student's logits here: a weight of 0 times a loss of infinity would be NaN.
LEAST_LOGIT = -1e30
# Reverse KL needs log p of every token the student may produce. It is clamped here, as in binary_cross_entropy.
LOG_FLOOR = -100.0


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D(p, q) [T] over buckets [T, n] and its gradient [T, n] in the logits of q.

    Each is a sum of terms that are >= 0 one by one, so rounding never makes it negative: p log(p/q) - p + q for forward
    KL (beta = 0), q log(q/p) - q + p for reverse KL (beta = 1), and between them the generalised Jensen-Shannon
    divergence beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q (Agarwal et al. 2024, section 2). The
    two ends are not its limits, which are 0: JS(beta) / beta tends to the forward and JS(beta) / (1 - beta) to the
    reverse KL.
    """
    p, q = log_p.exp(), log_q.exp()

    def terms(log_a: Tensor, a: Tensor, log_b: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (log_a - log_b), 0.0) - a + b

    if beta == 0:
        return terms(log_p, p, log_q, q).sum(1).clamp_min(0), q - p
    if beta == 1:
        log_p = torch.where(q > 0, log_p.clamp_min(LOG_FLOOR), log_p)
        p = log_p.exp()
        score = torch.where(q > 0, log_q - log_p, 0.0)
        return terms(log_q, q, log_p, p).sum(1).clamp_min(0), q * (score - (q * score).sum(1, keepdim=True))
    m = beta * p + (1 - beta) * q
    value = beta * terms(log_p, p, m.log(), m) + (1 - beta) * terms(log_q, q, m.log(), m)
    score = torch.where(q > 0, log_q - m.log(), 0.0)
    return value.sum(1).clamp_min(0), (1 - beta) * q * (score - (q * score).sum(1, keepdim=True))


def _dense_rows(z: Tensor, teacher: Tensor, tau: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D [T] and its gradient [T, V] in z/tau, over the ids in both vocabularies, renormalised on both sides."""
    shared = min(z.shape[1], teacher.shape[1])
    log_p, log_q = (torch.log_softmax(x[:, :shared] / tau, 1) for x in (teacher.double(), z))
    value, gradient = divergence(log_p, log_q, beta)
    return value, torch.nn.functional.pad(gradient, (0, z.shape[1] - shared))


def _top_k_rows(z: Tensor, ids: Tensor, logprobs: Tensor, tau: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D [T] over k + 1 buckets, the last one for all ids outside the support, and its gradient [T, V] in z/tau.

    Entries with id -1 are padding. The teacher's log-probs are at temperature 1. At another tau, its unseen tail gets
    the student's shape r: sum_v (p_tail r_v)^(1/tau), constant in the gradient; so D is 0 if both agree.
    """
    used = ids >= 0
    columns = ids.clamp_min(0)
    log_p = logprobs.double().masked_fill(~used, -torch.inf)
    log_total = torch.logsumexp(torch.cat([log_p, log_p.new_full((len(z), 1), -torch.inf)], 1), 1, keepdim=True)
    log_p = log_p - log_total.clamp_min(0)  # if rounding took the total over 1, scale it back
    log_p_tail = torch.log1p(-log_total.clamp_max(0).exp())

    in_support = torch.zeros_like(z, dtype=torch.int64).scatter_add(1, columns, used.long()) > 0
    tail = z.masked_fill(in_support | (z <= LEAST_LOGIT), -torch.inf)
    log_tail, log_tail_1 = torch.logsumexp(tail / tau, 1, keepdim=True), torch.logsumexp(tail, 1, keepdim=True)
    log_q = torch.cat([(z.gather(1, columns) / tau).masked_fill(~used, -torch.inf), log_tail], 1)
    log_q = torch.log_softmax(log_q, 1)
    log_shape = torch.where(log_tail_1 > -torch.inf, log_tail - log_tail_1 / tau, -torch.inf)
    log_p = torch.log_softmax(torch.cat([log_p / tau, log_p_tail / tau + log_shape], 1), 1)

    value, gradient = divergence(log_p, log_q, beta)
    inside_tail = torch.where(tail == -torch.inf, 0.0, (tail / tau - log_tail).exp())
    return value, (inside_tail * gradient[:, -1:]).scatter_add(1, columns, gradient[:, :-1].masked_fill(~used, 0.0))


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
    """Divergence, cross-entropy and loss [T] of rows of logits [T, V], and the gradient of the summed loss.

    With z = cap(logit_scale * (logits + bias)), cap(x) = softcap * tanh(x / softcap), and q = softmax(z / temperature):
    loss = kl_weight * temperature^2 * D(p, q) + ce_weight * CE(softmax(z), label), D as in `divergence`.
    The teacher's p is given by ids [T, k] (-1 is padding, no id twice) and logprobs [T, k], or by its logits
    teacher [T, V']. Without either (text only) D is 0. labels are [T]; so are kl_weight, ce_weight and temperature, or
    None for 1 in every row. Each of the three is multiplied by the factor of its name.

    dz [T, V] receives d loss / d logits; it may share memory with logits. The content of logits is lost either way.
    """
    z = logits.double()
    z = logit_scale * (z if bias is None else z + bias.double())
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)).clamp_min(LEAST_LOGIT)
    kl_weight, ce_weight, tau = (
        (torch.ones_like(z[:, 0]) if x is None else x.double()).mul(factor).unsqueeze(1)
        for x, factor in ((kl_weight, kl_factor), (ce_weight, ce_factor), (temperature, temperature_factor))
    )
    if ids is not None and logprobs is not None:
        value, gradient = _top_k_rows(z, ids, logprobs, tau, beta)
    elif teacher is not None:
        value, gradient = _dense_rows(z, teacher, tau, beta)
    else:
        value, gradient = z.new_zeros(len(z)), torch.zeros_like(z)
    log_q = torch.log_softmax(z, 1)
    label = labels.unsqueeze(1)
    ce = -log_q.gather(1, label).squeeze(1)
    if dz is not None:
        gradient = kl_weight * tau * gradient
        gradient += ce_weight * log_q.exp().scatter_add(1, label, -torch.ones_like(tau))
        gradient *= logit_scale * (1.0 if softcap is None else 1 - (z / softcap) ** 2)
        dz.copy_(gradient)
    loss = (kl_weight * tau**2).squeeze(1) * value + ce_weight.squeeze(1) * ce
    return value.to(logits.dtype), ce.to(logits.dtype), loss.to(logits.dtype)
