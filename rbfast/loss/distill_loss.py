"""The distillation loss: from hidden states to a loss and its gradients, without materialising logits [T, V].

    loss_fn = DistillLoss(beta=0.0)
    out = loss_fn(hidden, head_weight, labels, teacher=TopK(ids, logprobs), kl_weight=w, ce_weight=0.1, temperature=tau)
    out.loss.backward()

A call synchronises with the device once, to count the rows that take part and to check values; with `rows=` it never
does. The work itself is in `fused_loss`.

Shapes: T tokens, H hidden size, V vocabulary, N rows of a signal, k its width.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rbfast.loss.chunked_loss import LossJob
from rbfast.loss.fused_loss import FusedLoss
from rbfast.loss.inputs import check_logit_settings, check_shapes, check_tensors, input_checks
from rbfast.loss.parameters import check_parameter
from rbfast.loss.row_groups import group_known_rows, group_rows
from rbfast.loss.teacher_signal import Signal, check_signal
from rbfast.ops.dtypes import wide_dtype

Reduction = Literal["mean", "sum", "none"]


class LossOutput(NamedTuple):
    """The result of a loss. All but `loss` is detached; ignored rows are 0.

    Attributes:
        loss: a scalar, or [T] for reduction="none".
        divergence, ce: [T] in nats, unweighted.
        hidden_grad_error_bound: [T], an upper bound of the Euclidean norm of what the gradient filter drops from the
            gradient of a row's weighted loss (before any mean) in `hidden`. None without a filter; 0 where the filter
            is ignored.
    """

    loss: Tensor
    divergence: Tensor
    ce: Tensor
    hidden_grad_error_bound: Tensor | None


class DistillLoss(nn.Module):
    """loss = kl_weight * temperature^2 * D(p, q) + ce_weight * CE(label), over rows whose label is not `ignore_index`.

    q = softmax(z / temperature) with z the student's logits, p the teacher's distribution, CE at temperature 1.
    D is the forward KL(p, q) for beta=0, the reverse KL(q, p) for beta=1, and between them the generalised
    Jensen-Shannon divergence beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q (which vanishes at both
    ends: near 0 it is beta times the forward KL). Reverse KL clamps teacher log-probs at -100.

    Args:
        beta: in [0, 1].
        ignore_index: rows with this label take no part.
        reduction: "mean" divides by `num_items` if given, else by the number of rows that take part.
        softcap: the student's logits are softcap * tanh(z / softcap), as in Gemma 2.
        logit_scale: multiplies the student's logits (after the bias, before the softcap), as in Cohere's models.
        chunk_rows: rows per chunk, rounded up to a multiple of 32. Default: 40 MiB of logits or 96 rows, whichever is
            more (96 MiB or 256 rows with AMX); on a GPU at most 1024 rows, and 925 MB with their gradient. On a CPU
            this memory, up to 512 MiB, is kept for the next call (`rbfast.loss.workspace`).
        gradient_filter: in [0, 1). Drops from the gradient of hidden the smallest entries, by magnitude, of each row of
            d loss / d logits, as long as they sum to at most this share of the row. 0.02 saves most of that product on
            a CPU, at an error of about 0.02 (docs/results.md). Ignored on a GPU, and for bf16 on a CPU with AMX, where
            it would save nothing.
    """

    __call__: Callable[..., LossOutput]  # for type checkers: nn.Module's returns Any

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
        check_logit_settings(logit_scale, softcap)
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
        kl_weight: float | Tensor = 1.0,
        ce_weight: float | Tensor = 0.0,
        temperature: float | Tensor = 1.0,
        head_bias: Tensor | None = None,
        num_items: int | Tensor | None = None,
        rows: Tensor | None = None,
    ) -> LossOutput:
        """The loss of a packed batch. Gradients flow to those of hidden, head_weight and head_bias that require them.

        Args:
            hidden: [T, H], fp32, bf16 or fp16 (fp64 runs on the reference); autocast applies as to F.linear.
            head_weight: [V, H]; the logits are hidden @ head_weight.T + head_bias.
            labels: [T] int64, already shifted: labels[i] is the token that hidden[i] predicts.
            teacher: one signal, or several that cover different rows; rows without a signal get CE only.
            kl_weight, ce_weight, temperature: floats or [T].
            head_bias: [V].
            num_items: the divisor of "mean", for a mean over several accumulated batches.
            rows: int64 [n], the rows whose label is not `ignore_index`, if the caller knows them. Then nothing is read
                back from the device, and values are not checked. The caller guarantees: labels and parameters are in
                range, the rows of signals are among `rows` and no row has two signals, TopK is as `check_top_k` returns
                it (padding is -1, no id twice). A violation may give a wrong loss without an error.

        Raises:
            ValueError: shapes, dtypes or values that do not fit; the message says which.
        """
        check_tensors(hidden=hidden, head_weight=head_weight, labels=labels)
        if head_bias is not None:
            check_tensors(head_bias=head_bias)
        if not torch.is_grad_enabled():  # do not compute gradients that nobody will use
            hidden, head_weight = hidden.detach(), head_weight.detach()
            head_bias = None if head_bias is None else head_bias.detach()
        is_autocast = torch.is_autocast_enabled(hidden.device.type)
        if is_autocast and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
        check_shapes(hidden, head_weight, labels, head_bias)
        if num_items is not None and self.reduction != "mean":
            raise ValueError(
                f"num_items is the divisor of reduction='mean'; leave it out with reduction={self.reduction!r}"
            )
        given = [] if teacher is None else teacher if isinstance(teacher, Sequence) else [teacher]
        if not given and isinstance(ce_weight, int | float) and ce_weight == 0:
            raise ValueError("there is nothing to learn from: give a teacher, or a ce_weight above 0 for text alone")
        kl = check_parameter("kl_weight", kl_weight, hidden)
        ce = check_parameter("ce_weight", ce_weight, hidden)
        tau = check_parameter("temperature", temperature, hidden)
        signals = [check_signal(signal, hidden) for signal in given]
        labels, V = labels.to(torch.int64), head_weight.shape[0]
        if rows is not None:
            active = group_known_rows(signals, rows, hidden.shape[0])
        else:
            named = {"kl_weight": kl, "ce_weight": ce, "temperature": tau}
            is_ignored = labels == self.ignore_index
            checks = input_checks(labels, is_ignored, self.ignore_index, V, named)
            active = group_rows(signals, is_ignored, checks, V)
        if active.order is not None:
            labels, kl, ce, tau = labels[active.order], kl.at(active.order), ce.at(active.order), tau.at(active.order)
        divisor = self._divisor(num_items, active.size, hidden)
        job = LossJob(
            labels=labels,
            kl_weight=kl.divided(divisor, active.size),
            ce_weight=ce.divided(divisor, active.size),
            temperature=tau,
            active=active,
            divisor=divisor,
            by_token=self.reduction == "none",
            beta=self.beta,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            chunk_rows=self.chunk_rows,
            gradient_filter=self.gradient_filter,
        )
        if not is_autocast:
            return LossOutput(*FusedLoss.apply(hidden, head_weight, head_bias, job))
        with torch.autocast(hidden.device.type, enabled=False):
            return LossOutput(*FusedLoss.apply(hidden, head_weight, head_bias, job))

    def _divisor(self, num_items: int | Tensor | None, rows: int, hidden: Tensor) -> int | Tensor:
        if self.reduction != "mean":
            return 1
        items = rows if num_items is None else num_items
        if isinstance(items, Tensor) and items.shape in ((), (1,)):
            return items.to(hidden.device, wide_dtype(hidden.dtype)).clamp_min(1)
        if not isinstance(items, Real):
            got = f"a tensor {list(items.shape)}" if isinstance(items, Tensor) else type(items).__name__
            raise ValueError(f"num_items must be one number, got {got}; add up the counts first")
        return max(items, 1)
