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
# `####` that marks an answer, not a heading: it ends the text, the last line repeats it, or its line holds a value.
# The match stops before another `####` and never ends in a space, so that a long line of either takes linear time.
_SAID = r"(?:(?!####)\S)"
_LAST_HASHES = re.compile(
    rf"(?<!#)####\s*({_SAID}(?:[^\S\n]*{_SAID})*)\s*(?=\Z|\n(?=[^\n]{{0,300}}\Z)[^\n]*\banswer\b[^\n]*\1)",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"[-+$]{0,2}\.?\d[\d.,/^%:]*(?<![.,:])(?: [a-z%]+)?"
    rf"|[a-z] ?= ?{_SAID}+|\\(?:[^\S\n]*{_SAID})+|\$[^$\n]+\$|\(?[A-J]\)?",
    re.IGNORECASE,
)
_HASHES = re.compile(_LAST_HASHES.pattern + rf"|(?<!#)####[ \t]*({_VALUE.pattern})[ \t\r]*(?=\n)", re.IGNORECASE)
_PHRASE = re.compile(
    r"(?:\banswer\b[^.\n:=]{0,60}?(?:\bis\b|:|=)|答案[应该就]*\s*(?:是|为|选|：|:)|故选)[*_:：\s]*"
    r"(?:(?:the )?(?:final )?answer\s*(?:is\b|:|=)[*_:\s]*)?"  # the phrase may follow a heading that says the same
    r"(?:(?:(?:most )?likely|probably|given by)\b[*:\s]*)?(?:(?<=\n)[-•]\s+|```\w*\n\s*)?"
    r"(\$\$[ \t]*\n[^$]+\$\$|\\\[[ \t]*\n(?:(?!\\\])[\s\S]){1,1000}\\\]|\S.*)",
    re.IGNORECASE,
)
# An "Answer" heading and one line under it, at the end of the text.
_HEADED = re.compile(r"(?:^|\n)[#*_ ]*(?:final )?answer[*_:： ]*\n\s*(\S(?:[^\n]*\S)?)\s*\Z", re.IGNORECASE)
_HOPE = re.compile(r"(?:\.|(?<!\s))\s*I hope (?:it|this) is correct\b.*", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{|\d)")
_BARE = re.compile(r"\d+(?:[.,]\d+)*")  # the content of a box without braces
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SENTENCES, _PROSE = re.compile(r"\n|[.!?]\s"), re.compile(r"(?<![^\W\d_])(?:[^\W\d_]+,? ){5}")
_PLACEHOLDERS = {"", "n/a", "nan", "notfound", "not found", "proof"}  # "notfound" and "proof" are NuminaMath's
_FULL_STOP = re.compile(r"(?<!\.)[.。]\Z")  # not the end of an ellipsis: 0.333...
_PAIRED = ("$$", "**", "__", "$", "*", "_", "`")  # Markdown and LaTeX around a text
# The text allowed between two boxes of one answer: `\boxed{2}$ and $x = \boxed{3}`.
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&.*]|\\[()\[\],;!]|\\(?:quad|qquad)|\\text\{(?:\s*,)?\s*(?:(?:and|or)\s*)?\}|\b(?:and|or)\b"
    r"|[a-zA-Z](?:_\{?\w\}?)?\s*=)*"
)


def extract_answer(text: str) -> str | None:
    """The final answer a completion states, or None if it marks none.

    The forms are tried in this order, and the last match of a form is taken: `<answer>..</answer>` (closed or not), a
    balanced `\\boxed{}` (or a list of them: `\\boxed{2}` and `\\boxed{3}`), `#### ..`, `answer is ..` / `Answer: ..`.
    If the completion closes its thinking, only the text after it is searched. If that text has several lines and marks
    no answer, the whole completion is searched.
    """
    after = without_thinking(text)
    answer = _find_marked(after) or _find_phrased(after)
    if answer or "\n" not in after.strip():
        return answer
    return _find_marked(text) or _find_phrased(text)


def known_answer(text: str) -> str | None:
    """The reference answer in the text of a field: the answer that it marks, else the whole text.

    None if no reply could equal it: a placeholder, or a solution (several lines or sentences) that marks no answer.
    """
    stated = extract_answer(text)
    if stated is None and _SENTENCES.search(text.strip()) and _PROSE.search(text):
        return None
    known = stated or text.strip()
    return None if is_placeholder(known) else known


def is_placeholder(answer: str) -> bool:
    """Whether an answer field holds a placeholder for a missing answer: "notfound"."""
    return answer.strip().casefold() in _PLACEHOLDERS


def lacks_answer(text: str) -> bool:
    """Whether a completion leaves its answer empty: nothing in its last `<answer>`, or nothing after its thinking."""
    tagged, end = _TAG.findall(text), end_of_thinking(text)
    return bool(tagged and not tagged[-1].strip()) or (end > 0 and not text[end:].strip())


