r"""The final answer that a solution states.

```python
extract_answer(r"thus \boxed{\frac{1}{2}}")                # "\\frac{1}{2}"
without_answer("48 / 2 = 24\n#### 24")                     # "48 / 2 = 24"
```
"""

import json
import math
import re
from collections.abc import Mapping

from rbfast.data.thinking_marks import end_of_thinking

_TAG = re.compile(r"<answer>(.*?)(?=</answer>|<answer>|\Z)", re.DOTALL | re.IGNORECASE)
_CLOSED_TAG = re.compile(r"</answer>[\s.*`$]*\Z", re.IGNORECASE)
# Hashes that are no heading: the text ends there, or in a line that says the answer again, or a line holds a value.
_LAST_HASHES = re.compile(r"####\s*(\S.*?)\s*(?=\Z|\n(?=[^\n]{0,300}\Z)[^\n]*\banswer\b[^\n]*\1)", re.IGNORECASE)
_VALUE = re.compile(
    r"[-+$]{0,2}\.?\d[\d.,/^%:]*(?<![.,:])(?: [a-z%]+)?|[a-z] ?= ?\S+|\\[^\n]*\S|\$[^$\n]+\$|\(?[A-J]\)?", re.IGNORECASE
)
_HASHES = re.compile(_LAST_HASHES.pattern + rf"|####[ \t]*({_VALUE.pattern})[ \t\r]*(?=\n)", re.IGNORECASE)
_PHRASE = re.compile(
    r"(?:\banswer\b[^.\n:=]{0,60}?(?:\bis\b|:|=)|答案[应该就]*\s*(?:是|为|选|：|:)|故选)[*_:：\s]*"
    r"(?:(?:the )?(?:final )?answer\s*(?:is\b|:|=)[*_:\s]*)?"  # a heading, and the phrase under it
    r"(?:(?:(?:most )?likely|probably|given by)\b[*:\s]*)?(?:(?<=\n)[-•]\s+|```\w*\n\s*)?"
    r"(\$\$[ \t]*\n[^$]+\$\$|\\\[[ \t]*\n(?:(?!\\\])[\s\S]){1,1000}\\\]|\S.*)",
    re.IGNORECASE,
)
# A heading with one line under it, which ends the text.
_HEADED = re.compile(r"(?:^|\n)[#*_ ]*(?:final )?answer[*_:： ]*\n\s*(\S[^\n]*?)\s*\Z", re.IGNORECASE)
_HOPE = re.compile(r"\.?\s*I hope (?:it|this) is correct\b.*", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{|\d)")
_BARE = re.compile(r"\d+(?:[.,]\d+)*")  # after a box without braces
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SENTENCES, _PROSE = re.compile(r"\n|[.!?]\s"), re.compile(r"(?:[^\W\d_]+,? ){5}")
_EDGES = " \t*_$`.。"
# What may stand between two boxes of one answer: `\boxed{2}$ and $x = \boxed{3}`.
_JOINT = re.compile(
    r"(?:[\s$,;&.*]|\\[()\[\],;!]|\\(?:quad|qquad)|\\text\{\s*(?:,\s*)?(?:and|or)?\s*\}|\b(?:and|or)\b"
    r"|[a-zA-Z](?:_\{?\w\}?)?\s*=)*"
)


def extract_answer(text: str) -> str | None:
    """The final answer a completion states, or None if it marks none.

    Looked for in this order, the last one of its kind: `<answer>..</answer>` (closed or not), a balanced `\\boxed{}`
    (or several that are listed: `\\boxed{2}` and `\\boxed{3}`), `#### ..`, `answer is ..` / `Answer: ..`. Of a
    completion that closes its thinking, what follows it counts; if that is of several lines and marks no answer, the
    whole.
    """
    said = without_thinking(text)
    found = _marked(said) or _phrased(said)
    if found or "\n" not in said.strip():
        return found
    return _marked(text) or _phrased(text)


def known_answer(text: str) -> str | None:
    """The right answer in a field that has one: what it marks, else all of it. None for working, in several lines or
    sentences, that marks no answer: nothing would equal that."""
    stated = extract_answer(text)
    if stated is None and _SENTENCES.search(text.strip()) and _PROSE.search(text):
        return None
    return stated or text.strip()


def lacks_answer(text: str) -> bool:
    """Whether a completion says that it has no answer: nothing in its last `<answer>`, or after its thinking."""
    tagged, end = _TAG.findall(text), end_of_thinking(text)
    return bool(tagged and not tagged[-1].strip()) or (end > 0 and not text[end:].strip())


def without_thinking(text: str) -> str:
    """What a completion says after its thinking; all of it if it closes none, or says nothing after it."""
    said = text[end_of_thinking(text) :]
    return said if said.strip() else text


def stated_answer(text: str) -> str | None:
    """As `extract_answer`, for a text that need not end in an answer: `the answer is ..` counts in its last line alone,
    and without the signs around it."""
    found = marked_answer(text)
    if found is None and (phrase := _phrased(text.strip().rpartition("\n")[2])):
        found = (_last_of(_PHRASE, phrase) or phrase).strip(_EDGES) or None
    headed = _HEADED.search(text) if found is None else None
    return headed[1].strip(_EDGES) or None if headed else found


def marked_answer(text: str) -> str | None:
    """The answer that a text marks by a tag, a box or `####` at its end; None if it marks none."""
    return _marked(text, _LAST_HASHES)


def _marked(text: str, hashes: re.Pattern[str] = _HASHES) -> str | None:
    tagged = [match.strip() for match in _TAG.findall(text)]
    # A student that repeats the instruction writes "between <answer> and </answer>": that "and" is no answer.
    if answer := next((tag for tag in reversed(tagged) if tag and tag != "and"), None):
        return _last_boxed(answer) or answer
    return _last_boxed(text) or _last_of(hashes, text)


def without_answer(text: str) -> str:
    """The text before a final `<answer>` or `####`, which hold only the answer; a box is part of its sentence."""
    for pattern in (_TAG, _LAST_HASHES):
        if found := list(pattern.finditer(text)):
            text = text[: found[-1].start()]
    return text.strip()


def ends_in_answer(text: str) -> bool:
    """Whether a text ends in a closed `<answer>` or in `####` and a value: it was not cut before it came to its answer.
    What else follows `####` may be a heading that was cut."""
    return bool(_CLOSED_TAG.search(text) or _VALUE.fullmatch(_last_of(_LAST_HASHES, text) or ""))


def as_text(value: object) -> str | None:
    """A text as it is, a number as a person writes it (5.0 is 5), None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def answer_text(value: object) -> str | None:
    """The text of an answer: as `as_text`, of a truth value, of a list of one or its JSON, and of an object with a
    `value` or `text`."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value[:1] == "[":
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return as_text(parsed[0]) or value if isinstance(parsed, list) and len(parsed) == 1 else value
    if isinstance(value, Mapping):
        value = value.get("value") or value.get("text")
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return as_text(value)


def _phrased(text: str) -> str | None:
    phrase = _HOPE.sub("", _last_of(_PHRASE, text) or "")
    # The signs before it are no part of it, but for those that open bold: "**42**, as 6 times 7 is 42".
    return (f"**{phrase}" if phrase.count("**") % 2 else phrase) or None


def _last_of(pattern: re.Pattern[str], text: str) -> str | None:
    """What the last match holds, in the first of its groups that took part."""
    found = list(pattern.finditer(text))
    return next(filter(None, found[-1].groups())).strip() if found else None


def _last_boxed(text: str) -> str | None:
    """What the last box holds that closes; of boxes that are listed, all."""
    boxes = [(match.start(), *_content(text, match.end())) for match in _BOX.finditer(text)]
    closed = [(start, content.strip(), end) for start, content, end in boxes if content.strip()]
    if not closed:
        return None
    first, content, _ = closed[-1]
    listed = [content]
    for start, content, end in reversed(closed[:-1]):
        if start >= first or end > first:
            continue  # a box around the others
        if not _JOINT.fullmatch(text[end:first]):
            break
        first = start
        listed.insert(0, content)
    return ", ".join(dict.fromkeys(listed))


def _content(text: str, start: int) -> tuple[str, int]:
    if text[start] != "{":
        bare = _BARE.match(text, start)
        return (bare[0], bare.end()) if bare else ("", start)
    end = closing(text, start)
    return ("", start) if end is None else (text[start + 1 : end], end + 1)


def closing(text: str, start: int) -> int | None:
    r"""Where the brace that opens at `start` closes; braces that are signs (`\{`) don't count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
