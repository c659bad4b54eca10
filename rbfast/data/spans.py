r"""Roles of the text in a trace: which characters are strategy, worked steps or the answer.

    from rbfast.data.spans import ROLES, split_spans
    for span in split_spans(text):
        print(ROLES[span.role], text[span.start : span.end])

`split_spans` is deterministic and takes time linear in the text. Five passes:

1. Blank LaTeX (\( \), \[ \], $...$, $$...$$, \begin..\end) and code fences, so that no unit ends inside them and no
   cue is found there.
2. Cut the text into units at sentence ends and line breaks.
3. Classify each unit by its cues (plan, reduction, change of approach, verification, monitoring, heading,
   sub-question) and its share of mathematical characters: "first, 3 * 4 = 12" is a step, "first, find the cost" a plan.
4. Set whatever the teacher marked as a plan to strategic: <plan> ... </plan>, or the section under a Markdown heading
   that says plan. Every Markdown heading is strategic too, unless it states the answer.
5. Join neighbouring units of one role into one span.
"""

import re
from typing import NamedTuple

import numpy as np

STRATEGIC, TACTICAL, ANSWER = 0, 1, 2
ROLES = ("strategic", "tactical", "answer")


class Span(NamedTuple):
    """Characters `[start, end)` of a text, and their role (STRATEGIC, TACTICAL or ANSWER)."""

    start: int
    end: int
    role: int


_OPENING_REACH = 24  # characters; a cue of intention further into a unit is weak evidence

# Every repetition below is bounded or unambiguous, so that matching is linear in the text.

# Protected regions

