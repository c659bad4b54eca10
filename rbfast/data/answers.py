r"""The final answer that a solution states.

```python
stated_answer(r"So it is $\boxed{\frac{1}{2}}$.")         # "\\frac{1}{2}"
without_answer("48 / 2 = 24\n#### 24")                     # "48 / 2 = 24"
```
"""

import math
import re

_TAG = re.compile(r"<answer>(.*?)(?:</answer>|(?=<answer>)|\Z)", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_HASHES = re.compile(r"^.*?####[ \t]*(\S.*)$", re.MULTILINE)
_PHRASE = re.compile(r"\banswer\b[^.\n:=]{0,40}?(?:\bis\b|:|=)[*_:\s]*(\S.*)", re.IGNORECASE)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_EDGES = " \t*_$`."


def stated_answer(text: str) -> str | None:
    """The answer that a text marks, the last of its kind: `<answer>`, a balanced `\\boxed{}`, `#### ..`; else "the
    answer is .." in its last line; None if there is none."""
    tags = [content for content in (match[1].strip() for match in _TAG.finditer(text)) if content and content != "and"]
    if tags:
        return _boxed(tags[-1]) or _last_of(_HASHES, tags[-1]) or tags[-1]
    return _boxed(text) or _last_of(_HASHES, text) or _phrase(text)


def without_answer(text: str) -> str:
    """The text before a final `<answer>` or `####`, which hold only the answer; a box is part of its sentence."""
    for pattern in (_TAG, _HASHES):
        if found := list(pattern.finditer(text)):
            text = text[: text.index("####", found[-1].start()) if pattern is _HASHES else found[-1].start()]
    return text.strip()


def as_text(value: object) -> str | None:
    """A text as it is, a number as a person writes it (5.0 is 5), None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(int(value)) if isinstance(value, int) or (value.is_integer() and abs(value) < 2**53) else repr(value)


def _last_of(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1].strip() if found else None


def _phrase(text: str) -> str | None:
    found = _last_of(_PHRASE, text.strip().rpartition("\n")[2])
    return (found and found.strip(_EDGES)) or None


def _boxed(text: str) -> str | None:
    """What the last box that closes holds; of boxes in each other, the outermost."""
    found, end = None, 0
    for opening in _BOX.finditer(text):
        if opening.start() < end:
            continue
        closed = _closing(text, opening.end())
        if closed is not None and (content := text[opening.end() : closed].strip()):
            found, end = content, closed
    return found


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` closes."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
