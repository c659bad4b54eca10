"""Which rows of a batch take part in a loss, by signal, and the checks of values that need to look at the device.

Looking costs a wait for the device, so everything is asked at once: the number of rows of each group and whether any
value is wrong are read back together. What exactly is wrong is worked out only after that. Where the caller says which
rows take part nothing is read at all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rbfast.loss.teacher_signal import Signal, TopK, mark_padding, merge_duplicates, top_k_faults


class RowGroup(NamedTuple):
    """Rows that share a signal (None: text only).

    rows: [size] into the T axis; None: all T rows in order.
    entries: [size] into the signal's N axis; None: entry i belongs to the group's row i.
    """

    size: int
    rows: Tensor | None
    signal: Signal | None = None
    entries: Tensor | None = None


class Fault(NamedTuple):
    """A check that waits to be read: the values that fail it, and a function that says what is wrong with them."""

    wrong: Tensor
    explain: Callable[[], str]


def group_known_rows(signals: Sequence[Signal], rows: Tensor, tokens: int) -> list[RowGroup]:
    """The groups of rows [n] that are known to take part, all rows of the signals among them; reads nothing back."""
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows must be int64 [n], the rows that take part, got {rows.dtype} {list(rows.shape)}")
    everything = len(rows) == tokens
    if not len(rows):
        return []
    if len(signals) == 1 and signals[0].rows is None:
        return [RowGroup(tokens, None, signals[0]) if everything else RowGroup(len(rows), rows, signals[0], rows)]
    if not signals:
        return [RowGroup(len(rows), None if everything else rows)]
    claimed = [_rows_of(signal, tokens, rows.device) for signal in signals]
    left = len(rows) - sum(map(len, claimed))
    if left < 0:
        raise ValueError(
            f"the signals cover {len(rows) - left} rows, but only {len(rows)} take part; "
            "leave the others out of the signals too"
        )
    groups = [RowGroup(len(their), their, signal) for their, signal in zip(claimed, signals, strict=True)]
    if left:
        has_signal = torch.zeros(tokens, dtype=torch.bool, device=rows.device)
        for their in claimed:
            has_signal.index_fill_(0, their, True)
        order = has_signal[rows].argsort(stable=True)
        groups.append(RowGroup(left, rows[order[:left]]))
    return [group for group in groups if group.size]


def group_rows(
    signals: Sequence[Signal], labels: Tensor, ignore_index: int, faults: Sequence[Fault], vocabulary: int
) -> list[RowGroup]:
    """The groups of the rows [T] whose label is not ignored; reads back from the device once.

    Raises:
        ValueError: a fault was found, or two signals claim one row, or a signal holds no distribution.
    """
    tokens, text = len(labels), len(signals)
    owner = torch.full((tokens,), text, dtype=torch.int64, device=labels.device)
    claims = torch.zeros_like(owner)
    faults, entries, has_repeats = list(faults), [], []
    signals = [mark_padding(signal) if isinstance(signal, TopK) else signal for signal in signals]
    for number, signal in enumerate(signals):
        if isinstance(signal, TopK):
            faults += [Fault(*fault) for fault in top_k_faults(signal, vocabulary)]
            has_repeats.append(_has_repeats(signal.ids))
        entries.append(None if signal.rows is None else _claim(signal.rows, number, owner, claims, faults))
        if signal.rows is None:
            owner.fill_(number)
            claims += 1
    if len(signals) > 1 or any(signal.rows is not None for signal in signals):
        faults.append(Fault(claims > 1, lambda: _say_claimed_twice(claims)))
    key = owner.masked_fill(labels == ignore_index, text + 1)
    counts, is_wrong, repeats = _read_back(key, text + 1, faults, has_repeats)
    if any(is_wrong):
        raise ValueError(faults[is_wrong.index(True)].explain())
    signals = [merge_duplicates(signal) if isinstance(signal, TopK) and any(repeats) else signal for signal in signals]
    return _split(key, counts, signals, entries)


def _claim(rows: Tensor, number: int, owner: Tensor, claims: Tensor, faults: list[Fault]) -> Tensor:
    """Marks the rows [N] of a signal as its own; returns for each row of the batch which entry is its [T]."""
    tokens = len(owner)
    faults.append(
        Fault((rows < 0) | (rows >= tokens), lambda: f"rows must be in [0, {tokens}), got {rows.min()}..{rows.max()}")
    )
    inside = (
        rows.clamp(0, tokens - 1) if tokens else rows[:0]
    )  # a row outside must not stop the device before it is read
    owner.index_fill_(0, inside, number)
    claims.index_add_(0, inside, torch.ones_like(inside))
    return torch.zeros_like(owner).index_copy_(0, inside, torch.arange(len(inside), device=owner.device))


def _say_claimed_twice(claims: Tensor) -> str:
    return f"row {int((claims > 1).nonzero()[0])} has more than one teacher signal; give each row one"


def _has_repeats(ids: Tensor) -> Tensor:
    """Whether a row of ids [N, k] holds an id twice; -1 does not count."""
    ordered = ids.sort(1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def _read_back(
    key: Tensor, groups: int, faults: Sequence[Fault], flags: Sequence[Tensor]
) -> tuple[list[int], list[bool], list[bool]]:
    """How many rows have each key below `groups`, which faults there are, and the flags: the one wait of a call."""
    numbers = torch.arange(groups, device=key.device).unsqueeze(1)
    answers = [
        (key == numbers).sum(1),
        *(fault.wrong.any().reshape(1) for fault in faults),
        *(f.reshape(1) for f in flags),
    ]
    values = torch.cat([answer.to(torch.int64) for answer in answers]).tolist()
    end = groups + len(faults)
    return values[:groups], [bool(v) for v in values[groups:end]], [bool(v) for v in values[end:]]


def _split(
    key: Tensor, counts: Sequence[int], signals: Sequence[Signal], entries: Sequence[Tensor | None]
) -> list[RowGroup]:
    """The groups, in the order of their keys; rows ascend within a group."""
    tokens = len(key)
    if max(counts) == tokens > 0:
        whole = counts.index(tokens)
        if whole == len(signals):
            return [RowGroup(tokens, None)]
        return [RowGroup(tokens, None, signals[whole], entries[whole])]
    groups, start = [], 0
    order = key.argsort(stable=True)
    for number, count in enumerate(counts):
        rows, start = order[start : start + count], start + count
        if count and number == len(signals):
            groups.append(RowGroup(count, rows))
        elif count:
            place = entries[number]
            groups.append(RowGroup(count, rows, signals[number], rows if place is None else place[rows]))
    return groups


def _rows_of(signal: Signal, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(tokens, device=device) if signal.rows is None else signal.rows
