r"""Judge a trace by its text: whether it is complete, and how well it reasons.

    repetition = repeated_shares(["Let me check ...", ...])
    find_flaw(trace, repetition[0])                     # None, or "truncated: it ends inside \[ ... \]"
    quality(trace, repetition[0]).score                 # 0 to 1

The four cues are LIMO's (arXiv 2502.03387: elaboration, self-verification, exploration, granularity). Each is a count
per word that saturates, so that a trace gains nothing from "check" in every line. They measure how a text is written,
not whether it is right: that takes a verifier.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rbfast.curation import text
from rbfast.data.trace import Trace

_LOOP_SHINGLE = 20  # tokens; a run of twenty repeats only in a loop or a quotation
_MOST_REPEATED = 0.3  # share of a text; complete traces of three models stay below 0.11, looping ones above 0.6
_MOST_FOREIGN = 0.05  # share of letters in another script

# ------------------------------------------------------------------------------------------------------------- clean

_PAIRS = (("\\(", "\\)"), ("\\[", "\\]"), ("\\begin{", "\\end{"))
_CUT_MARKS = tuple(",;([{=+*/<&\\^−×÷±∓≤≥≠≈→√∑∫")  # no complete text ends on these; an answer may follow a colon
_CUT_COMMAND = re.compile(
    r"\\(?:[dt]?frac|sqrt|cdot|times|pm|leq?|geq?|neq?|approx|equiv|in|to|cup|cap|sum|int|prod|left|text)$"
)
_CUT_WORDS = re.compile(
    r"\b(?:a|an|the|of|to|is|are|was|were|and|or|but|so|that|which|if|then|because|since|with|for|from|in|on|by|at|as|"
    r"we|it|let|[Ll]et's|this|has|have|equals|be|can|will|therefore|thus|hence|where|when|not|would|should|could|must|"
    r"might|their|our|my|your|than|between|whether|although|unless|into)\s*$"
)
_NOT_CUT = re.compile(  # endings that look cut but are not: x = a, C++, :-(, };, Yes, it is, a/folder/
    r"(?:[=+*/^<>:-]\s*[a-z]|\w\+\+|:-?[(\[]|[)}];|"
    r"(?:^|\n|[.!?] )(?:Yes|No),? (?:it|they|we|he|she|you) [a-z]+|\w/\S*/)$"
)
_OPEN_BRACKET = re.compile(r"(?<![:;=-])[(\[{][^()\[\]{}]*$")
_OPEN_BOLD = re.compile(r"(?<!\S)\*\*[^*\s][^*]*$")
_OPEN_DOLLAR = re.compile(r"\$(?=[a-zA-Z\\])[^$]*[=+^_\\][^$]*$")
_EMPHASIS = re.compile(r"(?<=[^\s*_])(\*{1,3}|_{1,3})$")
_NO_ANSWER = re.compile(r"[\s.…?!,;:_'\"–—-]*")
_SENTENCE_END = re.compile(r"[.!?:][\s)\]\"'”’*_$]*$")
_MAY_END_BARE = re.compile(rf"{_SENTENCE_END.pattern}|answer|\\boxed|\\\]$|\$\$$|^[^a-z]*$", re.IGNORECASE)
_LEAST_LINES = 4  # needed before a missing full stop in the last line counts as evidence


def find_flaw(trace: Trace, repetition: float, *, finished: bool = False) -> str | None:
    """Why a trace cannot be used, as "kind: what was seen", or None.

    A complete text may look truncated, and a truncated one complete. So a trace that is `finished`, or whose answer was
    verified, is never called truncated.

    Args:
        repetition: `repeated_shares` of its reasoning.
        finished: other evidence shows that the text is complete.
    """
    right = trace.verified is True
    if repetition > _MOST_REPEATED:
        return f"looping: {repetition:.0%} of the reasoning repeats itself"
    if not (finished or right) and (sign := _sign_of_cut(trace.reasoning, trace.answer)):
        return f"truncated: {sign}"
    if not right and (flaw := _answer_flaw(trace.answer)):
        return f"unreadable answer: {flaw}"
    if _foreign_share(trace.problem + trace.answer, trace.reasoning) > _MOST_FOREIGN:
        return "language: the reasoning changes to a script that problem and answer are not written in"
    return None


def repeated_shares(texts: Sequence[str], *, threads: int = 1) -> np.ndarray:
    """For each text, the share of its 20-token shingles that occurred earlier in it, float64 [n]."""
    rows, counts = text.shingles(text.pack(texts), _LOOP_SHINGLE, threads=threads)
    total = np.maximum(counts - _LOOP_SHINGLE + 1, rows.lengths)
    return (total - rows.lengths) / np.maximum(total, 1)


def _ends_with_answer(reasoning: str, answer: str) -> bool:
    """Whether the text ends with the answer, even if that is "the" or "A+"."""
    wanted = answer.strip()
    for ending in (reasoning, reasoning.rstrip(".*_\"'`$ ")):
        if wanted and ending.endswith(wanted):
            before = ending[: -len(wanted)]
            return not (before[-1:].isalnum() and wanted[0].isalnum())
    return False


def _sign_of_cut(reasoning: str, answer: str) -> str | None:
    written = reasoning.rstrip()
    if sign := _open_construct(written):
        return sign
    return None if _closes_emphasis(written) or _ends_with_answer(written, answer) else _broken_ending(written)


def _open_construct(written: str) -> str | None:
    """The open construct that the text ends inside, or None."""
    if written.count("```") % 2:
        return "it ends inside a code fence"
    paragraph = written.rpartition("\n\n")[2]  # an open formula in an earlier paragraph is a typo, not a cut
    if written.count("$$") % 2 and "$$" in paragraph:
        return "it ends inside $$ ... $$"
    formulas = written.replace("\\\\", "  ")  # a LaTeX line break, which may stand before a bracket
    for opener, closer in _PAIRS:
        if formulas.rfind(opener) > formulas.rfind(closer) and (opener != "\\(" or opener in paragraph):
            return f"it ends inside {opener} ... {closer}"
    if "<think>" in written and "</think>" not in written:
        return "its thinking does not end"
    line = f"\n{written}".rpartition("\n")[2]
    plain = line.replace(r"\$", "")
    if _OPEN_BOLD.search(line):
        return "it ends inside bold text"
    if plain.count("$") % 2 and _OPEN_DOLLAR.search(plain):
        return "it ends inside $ ... $"
    if (opened := _OPEN_BRACKET.search(line)) and line.rstrip()[-1] not in "([{":
        return f"it ends inside {opened[0][0]!r}"
    return None


def _closes_emphasis(written: str) -> bool:
    """Whether the text ends by closing **bold** or *italics* opened in the same line, or with a horizontal rule."""
    line = f"\n{written}".rpartition("\n")[2]
    mark = _EMPHASIS.search(line)
    return not line.strip("*_ ") if mark is None else line[: mark.start()].count(mark[1]) % 2 == 1


def _broken_ending(written: str) -> str | None:
    """The sign that a text stops in the middle of a clause, or None."""
    if not _NOT_CUT.search(written[-20:]):
        if command := _CUT_COMMAND.search(written[-20:]):
            return f"it ends on {command[0]!r}"
        if written.endswith(_CUT_MARKS):
            return f"it ends on {written[-1]!r}"
        if written[-1].isalpha() and _CUT_WORDS.search(written[-20:]):
            return f"it ends on {written.split()[-1]!r}"
    *lines, last = (line for line in written.split("\n") if line.strip())
    stopped = sum(_SENTENCE_END.search(line) is not None for line in lines)
    if len(lines) >= _LEAST_LINES and stopped >= 0.95 * len(lines) and not _MAY_END_BARE.search(last):
        return "its last line has no full stop, unlike the others"
    return None


def _answer_flaw(answer: str) -> str | None:
    if _NO_ANSWER.fullmatch(answer) and answer.strip() != "-":
        return "it holds no letter, digit or sign"
    opened = answer.count("{") - answer.count("\\{") - answer.count("}") + answer.count("\\}")
    if opened and any(map(str.isalnum, answer)):  # without these, brackets may be the answer itself
        return "its braces do not balance"
    return None


def _foreign_share(given: str, reasoning: str) -> float:
    """The share of the reasoning's letters in scripts that `given` does not use; Latin and Greek are never foreign."""
    if reasoning.isascii():
        return 0.0
    counts = Counter(reasoning)
    letters = {c: n for c, n in counts.items() if c.isalpha()}
    known = {"LATIN", "GREEK", *(_script(c) for c in set(given) if c.isalpha())}
    return sum(n for c, n in letters.items() if _script(c) not in known) / max(1, sum(letters.values()))


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """The script, the first word of the Unicode name: LATIN, CYRILLIC, CJK. Mathematical signs count as Latin."""
    script = unicodedata.name(character, "").partition(" ")[0]
    return "LATIN" if character.isascii() else _SCRIPT_OF.get(script, script)


