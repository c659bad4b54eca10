"""The chunked computation of DistillLoss: losses of rows and their gradient, without materialising logits [T, V].

For each chunk of rows, one GEMM with fp32 output makes the logits, and one kernel turns them into losses and their
gradient dz. The backward GEMMs, which may skip negligible entries (`gradient_filter`), take the dz of a chunk or, on a
GPU, of several. On a CPU each row's values are bitwise independent of chunk size, threads and the row's position; the
gradient of a trained head is a sum over rows, so its last bits depend on their order, and on nothing else.

Shapes: T tokens, n of them take part, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rbfast import ops
from rbfast.loss import workspace
from rbfast.loss.chunking import (
    IN_TILES,
    ON_CPU,
    Chunking,
    chunk_on_cpu,
    chunk_on_gpu,
    chunk_trained_head,
    gpu_memory,
    row_width,
)
from rbfast.loss.parameters import RowParameter
from rbfast.loss.row_groups import ActiveRows, RowGroup
from rbfast.loss.teacher_signal import Dense, TopK
from rbfast.ops import head_gemm, reference
from rbfast.ops.dtypes import wide_dtype

HeadForward = Callable[[Tensor, Tensor, Tensor], None]  # the op head_forward_

_ZERO_WEIGHT = RowParameter(None, 0.0)


class HeadProducts(Protocol):
    def head_forward_(self, logits: Tensor, hidden: Tensor, weight: Tensor, /) -> None: ...
    def head_backward_(self, d_hidden: Tensor, dz: Tensor, weight: Tensor, thresholds: Tensor | None, /) -> None: ...
    def head_grad_(self, dW: Tensor, dz: Tensor, hidden: Tensor, /) -> None: ...


class LossOps(HeadProducts, Protocol):
    """The ops that a loss calls: the registry's, or the reference for fp64."""

    def row_thresholds(self, dz: Tensor, share: float, /) -> tuple[Tensor, Tensor]: ...
    @property
    def divergence_rows_(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]: ...  # as rbfast.ops.reference's


class LossJob(NamedTuple):
    """The inputs of a loss that are not differentiated, for the rows that take part.

    labels: [n]. kl_weight and ce_weight are already divided by `divisor`. by_token: the loss is [T], not its sum.
    """

    labels: Tensor
    kl_weight: RowParameter
    ce_weight: RowParameter
    temperature: RowParameter
    active: ActiveRows
    divisor: int | Tensor
    by_token: bool
    beta: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int | None
    gradient_filter: float


class LossResult(NamedTuple):
    """Values [n] of the rows that take part, and the gradients of hidden, weight and bias; None if not wanted.

    left_out: the summed magnitude of the entries of dz that the filter dropped; None without a filter.
    """

    divergence: Tensor
    ce: Tensor
    loss: Tensor
    left_out: Tensor | None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


Inputs = tuple[Tensor, Tensor, Tensor | None]
SignalOfRows = tuple[Tensor | None, Tensor | None, Tensor | None]  # ids, log-probs, a teacher's logits


def compute_chunks(inputs: Inputs, job: LossJob, wanted: tuple[bool, bool, bool]) -> LossResult:
    """Runs the chunks on inputs hidden, weight and bias; `wanted` says which of their gradients to compute."""
    return _ChunkedLoss(*inputs, job, wanted).run()


