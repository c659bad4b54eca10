"""Look up the fields of a row by meaning: which of them may be its problem, its reply, its answer.

RowFields({"question": "2+2?", "gold": "4"}).one("answer")                # (Field("gold"), "4")
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rbfast.data.answers import as_text
from rbfast.data.choices import options_in_fields, parse_options
from rbfast.data.fields import MAPPED, Field, as_mapping, fields_by_meaning, value_at
from rbfast.data.trace import TraceError

_MEDIA = re.compile(r"(image|video|audio)s?_?\d*", re.IGNORECASE)


@dataclass(frozen=True)
class RowFields:
    """A row whose fields are looked up by meaning. `fields` maps meanings to field names, and takes precedence."""

    values: Mapping[str, Any]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    teacher_field: str | None = None

    def candidates(self, meaning: str) -> list[tuple[Field, Any]]:
        """The non-empty fields with this meaning."""
        if meaning in self.fields:
            return [(Field(self.fields[meaning]), value_at(self.values, self.fields[meaning]))]
        taken = set(self.fields.values())
        named = fields_by_meaning(tuple(map(str, self.values))).get(meaning, ())
        return [
            (field, self.values[field.name])
            for field in named
            if field.name not in taken and _is_filled(self.values[field.name])
        ]

    @cached_property
    def options(self) -> Mapping[str, str] | None:
        """The options of a multiple-choice question, by label."""
        named = next((found for _, value in self.candidates("options") if (found := parse_options(value))), None)
        return named or options_in_fields(self.values)

    def choices(self) -> list[tuple[Field, Any]]:
        """The fields that may say which option is right. If the options are numbers, a number is an option, not an
        index."""
        candidates = [*self.candidates("answer"), *self.candidates("choice"), *self.candidates("verdict")]
        lists = [value for _, value in self.candidates("options") if isinstance(value, list | tuple)]
        are_numbers = any(isinstance(option, int | float) for options in lists for option in options)
        return [(field, as_text(value)) for field, value in candidates] if are_numbers else candidates

    @property
    def has_reply(self) -> bool:
        return any(self.candidates(meaning) for meaning in ("reply", "reasoning"))

    def unknown(self) -> list[tuple[str, Any]]:
        """The non-empty fields of unknown meaning."""
        known = {field.name for fields in fields_by_meaning(tuple(map(str, self.values))).values() for field in fields}
        return [(str(name), value) for name, value in self.values.items() if name not in known and _is_filled(value)]

    def inner_answers(self) -> list[tuple[Field, Any]]:
        """Answers inside objects of the row, or inside JSON text: `reward_model.ground_truth`."""
        answers = []
        for name, value in self.values.items():
            inner = as_mapping(value)
            for field in fields_by_meaning(tuple(map(str, inner))).get("answer", ()):
                if _is_filled(inner[field.name]):
                    answers.append((Field(f"{name}.{field.name}", field.teacher), inner[field.name]))
        return answers

    def one(self, meaning: str) -> tuple[Field, Any] | None:
        """The field with this meaning, or None. Raises TraceError if several differ."""
        return sole_candidate(meaning, self.candidates(meaning))

    def text(self, meaning: str) -> str | None:
        """The first text or number with this meaning."""
        return next((text for _, value in self.candidates(meaning) if (text := as_text(value)) is not None), None)


def sole_candidate(meaning: str, candidates: Sequence[tuple[Field, Any]]) -> tuple[Field, Any] | None:
    """The only candidate, or None. Raises TraceError if there are several with different values."""
    if any(value != candidates[0][1] for _, value in candidates[1:]):
        names = [field.name for field, _ in candidates]
        fix = f"choose one with --map {meaning}={names[0]}" if meaning in MAPPED else "keep one of them"
        raise TraceError(f"{meaning}: expected one field or equal values, got {' and '.join(names)}; {fix}")
    return candidates[0] if candidates else None


def check_shows_nothing(row: Mapping[str, Any]) -> None:
    """Raises TraceError for a row with an image, a video or a sound, which a student of text does not get."""
    for name, value in row.items():
        if _MEDIA.fullmatch(str(name)) and _shows_something(value):
            raise TraceError(
                f"{name}: the row comes with an image, a video or a sound, which a student of text does not get; leave "
                "the row out, or remove this field if the text does not need it"
            )


def _shows_something(value: object) -> bool:
    """Whether a value is a medium: not a flag, a missing value, or an object or list without content."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "none", "null", "nan", "n/a")
    if isinstance(value, Mapping):
        return any(map(_shows_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_shows_something, value))
    return value is not None and not isinstance(value, bool | int | float)


def _is_filled(value: object) -> bool:
    return value is not None and value != "" and not (isinstance(value, list | tuple | Mapping) and not value)