_BLANK = "\0"  # replaces a protected character; counts as mathematics
_OPENER = re.compile(r"```|\$\$|(?<![\\$])\$(?=[^\s$])|\\\(|\\\[|\\begin\{[a-zA-Z]{1,20}\*?\}")
_CLOSER = {"```": "```", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
# pandoc's rule: no space after an opening dollar or before a closing one, and no digit after a closing one. So
# "$5 and $6" is money.
_INLINE_MATH = re.compile(r"\$(?:[^$\\\n]|\\.)*(?<!\s)\$(?!\d)")
_LONGEST_MATH = 5_000  # characters; an opener that is not closed within them protects nothing

# Ends of units

_BREAK = re.compile(r"[.!?][.!?)\]\"'*_”]{0,8}\s+|\n\s*")
_NO_SENTENCE_END = re.compile(  # matched against the text before a full stop
    r"(?:^|[\s(*#_])(?:e\.g|i\.e|vs|dr|mr|ms|mrs|cf|eq|no|approx)$"
)
_ENUMERATOR = re.compile(r"[\s(*#_]*(?:\d{1,3}|[a-z])\.")

# Cues for a role

_MATH_CHARACTERS = "0123456789+=*/^<>|\\{}×÷·√∑∏∫≤≥≠≈∈∞π%" + _BLANK
_RELATIONS = "=≈≤≥≠<>"

_ANSWER = re.compile(
    r"####[ \t]{0,4}[-+$]?[\d.]\S{0,40}[ \t]{0,4}(?:$|\n)|\\boxed|</?answer>|"
    r"answer(?<![a-z]answer)\s{0,2}(?:\*\*)?\s{0,2}(?:is|:|=|should be|must be|would be|will be)"
    r"(?!\s*(?:in|not|asked|expected|correct|right|wrong)\b)"
)

_LETS = r"let(?: me|'s| us)"
_PLAN = (
    rf"{_LETS} (?:just |quickly |first |now |also |start|think|see|consider|break|recall|look at|figure|approach|"
    r"analyze|parse|understand|list)|"
    r"(?:the|our|my) (?:goal|strategy|plan|approach|idea|key|task|problem|question)|strategy|"
    r"we(?:'re| are) (?:asked|given|told|looking)|asked (?:to|for)|asks? (?:for|to|how|what|us|about)|"
    r"(?:need|have|want|trying) to (?:find|determine|figure|know|show|prove|be careful|consider|check)"
)
_REDUCTION = (
    r"(?:it )?suffices|reduces? to|without loss of generality|wlog|by symmetry|"
    r"break (?:it|this|that|the \w+) (?:down|into)|split (?:it|this|the \w+) into"
)
_CHANGE = (
    r"wait(?! (?:for|to|until|a )| time)|alternatively|instead|another (?:way|approach|method|idea)|"
    r"different (?:way|approach|method)|hold on|on second thought|"
    rf"{_LETS} (?:try|go back|step back)|try (?:a|another|to|using|with|different)"
)
_VERIFICATION = (
    rf"{_LETS} (?:check|verify|double|confirm|recap|recheck|make sure|review|summarize|recompute|test)|"
    r"double[- ]check|verify|verification|sanity check|check (?:if|that|whether|again|this|my|each|all|it)|make sure"
)
_MONITORING = (
    r"hmm|so far|not sure|confus(?:ed|ing|ion)|mistake|that (?:can't|doesn't|does not|seems|makes)|makes sense|"
    r"seems? (?:off|wrong|right|correct|too)|i (?:think|wonder|should|need|remember|recall|guess)"
)
# Cues of intention count only at the start of a unit, and only if it has no equation.
_INTENTION = (
    r"(?<!the )first|firstly|to (?:begin|start|find|solve|determine|answer|calculate)|next step|"
    r"we (?:need|want|have|must) to|we can (?:use|apply|try|think|consider|start|find)|we (?:could|should|might)|"
    rf"i (?:can|could|will|have to|must|might)|{_LETS}(?! (?:say|assume|let|denote|call)\b)|"
    r"maybe|perhaps|probably|actually|okay|alright|approach|method|finally|the key|"
    r"remember|recall that|note that|notice that|plan|this means (?:we|i)|consider|suppose|think"
)
_CUE = re.compile(
    rf"(?<![a-z])(?:({'|'.join((_PLAN, _REDUCTION, _CHANGE, _VERIFICATION, _MONITORING))})|(?:{_INTENTION}))(?![a-z])"
)

# Opening words and marks that are no evidence of a role: "2. **So, ...", "Okay, but ..."
_LEAD = (
    r"[\s>#*_(\[\"'\-•]{0,12}(?:(?:\d{1,3}|[a-z])[.)]\s{1,4})?[*_]{0,3}"
    r"(?:(?:so|but|and|okay|ok|well|oh|ah|yes|no|right|now|then|also|alright|thus|therefore|hence)\b[,.!\s]{1,4}){0,4}"
)
_QUESTION = (
    r"(?:(?:by|in|to|at|for|of|on|from|with)\s+)?(?:"
    r"how\s+(?!to\b|ever\b)[a-z]|(?:which|who|whose|why)\b(?!,)|"
    r"what(?:'s|\s+(?:is|are|was|were|will|would|do|does|did|if|about|percent\w*|fraction|portion|number|amount|value|"
    r"kind|happens)\b)|"
    r"(?:when|where)\s+(?:is|are|was|were|do|does|did|will|would|can)\b|"
    r"(?:is|are|does|do|did|can|could|should)\s+(?:there|this|that|it|we|i|the)\b)"
)
_INSTRUCTION = (  # a short line without an equation that says what to do: "Combine like terms"
    r"(?:define|write|set up|simplify|combine|divide|multiply|subtract|add|find|solve|calculate|compute|determine|"
    r"express|substitute|factor|apply|identify|list|count|compare|convert|consider|understand|analyze|break)\b"
    r"[^\n]{0,60}$"
)
_HEADING = (
    r"\s*(?:#{1,6}\s|\*\*[^*\n]{1,80}\*\*:?\s*$|(?:\d{1,3}[.)]|[-*•])\s[^\n]*:[*_]*\s*$|"
    r"(?:step|case|part|phase|method|approach)\s+(?:\d+|[a-z]|one|two)\b\s*[:.)\-—])"
)
_OPENING = re.compile(rf"{_HEADING}|{_LEAD}(?:{_QUESTION}|{_INSTRUCTION})")

# Plans that a teacher marked

_LONGEST_PLAN = 5_000  # characters; a tag that is not closed within them marks nothing
_TAGGED = re.compile(rf"<(plan|strategy|approach|outline)>(?:(?!<\1>).){{0,{_LONGEST_PLAN}}}?</\1>", re.DOTALL)
_HEADED = re.compile(r"^(?:(#{1,6})[ \t]|\*\*(?=[^*\n]{1,80}\*\*:?[ \t]*$))([^\n]*)$\n?", re.MULTILINE)
_SAYS_PLAN = re.compile(r"\b(?:plan|strategy|approach|outline|roadmap)\b")


def split_spans(text: str) -> list[Span]:
    """Spans that tile `text` exactly, neighbours of different roles. Empty text gives no span."""
    if not text:
        return []
    blanked = _fold_case(_blank_protected(text))
    ends, are_questions = _cut_units(blanked)
    roles = _classify(blanked, ends, are_questions)
    plans, headings = _plans_and_headings(blanked)
    if plans or headings:
        role_of = np.repeat(roles, np.diff(ends, prepend=0))
        for start, end in headings:
            role_of[start:end][role_of[start:end] == TACTICAL] = STRATEGIC
        for start, end in plans:
            role_of[start:end] = STRATEGIC
        ends = np.append(np.flatnonzero(role_of[1:] != role_of[:-1]) + 1, len(role_of))
        roles = role_of[ends - 1]
    last = np.flatnonzero(np.append(roles[1:] != roles[:-1], True))
    edges = ends[last].tolist()
    return [Span(*span) for span in zip([0, *edges[:-1]], edges, roles[last].tolist(), strict=True)]


def _fold_case(text: str) -> str:
    # U+0130 is the only character whose lower case is longer than itself
    return text.replace("\u0130", "i").replace("\u2019", "'").lower()


def _blank_protected(text: str) -> str:
    pieces: list[str] = []
    searched_to: dict[str, int] = {}
    done = position = 0
    while opener := _OPENER.search(text, position):
        end = _protected_end(text, opener, searched_to)
        if end < 0:
            position = opener.end()
            continue
        start = opener.start()
        answer = "\\boxed" if text.find("\\boxed", start, end) >= 0 else ""
        pieces += [text[done:start], answer.ljust(end - start, _BLANK)]
        done = position = end
    return "".join([*pieces, text[done:]])


def _protected_end(text: str, opener: re.Match[str], searched_to: dict[str, int]) -> int:
    """The end of the region that `opener` opens, or -1 if it is not closed.

    `searched_to` says how far each closer was searched without a match, so that no character is searched twice for it.
    """
    mark, start = opener.group(), opener.end()
    if mark == "$":
        closed = _INLINE_MATH.match(text, opener.start(), start + _LONGEST_MATH)
        return closed.end() if closed else -1
    closer = _CLOSER.get(mark) or mark.replace("\\begin", "\\end")
    limit = len(text) if mark == "```" else start + _LONGEST_MATH
    found = text.find(closer, max(start, searched_to.get(closer, 0)), limit)
    if found < 0:
        searched_to[closer] = limit - len(closer) + 1
        return len(text) if mark == "```" else -1  # an open fence runs to the end, as in Markdown
    return found + len(closer)


def _cut_units(blanked: str) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the units, int64 [units], and whether each ends in a question mark, bool [units]."""
    ends: list[int] = []
    are_questions: list[bool] = []
    start = 0
    for mark in _BREAK.finditer(blanked):
        stop, end = mark.span()
        if blanked[stop] == "." and _is_abbreviation(blanked, start, stop):
            continue
        ends.append(end)
        are_questions.append(blanked[stop] != "\n" and "?" in mark.group())
        start = end
    if start < len(blanked):
        ends.append(len(blanked))
        are_questions.append("?" in blanked[max(start, len(blanked) - 8) :])
    return np.array(ends), np.array(are_questions)


def _is_abbreviation(blanked: str, start: int, stop: int) -> bool:
    """Whether the full stop at `stop` follows an abbreviation, or an enumerator that opens the unit ("2. Then")."""
    if stop - start <= 8 and _ENUMERATOR.fullmatch(blanked, start, stop + 1):
        return True
    return _NO_SENTENCE_END.search(blanked[max(start, stop - 8) : stop]) is not None


def _classify(blanked: str, ends: np.ndarray, are_questions: np.ndarray) -> np.ndarray:
    """The role of each unit, int64 [units]."""
    starts = np.append(0, ends[:-1])
    codes = np.frombuffer(blanked.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    density = _count_characters(codes, _MATH_CHARACTERS, starts) / (ends - starts)
    relation = _count_characters(codes, _RELATIONS, starts) > 0
    cues = [(cue.start(), cue.lastindex is not None) for cue in _CUE.finditer(blanked)]
    strong = _units_with(starts, [at for at, is_strong in cues if is_strong])
    intends = _units_with(starts, [at for at, is_strong in cues if not is_strong], reach=_OPENING_REACH)
    answers = _units_with(starts, [found.start() for found in _ANSWER.finditer(blanked)])

    strategic = (are_questions & (density < 0.5)) | (strong & (density < np.where(relation, 0.12, 0.25)))
    prose = ~relation & (density < 0.2)
    strategic |= prose & intends & (density < 0.1)
    for unit in np.flatnonzero(prose & ~strategic & ~answers).tolist():
        strategic[unit] = _OPENING.match(blanked, starts[unit], ends[unit]) is not None
    return np.where(answers & ~are_questions, ANSWER, np.where(strategic, STRATEGIC, TACTICAL))


def _plans_and_headings(blanked: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The character ranges of marked plans, and of headings.

    A section ends at the next heading of its level or above. A section that runs to the end of the text may contain the
    solution too, so it is not a plan.
    """
    plans = [tag.span() for tag in _TAGGED.finditer(blanked)]
    headings = [*_HEADED.finditer(blanked)]
    open_: list[tuple[int, int]] = []  # open plan sections: (level, start)
    for heading in headings:
        level = len(heading[1] or "#######")  # a line in bold is below every #
        while open_ and open_[-1][0] >= level:
            plans.append((open_.pop()[1], heading.start()))
        if _SAYS_PLAN.search(heading[2]):
            open_.append((level, heading.start()))
    return plans, [heading.span() for heading in headings]


def _count_characters(codes: np.ndarray, characters: str, starts: np.ndarray) -> np.ndarray:
    """How many of `characters` each unit holds, int64 [units]."""
    table = np.zeros(0x10000, dtype=np.int64)
    table[[ord(character) for character in characters]] = 1
    return np.add.reduceat(table[np.minimum(codes, 0xFFFF)], starts)


def _units_with(starts: np.ndarray, positions: list[int], reach: int | None = None) -> np.ndarray:
    """Which units hold one of `positions` (among their first `reach` characters, if given), bool [units]."""
    at = np.array(positions, dtype=np.int64)
    units = np.searchsorted(starts, at, side="right") - 1
    marked = np.zeros(len(starts), dtype=bool)
    marked[units if reach is None else units[at - starts[units] < reach]] = True
    return marked
