"""Multiple-choice questions: the options become part of the problem, and the answer is the label of an option.

```python
parse_options(["41", "42"])                          # {"A": "41", "B": "42"}
```
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

from rbfast.data.answers import as_text
from rbfast.utils.records import objects_of

_OWN_FIELD = re.compile(r"(?:op|option|choice|answer|ending)?[_ ]?([a-z]|\d)", re.IGNORECASE)
_LABELLED = re.compile(r"\s*\(?([A-Za-z])\s?[).:]\s*(.*)", re.DOTALL)
_IN_A_TEXT = re.compile(r"(?:^|[\s,;\[])\(?([A-Za-z])\s?[).:]\s*")
_LABELS, _TEXTS = ("label", "key", "id", "letter"), ("text", "value", "content", "option")


def parse_options(value: Any) -> dict[str, str] | None:
    """Options by label; None if `value` holds no options, or fewer than two.

    `value` may be a list of texts, of labelled texts ("A) ..") or of objects; an object of texts by label; an object of
    the lists `text` and `label`; any of these as JSON text; or a text like `a) 41, b) 42`.
    """
    if isinstance(value, str):
        value = _parse_option_text(value)
    if isinstance(value, Mapping):
        objects = objects_of(value)
        if objects is None:
            found = {str(label): text for label, text in value.items() if isinstance(text, str)}
            return found if len(found) > 1 and len(found) == len(value) else None
        value = objects
    if not isinstance(value, list | tuple) or len(value) < 2 or len(value) > len(ascii_uppercase):
        return None
    pairs = [_labelled_option(item, letter) for item, letter in zip(value, ascii_uppercase, strict=False)]
    found = dict(pair for pair in pairs if pair)
    return found if len(found) == len(value) else None


def _parse_option_text(text: str) -> Any:
    """The options in JSON text or in a text like `a) 41, b) 42`; None if the labels are not consecutive."""
    if text.strip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    parts = _IN_A_TEXT.split(text)
    labels, texts = parts[1::2], [part.strip(" ,;\n]'\"") for part in parts[2::2]]
    in_order = [label.upper() for label in labels] == list(ascii_uppercase[: len(labels)])
    return dict(zip(labels, texts, strict=True)) if in_order and len(labels) > 1 else None


def _labelled_option(item: Any, letter: str) -> tuple[str, str] | None:
    if isinstance(item, Mapping):
        label = next((as_text(item[key]) for key in _LABELS if key in item), None) or letter
        text = next((as_text(item[key]) for key in _TEXTS if key in item), None)
        return (label, text) if text else None
    text = as_text(item)
    if text is None:
        return None
    own = _LABELLED.fullmatch(text)
    return (letter, own[2].strip()) if own and own[1].upper() == letter else (letter, text)


def options_in_fields(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Options that each have a field: `opa`, `opb`, ..; `A`, `B`, ..; `option_1`, `option_2`, .."""
    stems: dict[str, dict[str, str]] = {}
    for name, value in row.items():
        match = _OWN_FIELD.fullmatch(str(name))
        if match and (text := as_text(value)):
            stems.setdefault(str(name)[: match.start(1)].lower(), {})[match[1].upper()] = text
    for found in stems.values():
        labels = sorted(found)
        if len(labels) > 2 and labels[0] in "A01" and all(ord(b) - ord(a) == 1 for a, b in pairwise(labels)):
            return {letter: found[label] for letter, label in zip(ascii_uppercase, labels, strict=False)}
    return None


def with_options(problem: str, options: Mapping[str, str]) -> str:
    """The problem followed by its options, unless it already contains them."""
    if all(text in problem for text in options.values()):
        return problem
    return "\n".join([f"{problem.rstrip()}\n", *(f"{label}. {text}" for label, text in options.items())])


def chosen_option(answers: Sequence[Any], options: Mapping[str, str]) -> str | None:
    """The option that the first matching answer names: its text if the answer is the text, else its label.

    An answer may be a label, the text of an option, or a 0-based index. A number is tried as an index before it is
    tried as a text: 2 with the options "8", "2" and "24" is the third. None if no answer names an option.
    """
    labels = list(options)
    for answer in answers:
        text = (as_text(answer) or "").strip()
        label = text.strip("().: ")
        by_label = next((own for own in labels if label and own.upper() == label.upper()), None)
        is_index = label.isdecimal() and len(label) < 3 and int(label) < len(labels)  # int() refuses 5,000 digits
        by_index = labels[int(label)] if is_index else None
        by_text = text if text in options.values() else None
        matches = by_label or by_index, by_text
        first, second = matches if isinstance(answer, int | float) else reversed(matches)
        if found := first or second:
            return found
    return None
