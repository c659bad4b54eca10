"""The distillation loss, from hidden states to a number and its gradients without ever holding logits [T, V].

    loss_fn = DistillLoss(beta=0.0)
    out = loss_fn(hidden, head_weight, labels, teacher=TopK(ids, logprobs), weight=w, ce_weight=0.1, temperature=tau)
    out.loss.backward()

Rows are taken in chunks: logits of a chunk by one GEMM with fp32 output, one kernel that turns them into losses and
their gradient in place, one GEMM back, which may leave out what hardly counts (`gradient_filter`). On a CPU each row's
values have the same bits whatever the chunk, threads and place of the row; the gradient of a trained head is a sum over
rows, so its last bits follow their order alone.

Shapes: T tokens, H hidden size, V vocabulary, N rows of a signal, k its width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rbfast import ops
from rbfast.loss.teacher_signal import Dense, Signal, TopK, check_signal
from rbfast.ops import reference

Reduction = Literal["mean", "sum", "none"]

# A chunk's logits (student's and teacher's) take at most this much memory, or that of LEAST_ROWS: larger chunks read
# the head fewer times, and a product of fewer rows spends its time on arranging the head, not on multiplying.
CHUNK_BYTES = 40 * 2**20
CHUNK_BYTES_ON_GPU = 768 * 2**20
LEAST_ROWS = 96
# Chunks hold a multiple of this many rows: head_grad_ sums rows in pairs, or by 32, which a chunk must never split.
ROW_MULTIPLE = 32


class LossOutput(NamedTuple):
    """What a loss returns, detached but for `loss`; rows that are ignored have 0.

    Attributes:
        loss: a scalar, or [T] for reduction="none".
        divergence, ce: [T], unweighted.
        filtered: [T]; the gradient of a row's weighted loss in `hidden`, before any mean, lacks at most this much by
            the gradient filter, as a Euclidean norm. 0 without one.
    """

    loss: Tensor
    divergence: Tensor
    ce: Tensor
    filtered: Tensor


class DistillLoss(nn.Module):
    """loss = weight * temperature^2 * D(p, q) + ce_weight * CE(label), over the rows whose label is not `ignore_index`.

    q = softmax(z / temperature) with z the student's logits, p the teacher's distribution, CE at temperature 1.
    D is the forward KL(p, q) for beta=0, the reverse KL(q, p) for beta=1, and between them the generalised
    Jensen-Shannon divergence beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q (which vanishes at both
    ends: near 0 it is beta times the forward KL). Reverse KL counts teacher log-probs below -100 as -100.

    Args:
        beta: in [0, 1].
        ignore_index: rows with this label take no part.
        reduction: "mean" divides by `num_items` where given, else by the number of rows that take part.
        softcap: the student's logits are softcap * tanh(z / softcap), as in Gemma 2.
        logit_scale: multiplies the student's logits (after the bias, before the softcap), as in Cohere's models.
        chunk_rows: rows taken at a time, rounded up to a multiple of 32; by default 40 MiB of logits or
            96 rows, whichever is more; 768 MiB on a GPU.
        gradient_filter: in [0, 1). The gradient of hidden lacks the entries of a row of d loss / d logits that are
            smallest in magnitude, as long as they sum to at most this share of the row. 0.02 saves a CPU most of that
            product, at an error of about 0.02 (docs/results.md); a GPU, which it would save nothing, ignores it.
    """

    def __init__(
        self,
        beta: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        chunk_rows: int | None = None,
        gradient_filter: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1] (0 forward KL, 1 reverse KL, between: JS), got {beta}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1 or None, got {chunk_rows}")
        if not 0 <= gradient_filter < 1:
            raise ValueError(
                f"gradient_filter must be in [0, 1), a share of each row's gradient, got {gradient_filter}"
            )
        self.beta, self.ignore_index, self.reduction = float(beta), ignore_index, reduction
        self.softcap, self.logit_scale, self.chunk_rows = softcap, float(logit_scale), chunk_rows
        self.gradient_filter = float(gradient_filter)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"softcap={self.softcap}, logit_scale={self.logit_scale}, chunk_rows={self.chunk_rows}, "
            f"gradient_filter={self.gradient_filter}"
        )

    @torch.compiler.disable
    def forward(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        teacher: Signal | Sequence[Signal] | None = None,
        weight: float | Tensor = 1.0,
        ce_weight: float | Tensor = 0.0,
        temperature: float | Tensor = 1.0,
        head_bias: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> LossOutput:
        """The loss of a packed batch; gradients flow to hidden, head_weight and head_bias, as far as they ask for them.

        Args:
            hidden: [T, H], fp32, bf16 or fp16 (fp64 runs on the reference); autocast applies as to F.linear.
            head_weight: [V, H]; the logits are hidden @ head_weight.T + head_bias.
            labels: [T] int64, already shifted: labels[i] is the token that hidden[i] predicts.
            teacher: one signal, or several that cover different rows; rows without one are text only (CE alone).
            weight, ce_weight, temperature: floats or [T].
            head_bias: [V].
            num_items: what "mean" divides by, for a mean over several accumulated batches.

        Raises:
            ValueError: shapes, dtypes or values that do not fit; it says which.
        """
        if not torch.is_grad_enabled():  # else the gradients would be computed, for nobody
            hidden, head_weight = hidden.detach(), head_weight.detach()
            head_bias = None if head_bias is None else head_bias.detach()
        if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
        labels = _check_inputs(hidden, head_weight, labels, head_bias, self.ignore_index)
        if num_items is not None and self.reduction != "mean":
            raise ValueError(
                f"num_items is what 'mean' divides by; it has no meaning with reduction={self.reduction!r}"
            )
        rows = torch.nonzero(labels != self.ignore_index).squeeze(1)
        signals = [] if teacher is None else teacher if isinstance(teacher, Sequence) else [teacher]
        if not signals and isinstance(ce_weight, int | float) and ce_weight == 0:
            raise ValueError("there is nothing to learn from: give a teacher, or a ce_weight above 0 for text alone")
        job = _Job(
            labels=labels,
            weight=_per_row(weight, "weight", hidden),
            ce_weight=_per_row(ce_weight, "ce_weight", hidden),
            temperature=_per_row(temperature, "temperature", hidden),
            groups=_group_rows(signals, rows, hidden, head_weight.shape[0]),
            beta=self.beta,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            chunk_rows=self.chunk_rows,
            gradient_filter=self.gradient_filter,
        )
        if not bool((job.temperature > 0).all()):
            raise ValueError("temperature must be positive in every row")
        items = torch.as_tensor(len(rows) if num_items is None else num_items, device=hidden.device).clamp_min(1)
        divisor = items if self.reduction == "mean" else torch.ones_like(items)
        with torch.autocast(hidden.device.type, enabled=False):
            return LossOutput(*_FusedLoss.apply(hidden, head_weight, head_bias, job, self.reduction, divisor))


class _Group(NamedTuple):
    """Rows that share a signal (None: text only): rows [n] into the T axis, entries [n] into the signal's N axis."""

    rows: Tensor
    signal: Signal | None
    entries: Tensor | None