_LATIN = ("MATHEMATICAL", "DOUBLE-STRUCK", "BLACK-LETTER", "SCRIPT", "SUPERSCRIPT", "FULLWIDTH", "MASCULINE")
_SCRIPT_OF = dict.fromkeys(_LATIN, "LATIN") | {"FEMININE": "LATIN", "MICRO": "GREEK"}
_SCRIPT_OF |= dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"), "CJK")  # the last two: ー, 々

# ----------------------------------------------------------------------------------------------------------- quality

_WORD = re.compile(r"\w+")


class _Cue(NamedTuple):
    """The words and phrases of a cue, and how many per hundred words give the full mark."""

    full: float
    words: frozenset[str]
    phrases: tuple[str, ...]


def _cue(full: float, listed: str) -> _Cue:
    cues = [cue.strip() for cue in listed.split(",")]
    return _Cue(full, frozenset(cue for cue in cues if " " not in cue), tuple(cue for cue in cues if " " in cue))


_CUES = {
    "verification": _cue(
        1.5,
        "check, checks, checking, verify, verifies, verified, verifying, verification, confirm, confirms, confirmed, "
        "recheck, recompute, indeed, satisfy, satisfies, satisfied, consistent, holds, matches, make sure, makes "
        "sense, plug back, plugging back, substituting back, plug it back, plugging it back, add up",
    ),
    "exploration": _cue(
        2.0,
        "alternatively, perhaps, maybe, might, wait, hmm, suppose, instead, consider, however, what if, another "
        "way, another approach, another method, different approach, let me try, let's try, on the other hand",
    ),
    "granularity": _cue(
        6.0,
        "therefore, thus, hence, since, because, so, then, next, first, firstly, second, secondly, third, finally, "
        "now, implies, follows, means, step, which gives, we get, we have, we obtain",
    ),
}
_WEIGHTS = {"elaboration": 0.3, "verification": 0.2, "exploration": 0.25, "granularity": 0.25}  # LIMO's
_HALF_ELABORATED = 200  # words


