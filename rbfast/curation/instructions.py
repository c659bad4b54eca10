"""Sentences that say how to answer, and nothing of what is asked: "Express your answer as a common fraction."

    without_instructions("Find the sum of x and y. Put your answer in a box.")  # "Find the sum of x and y. "

They are cut where problems are compared: half of the problems of an evaluation set may end in one of a few.
"""

import re

_LEAST = 12  # characters that must be left; else what looks like an instruction is the problem
_HINTS = ("nswer", "esponse", "eparated by", "tep by", "tep-by", "eminder", "etter of", "your work", "your reasoning")
_VERB = (
    r"(?:express|enter|give|write|provide|state|list|round|put|return|report|present|leave|submit|include|box|place|"
    r"output)\s"
)
_ANSWER = r"(?:\w+\s){0,3}?(?:your|the|all|both|each)\s(?:\w+\s){0,3}?(?:answers?|response|letters?\sof)\b"
_LIST = r"(?:[^.?!\n]{0,80}?separated\sby\scommas)"
_REASON = (
    r"(?:reason|think|solve|work|let's\sthink|show|explain)\b[^.?!\n]{0,80}?(?:step[\s-]by[\s-]step|your\s(?:work|"
    r"reasoning))"
)
_FORM = (
    r"(?:your|the\sfinal|the)\s(?:answer|response)\s(?:should|must|will|needs)\b|remember\sto\b|"
    r"the\slast\sline\sof\syour\b"
)
_REST = r"(?:[^.?!\n]|\.(?=\d)|\n(?!\n))*[.?!]*"
_INSTRUCTION = re.compile(
    rf"\(reminder:(?:[^()]|\([^()]*\))*\)|(?:^|(?<=[.?!\])$:}}])|\n)\s*\(?(?:please\s)?(?:{_VERB}(?:{_ANSWER}|{_LIST})|{_REASON}|{_FORM}){_REST}\)?",
    re.IGNORECASE,
)


def without_instructions(problem: str) -> str:
    """`problem` without the sentences that say how to answer."""
    if not any(hint in problem for hint in _HINTS):  # nearly all have none, and a search takes ten times as long
        return problem
    asked = _INSTRUCTION.sub(" ", problem)
    return asked if len(asked.strip()) >= _LEAST else problem
