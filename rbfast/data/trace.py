"""The trace: its fields, their checks, and the text the student learns to write.

A `Trace` is always valid: it checks its fields when it is created. A `TraceError` reads
"file:line: field: expected ..., got ...; what to do".
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rbfast.data.answers import as_text
from rbfast.data.spans import ROLES, STRATEGIC, Span, split_spans
from rbfast.utils.records import objects_of, show

_REQUIRED = ("problem", "reasoning", "answer")
_OPTIONAL_TEXT = ("plan", "domain", "source", "teacher", "id", "system")
MAY_BE_NUMBERS = ("answer", "id", "domain", "source", "teacher")  # in a file; converted to text
_LOGPROB_SLACK = 1e-3  # a log-softmax in half precision can end a little above zero


class TraceError(ValueError):
    """A trace that cannot be used: its location, the field, what was expected, what came, what to do."""


@dataclass(frozen=True)
class Trace:
    """One training example.

    `spans` tile `reasoning` exactly, in characters. `system` is the problem's system prompt. `turns` are the messages
    between `system` and `problem`, `{"role": "user" or "assistant", "content": text}` alternating; a reply may have its
    own `reasoning`. Both are part of the student's prompt. `signals` holds the teacher's top log-probs,
    `{"ids": [[int]], "logprobs": [[float]]}`, one row for each token the student is trained on (see `encode`).
    Raises TraceError if a field has the wrong type, is empty or not finite, or if the spans do not tile.
    """

    problem: str
    reasoning: str
    answer: str
    plan: str | None = None
    domain: str | None = None
    source: str | None = None
    teacher: str | None = None
    id: str | None = None
    difficulty: float | None = None
    verified: bool | None = None
    spans: tuple[Span, ...] | None = None
    signals: dict[str, list[list[Any]]] | None = None
    system: str | None = None
    turns: tuple[Mapping[str, str], ...] | None = None

    def __post_init__(self) -> None:
        for field in _REQUIRED:
            check_text(field, getattr(self, field))
            if not getattr(self, field).strip():
                raise TraceError(f"{field}: expected text, got an empty string; fill it or leave the trace out")
        for field in _OPTIONAL_TEXT:
            if getattr(self, field) is not None:
                check_text(field, getattr(self, field))
        _check_difficulty(self.difficulty)
        if not isinstance(self.verified, bool | None):
            raise TraceError(f"verified: expected true, false or null, got {show(self.verified)}")
        if self.spans is not None:
            _check_spans(self.spans, len(self.reasoning))
        if self.signals is not None:
            _check_signals(self.signals)
        if self.turns is not None:
            _check_turns(self.turns)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Trace":
        """The trace in a row of a file.

        Unknown fields are ignored. An empty optional text counts as absent. Numbers in `answer`, `id`, `domain`,
        `source` and `teacher` are converted to text.
        """
        if not isinstance(fields, Mapping):
            raise TraceError(f"expected an object with {', '.join(_REQUIRED)}, got {show(fields)}")
        if missing := [field for field in _REQUIRED if field not in fields]:
            present = ", ".join(map(str, list(fields)[:20])) or "no fields"
            raise TraceError(f"{missing[0]}: expected this field, got {present}; rename the fields or add it")
        known: dict[str, Any] = {field.name: fields.get(field.name) for field in dataclasses.fields(cls)}
        known.update({field: None for field in _OPTIONAL_TEXT if known[field] == ""})
        known.update({field: text for field in MAY_BE_NUMBERS if (text := as_text(known[field])) is not None})
        if known["spans"] is not None:
            known["spans"] = _parse_spans(known["spans"])
        known["turns"] = _parse_turns(known["turns"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.spans is not None:
            fields["spans"] = [[span.start, span.end, ROLES[span.role]] for span in self.spans]
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def name(self) -> str:
        """The trace in messages: its id, or the start of its problem."""
        return self.id or repr(self.problem[:40])

    def thought(self) -> str:
        """The plan and the reasoning."""
        return f"{self._plan_text()}{self.reasoning}"

    def thought_spans(self) -> list[Span]:
        """Spans that tile `thought()` exactly: the plan, then the reasoning's `spans`, or those of `split_spans`."""
        offset = len(self._plan_text())
        spans = [Span(0, offset, STRATEGIC)] if offset else []
        inner = split_spans(self.reasoning) if self.spans is None else self.spans
        return [*spans, *(Span(start + offset, end + offset, role) for start, end, role in inner)]

    def completion(self) -> str:
        """Plan, reasoning and answer as one text: what a student without a thinking template learns to write."""
        return f"{self.thought()}\n\n<answer>{self.answer}</answer>"

    def _plan_text(self) -> str:
        return f"{self.plan}\n\n" if self.plan else ""