class Quality(NamedTuple):
    """Marks in [0, 1], 1 the best."""

    elaboration: float  # words / (words + 200)
    verification: float  # cues per word, saturating at 1.5 per hundred
    exploration: float  # the same, saturating at 2
    granularity: float  # connectives per word, saturating at 6 per hundred
    completeness: float  # 1 if the reasoning arrives at the answer, else 0.5
    repetition: float  # the share that repeats itself; here 0 is the best

    @property
    def score(self) -> float:
        """The four cues with LIMO's weights, times completeness, times (1 - repetition)."""
        cues = sum(weight * getattr(self, name) for name, weight in _WEIGHTS.items())
        return cues * self.completeness * (1 - self.repetition)


def quality(trace: Trace, repetition: float) -> Quality:
    """How well a trace reasons, by its text alone, the plan included.

    Args:
        repetition: `repeated_shares` of its reasoning.
    """
    written = f"{trace.plan or ''}\n{trace.reasoning}".lower()
    words = _WORD.findall(written)
    marks = {
        name: min(1.0, 100 * _count(cue, words, written) / (cue.full * max(len(words), 100)))
        for name, cue in _CUES.items()
    }
    return Quality(
        elaboration=len(words) / (len(words) + _HALF_ELABORATED),
        completeness=1.0 if _reaches_answer(trace) else 0.5,
        repetition=float(repetition),
        **marks,
    )


def _count(cue: _Cue, words: Sequence[str], written: str) -> int:
    return sum(map(cue.words.__contains__, words)) + sum(map(written.count, cue.phrases))


def _reaches_answer(trace: Trace) -> bool:
    """Whether the last quarter of the reasoning (at least 300 characters) contains the answer."""
    reach = max(300, len(trace.reasoning) // 4)
    answer, end = text.fold(trace.answer), text.fold(trace.reasoning[-reach:])
    return "".join(answer.split()) in "".join(end.split())


def proxy_difficulty(trace: Trace) -> float:
    """A proxy for the difficulty of a problem that no student has tried: the logarithm of the reasoning's length.

    Teachers write more about harder problems; s1 (arXiv 2501.19393) selects by length too. Compare ranks, not values.
    """
    return math.log(1 + len(trace.reasoning))