@dataclass(frozen=True)
class _Job:
    """All of a loss that is not differentiated. labels, weight, ce_weight, temperature: [T]."""

    labels: Tensor
    weight: Tensor
    ce_weight: Tensor
    temperature: Tensor
    groups: list[_Group]
    beta: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int | None
    gradient_filter: float


class _Solution(NamedTuple):
    """Per-row values [T] and unreduced gradients: d_hidden [T, H], d_weight [V, H], d_bias [V]; None if not wanted.

    left_out: the summed magnitude of the entries of d loss / d logits that d_hidden lacks.
    """

    divergence: Tensor
    ce: Tensor
    left_out: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def _solve(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, wanted: tuple[bool, bool, bool]
) -> _Solution:
    """Runs the chunks; `wanted` says which of the gradients of hidden, weight and bias to compute."""
    wide = reference.wide(hidden[:0]).dtype
    run: Any = reference if wide == torch.float64 else ops
    weight, bias = weight.detach(), None if bias is None else bias.detach().to(wide)
    solution = _Solution(
        *(torch.zeros(len(hidden), dtype=wide, device=hidden.device) for _ in range(3)),
        *(
            torch.zeros(x.shape, dtype=wide, device=x.device) if asked and x is not None else None
            for x, asked in zip((hidden, weight, bias), wanted, strict=True)
        ),
    )
    for group in job.groups:
        columns = [len(weight)] + ([group.signal.vocabulary] if isinstance(group.signal, Dense) else [])
        memory = CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES_ON_GPU
        fitting = memory // (wide.itemsize * sum(columns)) // ROW_MULTIPLE * ROW_MULTIPLE
        step = -(-job.chunk_rows // ROW_MULTIPLE) * ROW_MULTIPLE if job.chunk_rows else max(LEAST_ROWS, fitting)
        step = min(step, len(group.rows))
        # One allocation for all chunks: touching fresh memory would cost a third of the product that fills it.
        room = [torch.empty(step, n, dtype=wide, device=hidden.device) for n in columns]
        for start in range(0, len(group.rows), step):
            part = slice(start, min(start + step, len(group.rows)))
            views = [x[: part.stop - start] for x in room]
            _solve_chunk(run, hidden, weight, bias, job, group, part, views, solution)
    return solution


def _solve_chunk(
    run: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    job: _Job,
    group: _Group,
    part: slice,
    room: list[Tensor],
    solution: _Solution,
) -> None:
    """Adds some rows of a group to the solution. room: where to put their logits, and a dense teacher's."""
    rows = group.rows[part]
    x = hidden.detach().index_select(0, rows)
    logits = room[0]
    run.head_forward_(logits, x, weight)
    ids = logprobs = teacher_logits = None
    if isinstance(group.signal, TopK) and group.entries is not None:
        ids, logprobs = group.signal.ids[group.entries[part]], group.signal.logprobs[group.entries[part]]
    elif isinstance(group.signal, Dense) and group.entries is not None:
        teacher_logits = room[1]
        group.signal.write_logits_(teacher_logits, group.entries[part], run)
    dz = None
    if solution[3:] != (None, None, None):
        # The gradient takes the place of the logits; in bf16 it fills the first half of each row's memory.
        narrow = hidden.dtype == weight.dtype == torch.bfloat16
        dz = logits.view(torch.bfloat16)[:, : logits.shape[1]] if narrow else logits
    parameters = (job.labels[rows], job.weight[rows], job.ce_weight[rows], job.temperature[rows])
    solution.divergence[rows], solution.ce[rows] = run.divergence_rows_(
        logits, dz, *parameters, ids, logprobs, teacher_logits, bias, job.beta, job.logit_scale, job.softcap
    )
    if solution.d_hidden is not None:
        thresholds = None
        if job.gradient_filter > 0 and hidden.device.type == "cpu":
            thresholds, solution.left_out[rows] = run.row_thresholds(dz, job.gradient_filter)
        solution.d_hidden[rows] = run.head_backward(dz, weight, thresholds)
    if solution.d_weight is not None:
        run.head_grad_(solution.d_weight, dz, x)
    if solution.d_bias is not None:
        run.head_grad_(solution.d_bias.unsqueeze(1), dz, x.new_ones(len(x), 1))


class _FusedLoss(torch.autograd.Function):
    """Computes the gradients in forward, where the logits are, and scales them in backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: _Job,
        reduction: Reduction,
        divisor: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ctx.job, ctx.reduction, ctx.divisor = job, reduction, divisor
        # With reduction="none" the head's gradient depends on every row's upstream gradient: backward computes it.
        ctx.recompute_head = reduction == "none" and (wants_weight or wants_bias)
        wanted = (wants_hidden, wants_weight and not ctx.recompute_head, wants_bias and not ctx.recompute_head)
        solution = _solve(hidden, weight, bias, job, wanted)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.gradients = solution[3:]
        if ctx.recompute_head:
            ctx.save_for_backward(hidden, weight, bias)
        loss = job.weight * job.temperature**2 * solution.divergence + job.ce_weight * solution.ce
        filtered = _norm_bound(solution.left_out, weight)
        ctx.mark_non_differentiable(solution.divergence, solution.ce, filtered)
        return _reduce(loss, reduction, divisor), solution.divergence, solution.ce, filtered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale = upstream / ctx.divisor
        d_hidden, d_weight, d_bias = ctx.gradients
        if ctx.recompute_head:
            hidden, weight, bias = ctx.saved_tensors
            job = replace(ctx.job, weight=ctx.job.weight * scale, ce_weight=ctx.job.ce_weight * scale)
            wanted = (False, ctx.needs_input_grad[1], ctx.needs_input_grad[2])
            solution = _solve(hidden, weight, bias, job, wanted)
            d_weight, d_bias = solution.d_weight, solution.d_bias
        else:
            d_weight, d_bias = (None if d is None else d * scale for d in (d_weight, d_bias))
        if d_hidden is not None:
            d_hidden = d_hidden * (scale.unsqueeze(1) if ctx.reduction == "none" else scale)
        gradients = zip((d_hidden, d_weight, d_bias), ctx.dtypes, strict=True)
        return (*(None if d is None else d.to(dtype) for d, dtype in gradients), None, None, None)


def _norm_bound(left_out: Tensor, weight: Tensor) -> Tensor:
    """Upper bounds [T] of the norms of rows of dz W, where dz sums in magnitude to left_out [T] by row; W is [V, H]."""
    if not bool(left_out.any()):
        return left_out
    longest = reference.wide(torch.linalg.vector_norm(weight.detach(), dim=1).max())
    return torch.where(left_out > 0, left_out * (1.01 * longest), 0.0)  # 1.01: norms are rounded to the head's dtype


def _reduce(loss: Tensor, reduction: Reduction, divisor: Tensor) -> Tensor:
    if reduction == "none":
        return loss
    # Sorted, so that the order in which rows were packed does not reach the last bit.
    return (loss.sort().values.double().sum() / divisor).to(loss.dtype)


def _check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int) -> Tensor:
    """Labels as int64; raises where shapes, dtypes or labels do not fit."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [T, H], got {tuple(hidden.shape)}; flatten batch and sequence first")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head_weight must be [V, {hidden.shape[1]}] to match hidden, got {tuple(weight.shape)}")
    for name, x in (("hidden", hidden), ("head_weight", weight)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"hidden and head_weight must both be float64 or neither, got {hidden.dtype}, {weight.dtype}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [T] = [{len(hidden)}], one per row of hidden, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.to(torch.int64)
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= len(weight)))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {len(weight)}) or ignore_index {ignore_index}, got {int(labels[row])} at row {row}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"head_bias must be [V] = [{len(weight)}], got {tuple(bias.shape)}")
    return labels