class _ChunkedLoss:
    """One call of the loss: its buffers, the losses of the chunks so far, and the gradients so far."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LossJob, wanted: tuple[bool, bool, bool]
    ) -> None:
        self.job, self.hidden, self.weight = job, hidden, weight
        self.is_gpu = _is_gpu(hidden)
        self.dtype = wide_dtype(hidden.dtype)
        self.ops: LossOps = reference if self.dtype == torch.float64 else ops
        self.products: HeadProducts = self.ops
        if self.dtype != torch.float64 and ops.uses_torch_products(hidden.device):
            self.products = head_gemm  # skips the dispatcher, whose Python call takes as long as a small product
        self.bias = None if bias is None else bias.to(self.dtype)
        self.is_narrow = hidden.dtype == weight.dtype == torch.bfloat16
        self.wants_gradient, self.wants_hidden = any(wanted), wanted[0]
        V, extra_columns = weight.shape[0], 0
        for group in job.active.groups:
            extra_columns = max(extra_columns, group.extra_columns(V))
        self.widths = row_width(V, self.is_gpu), row_width(extra_columns, self.is_gpu)  # of logits, and of extra logits
        self.chunking = self._choose_chunking(trains_head=wanted[1])
        self.extra: Tensor | None = None
        self.d_hidden: Tensor | None = None  # allocated when first needed
        self.d_weight = self._make_d_weight() if wanted[1] else None
        self.d_bias = None if self.bias is None or not wanted[2] else torch.zeros_like(self.bias)
        self.losses: list[tuple[Tensor, Tensor, Tensor]] = []
        self.left_out: list[Tensor] = []

    def _choose_chunking(self, trains_head: bool) -> Chunking:
        rows, size = self.job.active.size, self.dtype.itemsize
        own, extra, requested = size * self.widths[0], size * self.widths[1], self.job.chunk_rows
        if not self.is_gpu:
            budget = IN_TILES if ops.uses_tiles(self.hidden, self.weight) else ON_CPU
            return chunk_on_cpu(rows, own + extra, requested, budget)
        memory = gpu_memory(self.hidden.device)
        if trains_head and self.is_narrow:
            return chunk_trained_head(rows, own, requested, self.weight.shape, memory=memory, extra_bytes=extra)
        return chunk_on_gpu(rows, own, requested, memory=memory, extra_bytes=extra)

    def _make_d_weight(self) -> Tensor:
        is_filled = self.chunking.rounds_sum and self.job.active.size
        dtype = self.weight.dtype if self.chunking.rounds_sum else self.dtype
        make = torch.empty if is_filled else torch.zeros
        return make(self.weight.shape, dtype=dtype, device=self.weight.device)

    def run(self) -> LossResult:
        self._allocate_and_run()
        if self.wants_hidden and self.d_hidden is None:
            self.d_hidden = torch.zeros_like(self.hidden, dtype=self.dtype)
        gradients = (self.d_hidden, self.d_weight, self.d_bias)
        if not self.losses:
            divergence, ce, loss = self.hidden.new_empty(3, 0, dtype=self.dtype)
            return LossResult(divergence, ce, loss, None, gradients)
        if len(self.losses) == 1:
            divergence, ce, loss = self.losses[0]
        else:
            divergence, ce, loss = (torch.cat(parts) for parts in zip(*self.losses, strict=True))
        return LossResult(divergence, ce, loss, torch.cat(self.left_out) if self.left_out else None, gradients)

    def _allocate_and_run(self) -> None:
        V, (chunk, _, rows, *_), (width, extra_width) = self.weight.shape[0], self.chunking, self.widths
        size = (chunk * width + rows * extra_width) * self.dtype.itemsize
        if self.is_gpu or size < workspace.MIN_KEPT:
            logits = self.hidden.new_empty(chunk, width, dtype=self.dtype)
            extra = self.hidden.new_empty(rows, extra_width, dtype=self.dtype) if extra_width else None
            return self._run_chunks(_columns(logits, V), extra)
        memory = workspace.borrow(size)
        logits, extra = memory[:size].view(self.dtype).split([chunk * width, rows * extra_width])
        self._run_chunks(_columns(logits.view(chunk, width), V), extra.view(rows, extra_width))
        workspace.give_back(memory)

    def _run_chunks(self, logits: Tensor, extra: Tensor | None) -> None:
        """logits: memory for a chunk. extra: memory for `chunking.extra` rows of a teacher's logits or of a copy."""
        (size, order, _), V, chunking = self.job.active, self.weight.shape[0], self.chunking
        self.extra = extra
        dz_buffer = None
        if chunking.keeps_dz:
            dz_buffer = _columns(self.hidden.new_empty(chunking.product, self.widths[0]), V)
        for start in range(0, size, chunking.product):
            stop = min(start + chunking.product, size)
            at = None if order is None else _rows(order, start, stop)
            x = _rows(self.hidden, start, stop) if at is None else self.hidden.index_select(0, at)
            dz = None if dz_buffer is None else _rows(dz_buffer, 0, stop - start)
            for first in range(start, stop, chunking.chunk):
                last = min(first + chunking.chunk, stop)
                z, x_chunk, dz_chunk = _rows(logits, 0, last - first), _rows(x, first - start, last - start), None
                if dz_buffer is not None:
                    dz_chunk = _rows(dz_buffer, first - start, last - start)
                elif self.wants_gradient:
                    dz_chunk = dz = self._dz_in_logits(z)
                self._forward_chunk(first, last, x_chunk, z, dz_chunk)
            if dz is not None:
                self._backward_rows(start, at, x, dz)

    def _dz_in_logits(self, logits: Tensor) -> Tensor:
        """dz in the memory of the logits; in bf16 it fills the first half of each row."""
        return logits.view(torch.bfloat16).narrow(1, 0, logits.shape[1]) if self.is_narrow else logits

    def _forward_chunk(self, start: int, stop: int, x: Tensor, logits: Tensor, dz: Tensor | None) -> None:
        """Computes the losses of a chunk, rows [start, stop) of those that take part, and writes the gradient to dz."""
        self.products.head_forward_(logits, x, self.weight)
        base = 0
        for group in self.job.active.groups:
            first, last = max(base, start), min(base + group.size, stop)
            for at in range(first, last, self.chunking.extra):
                end = min(at + self.chunking.extra, last)
                inside = (at - start, end - start)
                z, out = _rows(logits, *inside), None if dz is None else _rows(dz, *inside)
                self._forward_group(group, (at, end), base, _rows(x, *inside), z, out)
            base += group.size

    def _forward_group(
        self, group: RowGroup, rows: tuple[int, int], base: int, x: Tensor, z: Tensor, out: Tensor | None
    ) -> None:
        """Computes the losses of `rows` (start, stop) of a group, which begins at `base` of the rows that take part."""
        start, stop = rows
        signal, job = self._signal(group, start - base, stop - base, x, z), self.job
        if isinstance(group.signal, TopK) and group.signal.temperature != 1:
            losses = self._run_op_at_temperature(group.signal.temperature, start, stop, z, out, signal)
        else:
            losses = self._run_op(start, stop, z, out, signal, job.kl_weight, job.ce_weight, job.temperature)
            if signal[2] is not None and not self.is_gpu:
                self._check_teacher(losses[0], signal[2])
        self.losses.append(losses)

    def _signal(self, group: RowGroup, start: int, stop: int, x: Tensor, student: Tensor) -> SignalOfRows:
        """The teacher's ids, log-probs and logits of rows of a group. x, student: the student's hidden and logits."""
        signal, entries = group.signal, None if group.entries is None else _rows(group.entries, start, stop)
        if isinstance(signal, TopK):
            if entries is None:
                return _rows(signal.ids, start, stop), _rows(signal.logprobs, start, stop), None
            return signal.ids[entries], signal.logprobs[entries], None
        if isinstance(signal, Dense):
            logits = self._extra_rows(stop - start, signal.vocabulary)
            at = slice(start, stop) if entries is None else entries
            signal.write_logits_(logits, at, _shared_head_forward(self.products.head_forward_, x, self.weight, student))
            return None, None, logits
        return None, None, None

    def _extra_rows(self, rows: int, columns: int) -> Tensor:
        assert self.extra is not None
        return self.extra[:rows, :columns]

    def _run_op_at_temperature(
        self, temperature: float, start: int, stop: int, logits: Tensor, dz: Tensor | None, signal: SignalOfRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_run_op`, for rows whose log-probs are at a temperature s other than 1, which the op does not support.

        In units of z/s they are at temperature 1, and the loss's temperature is tau/s. So the divergence is the op's on
        logits, scale and softcap divided by s, weighted by tau^2, not (tau/s)^2. The cross-entropy is at temperature 1
        in the original units, so it takes a second call and a second copy of the logits.
        """
        copy = self._extra_rows(*logits.shape).copy_(logits)
        job, wanted = self.job, dz is not None
        kl_weight = RowParameter(job.kl_weight.values, job.kl_weight.factor * temperature**2)
        tau = RowParameter(job.temperature.values, job.temperature.factor / temperature)
        divergence, _, weighted = self._run_op(
            start, stop, copy, copy if wanted else None, signal, kl_weight, _ZERO_WEIGHT, tau, temperature
        )
        no_signal = (None, None, None)
        _, ce, weighted_ce = self._run_op(
            start, stop, logits, logits if wanted else None, no_signal, _ZERO_WEIGHT, job.ce_weight, job.temperature
        )
        if dz is not None:
            dz.copy_(copy.add_(logits))
        return divergence, ce, weighted + weighted_ce

    def _run_op(
        self,
        start: int,
        stop: int,
        logits: Tensor,
        dz: Tensor | None,
        signal: SignalOfRows,
        kl_weight: RowParameter,
        ce_weight: RowParameter,
        temperature: RowParameter,
        unit: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Calls divergence_rows_ with logits in units of `unit`."""
        softcap = self.job.softcap
        return self.ops.divergence_rows_(
            logits,
            dz,
            _rows(self.job.labels, start, stop),
            None if kl_weight.values is None else _rows(kl_weight.values, start, stop),
            None if ce_weight.values is None else _rows(ce_weight.values, start, stop),
            None if temperature.values is None else _rows(temperature.values, start, stop),
            *signal,
            self.bias,
            self.job.beta,
            self.job.logit_scale / unit,
            None if softcap is None else softcap / unit,
            kl_weight.factor,
            ce_weight.factor,
            temperature.factor,
        )

    def _check_teacher(self, divergence: Tensor, teacher: Tensor) -> None:
        """Raises if a teacher's row holds no distribution: its divergence is NaN. For a CPU only, where reading values
        is free. In NumPy: for a small batch the overhead of torch ops would equal the rest of the work."""
        if not np.isnan(divergence.numpy()).any():
            return
        largest = teacher[:, : self.weight.shape[0]].amax(1)  # the loss ignores ids beyond the student's
        if not largest.isfinite().all():
            what = "only -inf" if (largest == -torch.inf).any() else "NaN or infinity"
            raise ValueError(
                f"a row of the Dense teacher's logits holds {what}, which is no distribution; leave such rows out of "
                "the signal with rows=[N]"
            )

    def _backward_rows(self, start: int, at: Tensor | None, x: Tensor, dz: Tensor) -> None:
        """Adds the gradients of rows whose dz is known. start: the first among those that take part; at: their indices
        in the T axis, or None."""
        if self.wants_hidden:
            thresholds = None
            if self.job.gradient_filter > 0 and ops.filter_helps(self.hidden, self.weight):
                thresholds, left_out = self.ops.row_thresholds(dz, self.job.gradient_filter)
                self.left_out.append(left_out)
            self._write_d_hidden(start, at, dz, thresholds)
        if self.d_weight is not None and self.chunking.rounds_sum:
            head_gemm.head_grad_rounded_(self.d_weight, dz, x, start > 0)
        elif self.d_weight is not None:
            self.products.head_grad_(self.d_weight, dz, x)
        if self.d_bias is not None:
            self.products.head_grad_(self.d_bias.unsqueeze(1), dz, x.new_ones(x.shape[0], 1))

    def _write_d_hidden(self, start: int, at: Tensor | None, dz: Tensor, thresholds: Tensor | None) -> None:
        """Sets the gradient of hidden for these rows. If they are contiguous, the product writes there directly."""
        (rows, _), (tokens, width) = dz.shape, self.hidden.shape
        if self.d_hidden is None:
            make = self.hidden.new_empty if at is None else self.hidden.new_zeros
            self.d_hidden = make(tokens, width, dtype=self.dtype)
        out = _rows(self.d_hidden, start, start + rows) if at is None else self.d_hidden.new_empty(rows, width)
        self.products.head_backward_(out, dz, self.weight, thresholds)
        if at is not None:
            self.d_hidden.index_copy_(0, at, out)


def _shared_head_forward(forward: HeadForward, x: Tensor, weight: Tensor, logits: Tensor) -> HeadForward:
    """head_forward_ for a teacher, given the student's x [n, H], weight and logits.

    If both share a head in fp32 or fp64, the teacher's logits are the student's plus the product of the difference of
    their hidden states: two separate products would round away a small gap between their logits.
    """

    def teacher_forward(z: Tensor, hidden: Tensor, head: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float64) or not _is_same(head, weight):
            return forward(z, hidden, head)
        forward(z, hidden - x, head)
        z.add_(logits)

    return teacher_forward


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _is_gpu(x: Tensor) -> bool:
    return x.device.type != "cpu"


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """x[start:stop], or x itself if that is all of it: a view costs the host as much as a small kernel."""
    return x if start == 0 and stop == x.shape[0] else x[start:stop]


def _columns(x: Tensor, columns: int) -> Tensor:
    return x if columns == x.shape[1] else x[:, :columns]
