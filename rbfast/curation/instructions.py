"""Remove sentences that say only how to answer: "Express your answer as a common fraction."

    without_instructions("Find the sum of x and y. Put your answer in a box.")  # "Find the sum of x and y. "

They are removed before problems are compared: half the problems of an evaluation set may end in the same few sentences.
"""

import re

import numpy as np

from rbfast.curation.text import Texts

_LEAST = 12  # characters that must remain; else the supposed instruction is the problem itself
_HINTS = (
    b"answer",
    b"response",
    b"separated by",
    b"step",
    b"reminder",
    b"letter",
    b"your work",
    b"your reasoning",
    b"you are a",
    b"problem:",
    b"problem.",
    b"question:",
    b"question.",
    b"exercise:",
)
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
_TASK = (  # before the problem
    r"you\sare\san?\s[^.?!\n]{0,60}?(?:assistant|teacher|tutor|expert|mathematician|solver)\b|"
    r"(?:solve|answer|consider|here\sis)\s(?:the\sfollowing|this|the|a)\s(?:\w+\s)?(?:problem|question|exercise)"
    r"(?=\s*[.:])"
)
_GAP = r"\s{0,20}"  # bounded: else a long run of line breaks takes quadratic time
_REST = r"(?:[^.?!\n]|\.(?=\d)|\n(?!\n))*[.?!]*"
_INSTRUCTION = re.compile(
    rf"\(reminder:(?:[^()]|\([^()]*\))*\)|(?:^|(?<=[.?!\])$:}}])|\n){_GAP}\(?(?:please\s)?"
    rf"(?:{_VERB}(?:{_ANSWER}|{_LIST})|{_REASON}|{_FORM}){_REST}\)?|"
    rf"(?:^|(?<=[.?!:])|\n){_GAP}(?:please\s)?(?:{_TASK})[^.?!:\n]*[.:]",
    re.IGNORECASE,
)


def may_contain_instruction(texts: Texts) -> np.ndarray:
    """The indices of texts that contain a word typical of instructions, int64. A fast filter: most contain none."""
    data, places = texts.data.tobytes(), []
    for hint in _HINTS:
        at = data.find(hint)
        while at >= 0:
            places.append(at)
            at = data.find(hint, at + 1)
    return np.unique(np.searchsorted(texts.starts, np.array(places, dtype=np.int64), "right") - 1)


def without_instructions(problem: str) -> str:
    """`problem` without the sentences that say only how to answer."""
    question = _INSTRUCTION.sub(" ", problem)
    return question if len(question.strip()) >= _LEAST else problem