def _per_row(value: float | Tensor, name: str, hidden: Tensor) -> Tensor:
    """A float or [T] tensor as [T], detached, in the accumulation dtype."""
    value = torch.as_tensor(value, device=hidden.device).detach().to(reference.wide(hidden[:0]).dtype)
    if value.dim() > 0 and value.shape != hidden.shape[:1]:
        raise ValueError(f"{name} must be a float or [T] = [{len(hidden)}], got {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite in every row")
    return value.expand(len(hidden)).contiguous()


def _group_rows(signals: Sequence[Signal], rows: Tensor, hidden: Tensor, vocabulary: int) -> list[_Group]:
    """Splits the rows that take part by signal. Raises where two signals claim one row, or a signal does not fit."""
    owner = torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
    takes_part = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    takes_part[rows] = True
    groups = []
    for number, signal in enumerate(signals):
        signal = check_signal(signal, vocabulary, hidden)
        claimed = signal.rows
        assert claimed is not None  # check_signal fills it in
        counts = torch.bincount(claimed, minlength=len(hidden)) + (owner >= 0)
        if bool((counts > 1).any()):
            raise ValueError(
                f"row {int((counts > 1).nonzero()[0])} has more than one teacher signal; give each row one"
            )
        owner[claimed] = number
        entries = torch.nonzero(takes_part[claimed]).squeeze(1)
        groups.append(_Group(claimed[entries], signal, entries))
    text = rows[owner[rows] < 0]
    return [group for group in (*groups, _Group(text, None, None)) if len(group.rows)]
