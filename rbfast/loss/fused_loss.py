"""The chunked work of DistillLoss: losses of rows and their gradients, without ever holding logits [T, V].

Rows are taken in chunks: logits of a chunk by one GEMM with fp32 output, one kernel that turns them into losses and
their gradient in place, one GEMM back, which may leave out negligible entries (`gradient_filter`). On a CPU each row's
values have the same bits whatever the chunk, threads and place of the row; the gradient of a trained head is a sum over
rows, so its last bits follow their order alone.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rbfast import ops
from rbfast.loss.row_groups import RowGroup
from rbfast.loss.teacher_signal import Dense, TopK
from rbfast.ops import reference

Reduction = Literal["mean", "sum", "none"]

# A chunk's logits (student's and teacher's) take at most this much memory, or that of LEAST_ROWS: larger chunks read
# the head fewer times, and a product of fewer rows spends its time on arranging the head, not on multiplying.
CHUNK_BYTES = 40 * 2**20
CHUNK_BYTES_ON_GPU = 768 * 2**20
LEAST_ROWS = 96
# Chunks hold a multiple of this many rows: head_grad_ sums rows in pairs, or by 32, which a chunk must never split.
ROW_MULTIPLE = 32


class LossOps(Protocol):
    """The ops a loss is made of: the registry's, or the reference for fp64."""

    def head_forward_(self, logits: Tensor, hidden: Tensor, weight: Tensor, /) -> None: ...
    def head_backward(self, dz: Tensor, weight: Tensor, thresholds: Tensor | None, /) -> Tensor: ...
    def head_grad_(self, dW: Tensor, dz: Tensor, hidden: Tensor, /) -> None: ...
    def row_thresholds(self, dz: Tensor, share: float, /) -> tuple[Tensor, Tensor]: ...
    def divergence_rows_(
        self,
        logits: Tensor,
        dz: Tensor | None,
        labels: Tensor,
        kl_weight: Tensor,
        ce_weight: Tensor,
        temperature: Tensor,
        ids: Tensor | None,
        logprobs: Tensor | None,
        teacher: Tensor | None,
        bias: Tensor | None,
        beta: float,
        logit_scale: float,
        softcap: float | None,
        /,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Job:
    """All of a loss that is not differentiated. labels: [T]; parameters: [3, T], kl_weight, ce_weight, temperature."""

    labels: Tensor
    parameters: Tensor
    groups: list[RowGroup]
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

    @property
    def wants_gradient(self) -> bool:
        return any(d is not None for d in (self.d_hidden, self.d_weight, self.d_bias))


def _solve(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, wanted: tuple[bool, bool, bool]) -> _Solution:
    """Runs the chunks; `wanted` says which of the gradients of hidden, weight and bias to compute."""
    wide = reference.wide(hidden[:0]).dtype
    loss_ops: LossOps = reference if wide == torch.float64 else ops
    hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach().to(wide)
    solution = _Solution(
        *torch.zeros(3, len(hidden), dtype=wide, device=hidden.device).unbind(),
        *(
            torch.zeros(x.shape, dtype=wide, device=x.device) if asked and x is not None else None
            for x, asked in zip((hidden, weight, bias), wanted, strict=True)
        ),
    )
    for group in job.groups:
        columns = [len(weight)] + ([group.signal.vocabulary] if isinstance(group.signal, Dense) else [])
        step = _chunk_rows(job, group, wide.itemsize * sum(columns), hidden.device)
        # One allocation for all chunks: touching fresh memory would cost a third of the product that fills it.
        room = [torch.empty(step, n, dtype=wide, device=hidden.device) for n in columns]
        for start in range(0, group.size, step):
            part = slice(start, min(start + step, group.size))
            views = [x[: part.stop - start] for x in room]
            _solve_chunk(loss_ops, hidden, weight, bias, job, group, part, views, solution)
    return solution


def _chunk_rows(job: Job, group: RowGroup, row_bytes: int, device: torch.device) -> int:
    """How many rows of a group to take at a time."""
    step = -(-job.chunk_rows // ROW_MULTIPLE) * ROW_MULTIPLE if job.chunk_rows else _usual_rows(row_bytes, device)
    return min(step, group.size)


def _usual_rows(row_bytes: int, device: torch.device) -> int:
    memory = CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_ON_GPU
    return max(LEAST_ROWS, memory // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)


def logits_bytes(tokens: int, vocabulary: int, device: torch.device) -> int:
    """What the logits take that exist at a time, of so many tokens over so many entries (both models')."""
    row_bytes = 4 * vocabulary
    return min(tokens, _usual_rows(row_bytes, device)) * row_bytes


def _at(index: Tensor | None, part: slice) -> Tensor | slice:
    return part if index is None else index[part]


def _solve_chunk(
    loss_ops: LossOps,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    job: Job,
    group: RowGroup,
    part: slice,
    room: list[Tensor],
    solution: _Solution,
) -> None:
    """Adds some rows of a group to the solution. room: where to put their logits, and a dense teacher's."""
    rows, entries = _at(group.rows, part), _at(group.entries, part)
    x = hidden[rows]
    logits = room[0]
    loss_ops.head_forward_(logits, x, weight)
    ids = logprobs = teacher_logits = None
    if isinstance(group.signal, TopK):
        ids, logprobs = group.signal.ids[entries], group.signal.logprobs[entries]
    elif isinstance(group.signal, Dense):
        teacher_logits = room[1]
        group.signal.write_logits_(teacher_logits, entries, loss_ops.head_forward_)
    dz = None
    if solution.wants_gradient:
        # The gradient takes the place of the logits; in bf16 it fills the first half of each row's memory.
        narrow = hidden.dtype == weight.dtype == torch.bfloat16
        dz = logits.view(torch.bfloat16)[:, : logits.shape[1]] if narrow else logits
    kl_weight, ce_weight, temperature = job.parameters[:, rows]
    solution.divergence[rows], solution.ce[rows] = loss_ops.divergence_rows_(
        logits,
        dz,
        job.labels[rows],
        kl_weight,
        ce_weight,
        temperature,
        ids,
        logprobs,
        teacher_logits,
        bias,
        job.beta,
        job.logit_scale,
        job.softcap,
    )
    if dz is None:
        return
    if solution.d_hidden is not None:
        thresholds = None
        if job.gradient_filter > 0 and hidden.device.type == "cpu":
            thresholds, solution.left_out[rows] = loss_ops.row_thresholds(dz, job.gradient_filter)
        solution.d_hidden[rows] = loss_ops.head_backward(dz, weight, thresholds)
    if solution.d_weight is not None:
        loss_ops.head_grad_(solution.d_weight, dz, x)
    if solution.d_bias is not None:
        loss_ops.head_grad_(solution.d_bias.unsqueeze(1), dz, x.new_ones(len(x), 1))


class FusedLoss(torch.autograd.Function):
    """Computes the gradients in forward, where the logits are, and scales them in backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: Job,
        reduction: Reduction,
        divisor: int | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ctx.job, ctx.reduction, ctx.divisor = job, reduction, divisor
        # With reduction="none" the head's gradient depends on every row's upstream gradient: backward computes it.
        ctx.recompute_head = reduction == "none" and (wants_weight or wants_bias)
        wanted = (wants_hidden, wants_weight and not ctx.recompute_head, wants_bias and not ctx.recompute_head)
        solution = _solve(hidden, weight, bias, job, wanted)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.gradients = (solution.d_hidden, solution.d_weight, solution.d_bias)
        if ctx.recompute_head:
            ctx.save_for_backward(hidden, weight, bias)
        kl_weight, ce_weight, temperature = job.parameters
        loss = kl_weight * temperature**2 * solution.divergence + ce_weight * solution.ce
        filtered = job.gradient_filter > 0 and wants_hidden
        error_bound = _norm_bound(solution.left_out, weight) if filtered else solution.left_out
        ctx.mark_non_differentiable(solution.divergence, solution.ce, error_bound)
        return _reduce(loss, reduction, divisor), solution.divergence, solution.ce, error_bound

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale = upstream / ctx.divisor
        d_hidden, d_weight, d_bias = ctx.gradients
        if ctx.recompute_head:
            hidden, weight, bias = ctx.saved_tensors
            job = replace(ctx.job, parameters=torch.cat([ctx.job.parameters[:2] * scale, ctx.job.parameters[2:]]))
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
    longest = reference.wide(torch.linalg.vector_norm(weight.detach(), dim=1).max())
    return torch.where(left_out > 0, left_out * (1.01 * longest), 0.0)  # 1.01: norms are rounded to the head's dtype


def _reduce(loss: Tensor, reduction: Reduction, divisor: int | Tensor) -> Tensor:
    if reduction == "none":
        return loss
    # Sorted, so that the order in which rows were packed does not reach the last bit.
    return (loss.sort().values.double().sum() / divisor).to(loss.dtype)