def is_finite(value: object) -> bool:
    """Whether the value is a number that fits a finite float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise TraceError(f"{field}: expected a string, got {show(value)}; write it as text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TraceError(
            f"{field}: expected Unicode text, got half a surrogate pair at character {error.start}; "
            "write the file again from its source as UTF-8"
        ) from None


def _check_difficulty(value: object) -> None:
    if value is not None and not is_finite(value):
        raise TraceError(f"difficulty: expected a finite number or null, got {show(value)}")


def _parse_spans(items: object) -> tuple[Span, ...]:
    """Spans from [[start, end, "role"], ...], from objects with these three keys (Parquet has no mixed lists), or from
    an object of three lists (how `datasets` stores them)."""
    if isinstance(items, Mapping) and set(items) == {"start", "end", "role"}:
        items = objects_of(items)
    if not isinstance(items, list | tuple):
        raise TraceError(f'spans: expected [[start, end, "role"], ...], got {show(items)}')
    spans = []
    for item in items:
        parts = [item.get(key) for key in ("start", "end", "role")] if isinstance(item, Mapping) else item
        if not isinstance(parts, list | tuple) or len(parts) != 3 or parts[2] not in ROLES:
            raise TraceError(f"spans: expected [start, end, role] with a role of {', '.join(ROLES)}, got {show(item)}")
        spans.append(Span(parts[0], parts[1], ROLES.index(parts[2])))
    return tuple(spans)


def _check_spans(spans: Sequence[Span], length: int) -> None:
    position = 0
    for start, end, role in spans:
        if type(start) is not int or type(end) is not int or role not in range(len(ROLES)):
            raise TraceError(f"spans: expected integers and a role, got {show((start, end, role))}")
        if start != position or end <= start:
            raise TraceError(
                f"spans: expected a span that starts at character {position} and is not empty, got [{start}, {end}); "
                "spans must tile the reasoning without gaps or overlaps"
            )
        position = end
    if position != length:
        raise TraceError(
            f"spans: expected the last span to end with the reasoning at character {length}, got {position}"
        )


def _parse_turns(items: object) -> Any:
    """Turns from a list of messages, or from an object of lists (how `datasets` stores it), without empty fields."""
    if isinstance(items, Mapping):
        items = objects_of(items)
    if not isinstance(items, list | tuple) or not all(isinstance(item, Mapping) for item in items):
        return items
    return tuple({name: text for name, text in item.items() if text not in (None, "")} for item in items) or None


def _check_turns(turns: object) -> None:
    if not isinstance(turns, tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        raise TraceError(f'turns: expected [{{"role": "user", "content": ".."}}, ...], got {show(turns)}')
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.get("role") != expected:
            raise TraceError(f"turns: expected the role {expected} in turn {number + 1}, got {show(turn.get('role'))}")
        check_text(f"turns: content of turn {number + 1}", turn.get("content"))
        if "reasoning" in turn:
            check_text(f"turns: reasoning of turn {number + 1}", turn["reasoning"])
    if len(turns) % 2:
        raise TraceError("turns: expected a reply to every question before the problem, got none to the last")


def _check_signals(signals: object) -> None:
    if not isinstance(signals, Mapping) or set(signals) != {"ids", "logprobs"}:
        raise TraceError(f'signals: expected {{"ids": [[...]], "logprobs": [[...]]}}, got {show(signals)}')
    for name, kinds in (("ids", {int}), ("logprobs", {int, float})):
        rows = signals[name]
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise TraceError(f"signals.{name}: expected a list of lists, one for each trained token, got {show(rows)}")
        if wrong := set(map(type, chain.from_iterable(rows))) - kinds:
            raise TraceError(f"signals.{name}: expected numbers, got {wrong.pop().__name__}")
    ids, logprobs = signals["ids"], signals["logprobs"]
    if (counts := list(map(len, ids))) != list(map(len, logprobs)):
        raise TraceError("signals: expected as many ids as logprobs in every row, got different lengths")
    if 0 in counts:
        raise TraceError(f"signals: expected at least one id in every row, got none in row {counts.index(0)}")
    if any(token < 0 for token in chain.from_iterable(ids)):
        raise TraceError("signals.ids: expected token ids of 0 or more, got a negative one")
    for value in chain.from_iterable(logprobs):
        if not is_finite(value) or value > _LOGPROB_SLACK:
            raise TraceError(
                f"signals.logprobs: expected finite log-probabilities of at most 0, got {value}; leave out tokens of "
                "probability 0, and pass log-probabilities rather than logits"
            )