def without_thinking(text: str) -> str:
    """The text after a completion's thinking; the whole completion if no thinking is closed or nothing follows it."""
    after = text[end_of_thinking(text) :]
    return after if after.strip() else text


def stated_answer(text: str) -> str | None:
    """As `extract_answer`, for a text that may not end in an answer.

    `the answer is ..` counts in the last line only, and is stripped of the punctuation around it.
    """
    answer = marked_answer(text)
    if answer is None and (phrase := _find_phrased(text.strip().rpartition("\n")[2])):
        answer = _without_edges(_last_group(_PHRASE, phrase) or phrase) or None
    headed = _HEADED.search(text) if answer is None else None
    return _without_edges(headed[1]) or None if headed else answer


def final_answer(text: str) -> str | None:
    """As `extract_answer`, but `the answer is ..` is stripped of the punctuation around it."""
    return stated_answer(without_thinking(text)) or _without_edges(extract_answer(text) or "") or None


def _without_edges(phrase: str) -> str:
    """A phrase without a final full stop and without the marks around it. `$5$ and $6$` and `.5` stay as they are."""
    for _ in range(3):  # `**$5$.**` needs two rounds; a fixed number keeps this linear
        phrase = _FULL_STOP.sub("", phrase.strip())
        for mark in _PAIRED:
            core = phrase.removeprefix(mark).removesuffix(mark)
            phrase = phrase if mark in core else core
    return phrase


def marked_answer(text: str) -> str | None:
    """The answer that a text marks with a tag, a box or `####` at its end; None if it marks none."""
    return _find_marked(text, _LAST_HASHES)


def _find_marked(text: str, hashes: re.Pattern[str] = _HASHES) -> str | None:
    tagged = [match.strip() for match in _TAG.findall(text)]
    # A student may repeat the instruction, "between <answer> and </answer>": that "and" is not an answer.
    if answer := next((tag for tag in reversed(tagged) if tag and tag != "and"), None):
        return _find_boxed(answer) or answer
    return _find_boxed(text) or _last_group(hashes, text)


def without_answer(text: str) -> str:
    """The text before a final `<answer>` or `####`. A box stays: it is part of its sentence."""
    for pattern in (_TAG, _LAST_HASHES):
        if found := list(pattern.finditer(text)):
            text = text[: found[-1].start()]
    return text.strip()


def ends_in_answer(text: str) -> bool:
    """Whether a text ends in a closed `<answer>` or in `####` and a value, which shows that it was not truncated.

    Any other text after `####` may be a truncated heading.
    """
    return bool(_CLOSED_TAG.search(text) or _VALUE.fullmatch(_last_group(_LAST_HASHES, text) or ""))


def as_text(value: object) -> str | None:
    """A string unchanged, a number as a person writes it (5.0 as "5"), None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def answer_text(value: object) -> str | None:
    """`as_text` for an answer, also a bool, a list of one item (or its JSON), or an object with `value` or `text`."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value[:1] == "[":
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return as_text(parsed[0]) or value if isinstance(parsed, list) and len(parsed) == 1 else value
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("value", "text") if value.get(key) not in (None, "", [])), None)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return as_text(value)


def _find_phrased(text: str) -> str | None:
    phrase = _HOPE.sub("", _last_group(_PHRASE, text) or "")
    # The pattern skips the asterisks before the answer. Restore them if they open bold: "**42**, as 6 times 7 is 42".
    return (f"**{phrase}" if phrase.count("**") % 2 else phrase) or None


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group that matched in the last match."""
    found = list(pattern.finditer(text))
    return next(filter(None, found[-1].groups())).strip() if found else None


def _find_boxed(text: str) -> str | None:
    """The content of the last closed box; if it ends a list of boxes, the contents of them all."""
    boxes = list(_BOX.finditer(text))
    closers = _closing_braces(text) if boxes else {}
    listed: list[str] = []
    first = len(text)
    for box in reversed(boxes):
        content, end = _box_content(text, box.end(), closers)
        if not content or end > first:
            continue  # empty, not closed, or around the box after it
        if listed and not _BETWEEN_BOXES.fullmatch(text[end:first]):
            break
        first = box.start()
        listed.insert(0, content)
    return ", ".join(dict.fromkeys(listed)) or None


def _box_content(text: str, start: int, closers: Mapping[int, int]) -> tuple[str, int]:
    if text[start] != "{":
        bare = _BARE.match(text, start)
        return (bare[0], bare.end()) if bare else ("", start)
    end = closers.get(start)
    return ("", start) if end is None else (text[start + 1 : end].strip(), end + 1)


def _closing_braces(text: str) -> dict[int, int]:
    """The closing brace of each opening one, by index. One pass: a looping model may open a box a thousand times."""
    opened, closers = [], {}
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closers[opened.pop()] = match.start()
    return closers


def closing_brace(text: str, start: int) -> int | None:
    r"""The index of the brace that closes the one at `start`, or None. Escaped braces (`\{`) don't count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
