"""Which rows of a batch take part in a loss, and which signal each of them has.

If the caller says which rows take part, nothing is read from the device. Otherwise one synchronisation reads how many
rows each signal has, and checks all values. Shapes: T tokens, n rows that take part, N rows of a signal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rbfast.loss.teacher_signal import Dense, Signal, TopK, mark_padding, merge_duplicates, repeated_id, top_k_checks
from rbfast.loss.value_checks import ValueCheck, read_back


class RowGroup(NamedTuple):
    """Consecutive rows among those that take part that share a signal (None: text only).

    entries: [size] indices into the signal's N axis; None: row i of the group has entry i.
    """

    size: int
    signal: Signal | None = None
    entries: Tensor | None = None

    def extra_columns(self, vocabulary: int) -> int:
        """Values that a row needs in addition to its logits: the teacher's logits, or a copy of the student's."""
        if isinstance(self.signal, Dense):
            return self.signal.vocabulary
        return vocabulary if isinstance(self.signal, TopK) and self.signal.temperature != 1 else 0


class ActiveRows(NamedTuple):
    """The `size` rows that take part, group by group. order: [n] indices into the T axis; None: all T rows in order."""

    size: int
    order: Tensor | None
    groups: list[RowGroup]


def group_known_rows(signals: Sequence[Signal], rows: Tensor, tokens: int) -> ActiveRows:
    """The groups of rows [n] that are known to take part and include all rows of the signals. Reads nothing back."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"rows must be int64 [n], the rows that take part, got {got}")
    size = rows.shape[0]
    if not signals or (len(signals) == 1 and signals[0].rows is None):
        order = None if size == tokens else rows
        return ActiveRows(size, order, [RowGroup(size, signals[0], order) if signals else RowGroup(size)])
    claimed = [_rows_of(signal, tokens, rows.device) for signal in signals]
    left = size - sum(map(len, claimed))
    if left < 0:
        raise ValueError(
            f"the signals cover {size - left} rows, but only {size} take part; leave ignored rows out of the signals"
        )
    groups = [RowGroup(len(their), signal) for their, signal in zip(claimed, signals, strict=True)]
    if left:
        has_signal = torch.zeros(tokens, dtype=torch.bool, device=rows.device)
        has_signal.index_fill_(0, _concatenate(claimed), True)
        claimed.append(rows[has_signal[rows].sort(stable=True).indices[:left]])
        groups.append(RowGroup(left))
    return ActiveRows(size, _concatenate(claimed), [group for group in groups if group.size])


def group_rows(
    signals: Sequence[Signal], is_ignored: Tensor, checks: Sequence[ValueCheck], vocabulary: int
) -> ActiveRows:
    """The groups of the rows that are not ignored. is_ignored: [T]. Reads back from the device once.

    Raises:
        ValueError: a check fails, two signals claim one row, or a signal holds no distribution.
    """
    tokens = is_ignored.shape[0]
    if not tokens:
        return ActiveRows(0, None, [])
    signals = [mark_padding(signal) if isinstance(signal, TopK) else signal for signal in signals]
    top_k = [signal for signal in signals if isinstance(signal, TopK) and signal.ids.numel()]
    all_checks = [*checks, *(check for signal in top_k for check in top_k_checks(signal, vocabulary))]
    repeats = [repeated_id(signal.ids) for signal in top_k]
    if not signals or (len(signals) == 1 and signals[0].rows is None):
        ignored, *repeated = read_back(all_checks, [is_ignored.sum(), *repeats])
        size = tokens - ignored
        order = is_ignored.sort(stable=True).indices[:size] if ignored else None
        groups = [RowGroup(size, signals[0], order) if signals else RowGroup(size)]
    else:
        signal_rows = _SignalRows(signals, is_ignored)
        all_checks += signal_rows.checks()
        numbers = read_back(all_checks, [is_ignored.sum(), *signal_rows.count_ignored(), *repeats])
        lost, repeated = numbers[1 : 1 + len(signals)], numbers[1 + len(signals) :]
        size = tokens - numbers[0]
        order, groups = signal_rows.split(size, lost)
    if any(id >= 0 for id in repeated):
        groups = [RowGroup(group.size, _merge_if_top_k(group.signal), group.entries) for group in groups]
    return ActiveRows(size, order, [group for group in groups if group.size])


class _SignalRows:
    """The rows of a batch that signals with `rows` cover. is_ignored: [T]."""

    def __init__(self, signals: Sequence[Signal], is_ignored: Tensor) -> None:
        self.signals, self.is_ignored, self.tokens = signals, is_ignored, len(is_ignored)
        claimed = [_rows_of(signal, self.tokens, is_ignored.device) for signal in signals]
        self.sizes, self.rows = [len(rows) for rows in claimed], _concatenate(claimed)
        self.inside = self.rows.clamp(0, self.tokens - 1)  # an invalid row must not fault before it is checked

    def checks(self) -> list[ValueCheck]:
        checks = []
        if len(self.rows):
            low, high = self.rows.aminmax()
            checks += [ValueCheck(low, lambda row: row < 0, self._explain_outside)]
            checks += [ValueCheck(high, lambda row: row >= self.tokens, self._explain_outside)]
        if len(self.rows) > 1:
            ordered = self.rows.sort().values
            twice = torch.where(ordered[1:] == ordered[:-1], ordered[1:], self.tokens).amin()
            checks += [ValueCheck(twice, lambda row: row < self.tokens, lambda: _explain_claimed_twice(int(twice)))]
        return checks

    def _explain_outside(self) -> str:
        return f"rows must be in [0, {self.tokens}), got {self.rows.min()}..{self.rows.max()}"

    def count_ignored(self) -> list[Tensor]:
        """How many rows of each signal are ignored."""
        return [part.sum() for part in self.is_ignored[self.inside].split(self.sizes)]

    def split(self, active: int, ignored: Sequence[int]) -> tuple[Tensor, list[RowGroup]]:
        """The order of the rows that take part (by signal and entry, then text-only rows), and their groups."""
        count = len(self.rows)
        key = torch.full_like(self.is_ignored, count, dtype=torch.int64)
        key.index_copy_(0, self.inside, torch.arange(count, device=key.device))
        entries, order = key.masked_fill_(self.is_ignored, count + 1).sort(stable=True)
        groups, start, first = [], 0, 0
        for signal, size, lost in zip(self.signals, self.sizes, ignored, strict=True):
            part, first_entry = entries[start : start + size - lost], first
            groups.append(RowGroup(size - lost, signal, part - first_entry if lost else None))
            start, first = start + size - lost, first + size
        return order[:active], [*groups, RowGroup(active - start)]


def _explain_claimed_twice(row: int) -> str:
    return f"row {row} has more than one teacher signal; give each row one"


def _merge_if_top_k(signal: Signal | None) -> Signal | None:
    return merge_duplicates(signal) if isinstance(signal, TopK) else signal


def _rows_of(signal: Signal, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(tokens, device=device) if signal.rows is None else signal.rows


def _concatenate(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
