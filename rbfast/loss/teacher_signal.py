"""Teacher signals for some rows of a batch: top-k log-probs, or the full distribution.

Shapes: T tokens of the batch, N rows of a signal, k its width, V' and H' the teacher's vocabulary and hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rbfast.loss.inputs import check_devices, check_logit_settings, check_tensors
from rbfast.loss.value_checks import ValueCheck, read_back
from rbfast.ops.dtypes import wide_dtype

# How far the sum of a row's probabilities may exceed 1: bf16 log-probs near 0 are off by up to 0.4%.
MASS_TOLERANCE = 1e-2


@dataclass(frozen=True)
class TopK:
    """The teacher's log-probs of some ids; all other ids share one tail bucket, exactly.

    ids: [N, k] integers in the student's vocabulary; -1, or a log-prob of -inf, marks padding.
    logprobs: [N, k] natural logarithms; the probabilities of an id that appears twice in a row are added.
    rows: [N] the rows of the batch they belong to (None: all T rows in order). Entry i is the distribution of the token
        that hidden[rows[i]] predicts.
    temperature: a number, the s of the softmax(y / s) that gave the log-probs, with y the teacher's logits. Most
        servers return s = 1, whatever they sample at. Those that divide first (TRL's, vLLM's processed log-probs)
        return their sampling temperature. Put rows with different temperatures into separate signals.

    With z the student's logits, tau the loss's temperature, S the ids of a row and p_v = exp(logprobs) on S, the loss
    compares two distributions over k + 1 buckets:

        teacher:  p_v^(s/tau), v in S;  (1 - sum_S p)^(s/tau) * sum_{u not in S} r_u^(s/tau);  divided by their sum
        student:  softmax(z / tau)_v, v in S;  the rest

    where r = softmax(z / s) over the ids not in S, the shape assumed for the teacher's unseen tail, is constant in the
    gradient. At s = tau both exponents are 1: the log-probs are compared as given.
    """

    ids: Tensor
    logprobs: Tensor
    rows: Tensor | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Dense:
    """The teacher's full distribution: its hidden states and head, or its logits.

    hidden: [N, H'] and weight: [V', H'], with an optional bias [V']; or logits: [N, V'].
    rows: [N] the rows of the batch they belong to (None: all T rows in order).
    logit_scale, softcap: as in DistillLoss, for the teacher's own head.

    If V' differs from the student's V, both are restricted to the ids below min(V, V') and renormalised. A row whose
    logits for these ids are all -inf, or contain a NaN, is no distribution: on a CPU the loss raises; on a GPU, where
    nothing is read back, the row's loss is NaN.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    rows: Tensor | None = None
    logits: Tensor | None = None
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """V'."""
        source, dim = (self.weight, 0) if self.logits is None else (self.logits, 1)
        assert source is not None
        return source.shape[dim]

    def write_logits_(
        self, z: Tensor, entries: Tensor | slice, head_forward_: Callable[[Tensor, Tensor, Tensor], None]
    ) -> None:
        """Writes the logits of some entries [n] into z [n, V'], fp32 or wider."""
        if self.logits is not None:
            z.copy_(self.logits[entries])
        else:
            assert self.hidden is not None and self.weight is not None
            head_forward_(z, self.hidden[entries], self.weight)
        if self.bias is not None:
            z.add_(self.bias)
        if self.logit_scale != 1:
            z.mul_(self.logit_scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)


Signal = TopK | Dense


def check_signal(signal: Signal, hidden: Tensor) -> Signal:
    """The signal on the device and in the dtype that a loss of hidden [T, H] needs. Values are not checked.

    Raises:
        ValueError: its shapes or dtypes do not fit.
    """
    if isinstance(signal, TopK):
        signal, count = _check_top_k(signal, hidden), signal.ids.shape[0]
    elif isinstance(signal, Dense):
        count = _check_dense(signal, hidden)
    else:
        raise ValueError(f"teacher must be TopK, Dense, a sequence of them or None, got {type(signal).__name__}")
    rows = _check_rows(signal.rows, count, hidden)
    return signal if rows is signal.rows else replace(signal, rows=rows)


def _check_rows(rows: Tensor | None, count: int, hidden: Tensor) -> Tensor | None:
    tokens = hidden.shape[0]
    if rows is None:
        if count != tokens:
            raise ValueError(f"the signal has {count} rows for {tokens} tokens; say which rows it covers with rows=[N]")
        return None
    check_tensors(**{"the rows of a signal": rows})
    if rows.shape != (count,) or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(
            f"rows must be [{count}] integers, one per row of the signal, got {rows.dtype} {list(rows.shape)}"
        )
    return rows.to(hidden.device, torch.int64)


def _check_dense(signal: Dense, student: Tensor) -> int:
    check_logit_settings(signal.logit_scale, signal.softcap, " of Dense")
    parts = {f"the {name} of Dense": getattr(signal, name) for name in ("hidden", "weight", "logits", "bias")}
    check_tensors(**{name: part for name, part in parts.items() if part is not None})
    count, bias = _check_source(signal, student), signal.bias
    if bias is not None and bias.shape != (signal.vocabulary,):
        raise ValueError(f"the bias of Dense must be [V'] = [{signal.vocabulary}], got {list(bias.shape)}")
    return count


def _check_source(signal: Dense, student: Tensor) -> int:
    if signal.logits is not None:
        if signal.hidden is not None or signal.weight is not None:
            raise ValueError("Dense takes logits [N, V'] or hidden [N, H'] with weight [V', H'], not both")
        if signal.logits.dim() != 2:
            raise ValueError(f"Dense needs logits [N, V'], got {list(signal.logits.shape)}; flatten them first")
        return signal.logits.shape[0]
    hidden, weight = signal.hidden, signal.weight
    if hidden is None or weight is None:
        raise ValueError("Dense needs logits [N, V'], or both hidden [N, H'] and weight [V', H']")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"Dense needs hidden [N, H'] and weight [V', H'], got {list(hidden.shape)}, {list(weight.shape)}"
        )
    if student.dtype != torch.float64 and torch.float64 in (hidden.dtype, weight.dtype):
        raise ValueError(f"Dense must not be float64 if the student is {student.dtype}; use float32")
    check_devices(student, **{"the hidden of Dense": hidden, "the weight of Dense": weight})
    return hidden.shape[0]


def _check_top_k(signal: TopK, hidden: Tensor) -> TopK:
    ids, logprobs = signal.ids, signal.logprobs
    check_tensors(**{"the ids of TopK": ids, "the logprobs of TopK": logprobs})
    if ids.dim() != 2 or ids.shape != logprobs.shape:
        raise ValueError(f"TopK needs ids [N, k] and logprobs [N, k], got {list(ids.shape)} and {list(logprobs.shape)}")
    if ids.is_floating_point() or ids.dtype == torch.bool or not logprobs.is_floating_point():
        raise ValueError(f"TopK needs integer ids and floating-point logprobs, got {ids.dtype} and {logprobs.dtype}")
    s = signal.temperature
    if isinstance(s, bool) or not isinstance(s, int | float) or not (math.isfinite(s) and s > 0):
        raise ValueError(
            f"TopK's temperature must be a positive number, the temperature of its log-probs, got {s!r}; put rows with "
            "different temperatures into separate signals"
        )
    logprobs = logprobs.detach() if logprobs.requires_grad else logprobs  # else the checks would record a graph
    ids, logprobs = ids.to(hidden.device, torch.int64), logprobs.to(hidden.device, wide_dtype(hidden.dtype))
    is_same = ids is signal.ids and logprobs is signal.logprobs
    return signal if is_same else replace(signal, ids=ids, logprobs=logprobs)


def check_top_k(signal: TopK) -> TopK:
    """The signal with padding as id -1 and duplicates merged, as `DistillLoss` with `rows=` needs it. Checks values.

    Raises:
        ValueError: a row holds no distribution. (Ids are not compared with a vocabulary.)
    """
    signal = mark_padding(signal)
    if not signal.ids.numel():
        return signal
    (repeated,) = read_back(top_k_checks(signal, 2**31), [repeated_id(signal.ids)])
    return merge_duplicates(signal) if repeated >= 0 else signal


def mark_padding(signal: TopK) -> TopK:
    """The signal with id -1 and log-prob -inf wherever it has either."""
    ids = signal.ids.masked_fill(signal.logprobs == -torch.inf, -1)
    return replace(signal, ids=ids, logprobs=signal.logprobs.masked_fill(ids == -1, -torch.inf))


def top_k_checks(signal: TopK, vocabulary: int) -> list[ValueCheck]:
    """The checks of the values of a non-empty signal whose padding is marked."""
    ids, logprobs = signal.ids, signal.logprobs
    low, high = ids.aminmax()
    mass = logprobs.exp().sum(1, dtype=torch.float64)
    most = mass.amax()  # NaN if any log-prob is NaN

    def say(message: str, wrong: Callable[[], Tensor]) -> Callable[[], str]:
        return lambda: f"{message} (row {int(wrong().nonzero()[0][0])} of the signal)"

    too_large = f"teacher ids must be below the student's vocabulary of {vocabulary}; drop or map them"
    negative = "teacher ids must not be negative (-1 marks padding)"
    too_much = "teacher probabilities of one row add up to more than 1"
    return [
        ValueCheck(most, math.isnan, say("teacher log-probs must be numbers, got NaN", lambda: logprobs.isnan())),
        ValueCheck(high, lambda id: id >= vocabulary, say(too_large, lambda: ids >= vocabulary)),
        ValueCheck(low, lambda id: id < -1, say(negative, lambda: ids < -1)),
        ValueCheck(most, lambda total: total > 1 + MASS_TOLERANCE, say(too_much, lambda: mass > 1 + MASS_TOLERANCE)),
    ]


def repeated_id(ids: Tensor) -> Tensor:
    """The largest id that occurs twice in a row of ids [N, k], except padding; -1 if there is none. N, k > 0."""
    if ids.shape[1] == 1:
        return ids.new_full((), -1)
    ordered = ids.sort(1).values
    later = ordered[:, 1:]
    return later.masked_fill(later != ordered[:, :-1], -1).amax()


def merge_duplicates(signal: TopK) -> TopK:
    """The signal with each id at most once per row; the first occurrence of a repeated id gets the summed mass."""
    ids, logprobs = signal.ids, signal.logprobs
    if not ids.numel():
        return signal
    at_fault = _is_repeated(ids.sort(1).values, 1).any(1)
    ids, logprobs = ids.clone(), logprobs.clone()
    ordered, order = ids[at_fault].sort(dim=1, stable=True)
    sums, step = logprobs[at_fault].gather(1, order), 1
    while step < ordered.shape[1]:  # each entry holds the sum of its id's next `step`, then of its next 2 * step
        both = torch.logaddexp(sums[:, :-step], sums[:, step:])
        sums[:, :-step] = torch.where(_is_repeated(ordered, step), both, sums[:, :-step])
        step *= 2
    later = torch.nn.functional.pad(_is_repeated(ordered, 1), (1, 0))
    ids[at_fault] = ordered.scatter(1, order, ordered.masked_fill(later, -1))
    logprobs[at_fault] = sums.scatter(1, order, sums.masked_fill(later, -torch.inf))
    return replace(signal, ids=ids, logprobs=logprobs)


def _is_repeated(ordered: Tensor, step: int) -> Tensor:
    """Whether sorted ids [N, k] are the same, and no padding, `step` places later: bool [N, k - step]."""
    return (ordered[:, step:] == ordered[:, :-step]) & (ordered[:, step:] >= 0)
