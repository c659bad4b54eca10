"""The chunked work of DistillLoss: losses of rows and their gradient, without ever holding logits [T, V].

Rows are taken in chunks: logits of a chunk by one GEMM with fp32 output, then one kernel that turns them into losses
and their gradient dz. The GEMMs back, which may leave out negligible entries (`gradient_filter`), take the dz of a
chunk or, on a GPU, of several. On a CPU each row's values have the same bits whatever the chunk, threads and place of
the row; the gradient of a trained head is a sum over rows, so its last bits follow their order alone.

Shapes: T tokens, n of them take part, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rbfast import ops
from rbfast.loss.chunking import CPU_BYTES, TILES_BYTES, Chunking, chunk_on_cpu, chunk_on_gpu, chunk_trained_head
from rbfast.loss.row_groups import RowGroup, TakenRows
from rbfast.loss.teacher_signal import Dense, TopK
from rbfast.ops import reference
from rbfast.ops.dtypes import wide_dtype
from rbfast.ops.head_gemm import head_grad_rounded_

HeadForward = Callable[[Tensor, Tensor, Tensor], None]  # the op head_forward_


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
    """All of a loss that is not differentiated, for the rows that take part.

    labels: [n]; parameters: [3, n], kl_weight and ce_weight, both divided by `divisor`, and temperature.
    """

    labels: Tensor
    parameters: Tensor
    taken: TakenRows
    divisor: int | Tensor
    beta: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int | None
    gradient_filter: float


class Solution(NamedTuple):
    """Values [n] of the rows that take part, and the gradients of hidden, weight and bias; None if not wanted.

    left_out: the summed magnitude of the entries of dz that the gradient of hidden lacks; None without a filter.
    """

    divergence: Tensor
    ce: Tensor
    left_out: Tensor | None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


Inputs = tuple[Tensor, Tensor, Tensor | None]
SignalOfRows = tuple[Tensor | None, Tensor | None, Tensor | None]  # ids, log-probs, a teacher's logits


def solve(inputs: Inputs, job: Job, wanted: tuple[bool, bool, bool]) -> Solution:
    """Runs the chunks on inputs hidden, weight and bias; `wanted` says which of their gradients to compute."""
    return _Solver(*inputs, job, wanted).solution()


class _Solver:
    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, wanted: tuple[bool, bool, bool]
    ) -> None:
        self.job, self.hidden, self.weight = job, hidden.detach(), weight.detach()
        self.dtype = wide_dtype(hidden.dtype)
        self.ops: LossOps = reference if self.dtype == torch.float64 else ops
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.is_narrow = hidden.dtype == weight.dtype == torch.bfloat16
        self.wants_gradient = any(wanted)
        self.teacher_columns = max((group.columns_beside(len(weight)) for group in job.taken.groups), default=0)
        self.chunking = self._choose_chunking(trains_head=wanted[1])
        wants_hidden, wants_weight, wants_bias = wanted
        self.d_hidden = self._make_d_hidden() if wants_hidden else None
        self.d_weight = self._make_d_weight() if wants_weight else None
        self.d_bias = None if self.bias is None or not wants_bias else torch.zeros_like(self.bias)
        self.values: list[tuple[Tensor, Tensor]] = []
        self.left_out: list[Tensor] = []

    def _choose_chunking(self, trains_head: bool) -> Chunking:
        rows, V = self.job.taken.size, self.weight.shape[0]
        row_bytes, asked = self.dtype.itemsize * (V + self.teacher_columns), self.job.chunk_rows
        if not _is_gpu(self.hidden):
            memory = TILES_BYTES if ops.uses_tiles(self.hidden, self.weight) else CPU_BYTES
            return chunk_on_cpu(rows, row_bytes, asked, memory)
        if trains_head and self.is_narrow:
            return chunk_trained_head(rows, row_bytes, asked, self.weight.shape)
        return chunk_on_gpu(rows, row_bytes, asked)

    def _make_d_hidden(self) -> Tensor:
        is_filled = self.job.taken.order is None and self.job.taken.size
        return (torch.empty_like if is_filled else torch.zeros_like)(self.hidden, dtype=self.dtype)

    def _make_d_weight(self) -> Tensor:
        is_filled = self.chunking.rounds_sum and self.job.taken.size
        dtype = self.weight.dtype if self.chunking.rounds_sum else self.dtype
        make = torch.empty if is_filled else torch.zeros
        return make(self.weight.shape, dtype=dtype, device=self.weight.device)

    def solution(self) -> Solution:
        self._run()
        gradients = (self.d_hidden, self.d_weight, self.d_bias)
        if not self.values:
            return Solution(self.job.parameters[0], self.job.parameters[0], None, gradients)
        divergence, ce = (_joined(parts) for parts in zip(*self.values, strict=True))
        return Solution(divergence, ce, _joined(self.left_out) if self.left_out else None, gradients)

    def _run(self) -> None:
        # One allocation for all chunks: touching fresh memory would cost a third of the product that fills it.
        size, V, chunking = self.job.taken.size, self.weight.shape[0], self.chunking
        logits = self.hidden.new_empty(chunking.chunk, V, dtype=self.dtype)
        teacher = self.hidden.new_empty(chunking.chunk, self.teacher_columns, dtype=self.dtype)
        kept = self.hidden.new_empty(chunking.product, V) if chunking.keeps_dz else None
        for rows in _parts(0, size, chunking.product):
            at = rows if self.job.taken.order is None else self.job.taken.order[rows]
            x = _cut(self.hidden, at)
            dz = None if kept is None else kept[: x.shape[0]]
            for part in _parts(rows.start, rows.stop, chunking.chunk):
                inside, z = _moved(part, -rows.start), _cut(logits, slice(0, part.stop - part.start))
                if kept is None and self.wants_gradient:
                    # The gradient takes the place of the logits; in bf16 it fills the first half of each row's memory.
                    dz = z.view(torch.bfloat16)[:, :V] if self.is_narrow else z
                self._go_forward(part, _cut(x, inside), z, dz if kept is None else kept[inside], teacher)
            if dz is not None:
                self._go_back(at, x, dz, adds=rows.start > 0)

    def _go_forward(self, rows: slice, x: Tensor, logits: Tensor, dz: Tensor | None, teacher: Tensor) -> None:
        """Losses of a chunk's rows, and their gradient into dz."""
        self.ops.head_forward_(logits, x, self.weight)
        start = 0
        for group in self.job.taken.groups:
            stop = start + group.size
            part = slice(max(start, rows.start), min(stop, rows.stop))
            if part.start < part.stop:
                inside = _moved(part, -rows.start)
                chunk, out = _cut(logits, inside), None if dz is None else _cut(dz, inside)
                signal = self._signal(group, _moved(part, -start), teacher, _cut(x, inside), chunk)
                if isinstance(group.signal, TopK) and group.signal.temperature != 1:
                    self._solve_rows_at(group.signal.temperature, part, chunk, out, signal, teacher[: len(chunk)])
                else:
                    self._solve_rows(part, chunk, out, signal)
            start = stop

    def _signal(self, group: RowGroup, part: slice, room: Tensor, x: Tensor, student: Tensor) -> SignalOfRows:
        """ids, log-probs and logits of some rows of a group. room: for a teacher's logits; x, student: their own."""
        signal, at = group.signal, part if group.entries is None else group.entries[part]
        if isinstance(signal, TopK):
            return _cut(signal.ids, at), _cut(signal.logprobs, at), None
        if isinstance(signal, Dense):
            logits = room[: part.stop - part.start, : signal.vocabulary]
            signal.write_logits_(logits, at, _forward_beside(self.ops.head_forward_, x, self.weight, student))
            return None, None, logits
        return None, None, None

    def _solve_rows(self, rows: slice, logits: Tensor, dz: Tensor | None, signal: SignalOfRows) -> None:
        values = self._divergence(rows, logits, dz, signal, self._parameters(rows))
        if signal[2] is not None and not _is_gpu(logits):
            self._check_teacher(values[0], signal[2])
        self.values.append(values)

    def _solve_rows_at(
        self,
        temperature: float,
        rows: slice,
        logits: Tensor,
        dz: Tensor | None,
        signal: SignalOfRows,
        room: Tensor,
    ) -> None:
        """Of log-probs at another temperature s than 1, which the op does not know.

        In units of z/s they are at 1, and the loss's temperature is tau/s: so the divergence is the op's on logits,
        their scale and their cap divided by s. It is weighted by tau^2, not (tau/s)^2. The cross-entropy is at
        temperature 1 in the old units, so it takes a call of its own, and room for a second copy of the logits.
        """
        again = room[:, : logits.shape[1]].copy_(logits)
        kl_weight, ce_weight, tau = self._parameters(rows)
        units = kl_weight * temperature**2, torch.zeros_like(ce_weight), tau / temperature
        text, wanted = (torch.zeros_like(kl_weight), ce_weight, tau), dz is not None
        divergence, _ = self._divergence(rows, again, again if wanted else None, signal, units, temperature)
        _, ce = self._divergence(rows, logits, logits if wanted else None, (None, None, None), text)
        if dz is not None:
            dz.copy_(again.add_(logits))
        self.values.append((divergence, ce))

    def _parameters(self, rows: slice) -> list[Tensor]:
        """kl_weight, ce_weight and temperature of some rows."""
        return [_cut(row, rows) for row in self.job.parameters.unbind()]

    def _divergence(
        self,
        rows: slice,
        logits: Tensor,
        dz: Tensor | None,
        signal: SignalOfRows,
        parameters: Sequence[Tensor],
        unit: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The op, with logits counted in `unit`."""
        softcap, (ids, logprobs, teacher) = self.job.softcap, signal
        kl_weight, ce_weight, temperature = parameters
        return self.ops.divergence_rows_(
            logits,
            dz,
            _cut(self.job.labels, rows),
            kl_weight,
            ce_weight,
            temperature,
            ids,
            logprobs,
            teacher,
            self.bias,
            self.job.beta,
            self.job.logit_scale / unit,
            None if softcap is None else softcap / unit,
        )

    def _check_teacher(self, divergence: Tensor, teacher: Tensor) -> None:
        """Raises for a teacher's row that holds no distribution; its divergence is NaN. On a CPU, whose values are at
        hand: NumPy looks at them without an op, each of which costs a small call as much as its work."""
        if not np.isnan(divergence.numpy()).any():
            return
        most = teacher.amax(1)
        if not most.isfinite().all():
            what = "only -inf" if (most == -torch.inf).any() else "NaN or infinity"
            raise ValueError(
                f"a row of the Dense teacher's logits holds {what}, which is no distribution; leave such rows out of "
                "the signal with rows=[N]"
            )

    def _go_back(self, at: Tensor | slice, x: Tensor, dz: Tensor, adds: bool) -> None:
        """The gradients of rows whose dz is known. at: their place in the T axis; adds: they are not the first."""
        if self.d_hidden is not None:
            thresholds = None
            if self.job.gradient_filter > 0 and ops.filter_saves(self.hidden, self.weight):
                thresholds, left_out = self.ops.row_thresholds(dz, self.job.gradient_filter)
                self.left_out.append(left_out)
            d_hidden = self.ops.head_backward(dz, self.weight, thresholds)
            if isinstance(at, slice) and d_hidden.shape == self.d_hidden.shape:
                self.d_hidden = d_hidden
            else:
                self.d_hidden[at] = d_hidden
        if self.d_weight is not None and self.chunking.rounds_sum:
            head_grad_rounded_(self.d_weight, dz, x, adds)
        elif self.d_weight is not None:
            self.ops.head_grad_(self.d_weight, dz, x)
        if self.d_bias is not None:
            self.ops.head_grad_(self.d_bias.unsqueeze(1), dz, x.new_ones(x.shape[0], 1))


def _forward_beside(forward: HeadForward, x: Tensor, weight: Tensor, logits: Tensor) -> HeadForward:
    """head_forward_ for a teacher, beside a student's x [n, H], weight and logits.

    If they share the head in fp32, the teacher's logits are the student's plus a product of the difference of their
    hidden states: two products would round the logits by more than a small gap between them can bear.
    """

    def teacher_forward(z: Tensor, hidden: Tensor, head: Tensor) -> None:
        if hidden.dtype != x.dtype or x.dtype not in (torch.float32, torch.float64) or not _is_same(head, weight):
            return forward(z, hidden, head)
        forward(z, hidden - x, head)
        z.add_(logits)

    return teacher_forward


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _is_gpu(x: Tensor) -> bool:
    return x.device.type != "cpu"


def _parts(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _cut(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of x; x itself if that is all of it, for a view costs the host as much as a small kernel."""
    if isinstance(rows, slice) and rows.start == 0 and rows.stop == x.shape[0]:
        return x
    return x[rows]


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
