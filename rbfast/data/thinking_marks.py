"""The tags that models put around their thinking and their answers: one table for reading, grading and display.

An unambiguous tag ends the thinking wherever it stands. A tag that may also be ordinary text (an XML element, a
sentence) counts only if it opens the reply.
"""

import re
from typing import NamedTuple


class Marks(NamedTuple):
    """What opens a part of a reply, and what closes it.

    Attributes:
        is_sure: the marks are unambiguous. Such a closer ends the thinking even without its opener, which a chat
            template may have put into the prompt. Such marks are hidden from display, and a template that contains them
            counts as a thinking template.
    """

    opener: str
    closer: str
    is_sure: bool = True


def _elements(names: str, *, is_sure: bool) -> list[Marks]:
    return [Marks(f"<{name}>", f"</{name}>", is_sure) for name in names.split()]


# A template may contain several of these; the first in this order counts.
THINKING = (
    *_elements("think thinking thought reasoning", is_sure=True),
    Marks("<|think|>", "<|/think|>"),
    Marks("<|thinking|>", "<|/thinking|>"),
    *_elements("seed:think", is_sure=True),
    Marks("[THINK]", "[/THINK]"),
    Marks("◁think▷", "◁/think▷"),
    Marks("<|channel>thought", "<channel|>"),
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("<|channel|>analysis<|message|>", "<|end|>", is_sure=False),  # every message ends like this
    Marks("<|channel|>commentary<|message|>", "<|end|>", is_sure=False),  # gpt-oss's messages before the final one
    Marks("<|im_start|>think", "<|im_start|>answer", is_sure=False),  # ChatML turns with these two roles
    Marks("Here is my thought process:", "Here is my response:", is_sure=False),
    *_elements("thoughts reason deep_think deepthink scratchpad cot thought_process", is_sure=False),
)
# Around a reply's answer. `<answer>` is not listed: `rbfast.data.answers` reads it.
ANSWER = (
    Marks("<|begin_of_solution|>", "<|end_of_solution|>"),
    Marks("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *_elements("solution response", is_sure=True),
    *_elements("output", is_sure=False),  # also an HTML element
)
# A reply of gpt-oss is two messages or more, each closed by `<|end|>`.
FINAL_CHANNEL, NEXT_MESSAGE = "<|channel|>final<|message|>", "<|start|>assistant"
# The same after a server dropped the special tokens.
BARE_CHANNELS = re.compile(r"(?:assistant)?(?:analysis|commentary)(.*?)assistantfinal", re.DOTALL)
NEXT_BARE_CHANNEL = re.compile(r"assistant(?:analysis|commentary)")
# A message of gpt-oss to a tool; the recipient comes before or after the channel.
TOOL_CALL = re.compile(
    r"<\|channel\|>\w+ to=|\bto=[\w.]+<\|channel\|>"
    r"|assistant(?:analysis|commentary) to=|assistant to=[\w.]+(?:analysis|commentary)"
)


def _any_of(*marks: str) -> re.Pattern[str]:
    """A pattern for any of these marks, whose ASCII letters may have any case."""
    return re.compile("|".join(map(re.escape, marks)), re.IGNORECASE | re.ASCII)


_SURE_CLOSERS = [marks.closer for marks in THINKING if marks.is_sure]
OPENER = _any_of(*(marks.opener for marks in THINKING))
ANSWER_OPENER = _any_of(*(marks.opener for marks in ANSWER))
LONE_CLOSER = _any_of(*_SURE_CLOSERS)
_CLOSERS = {marks.opener.lower(): _any_of(marks.closer) for marks in (*THINKING, *ANSWER)}
_ENDS = _any_of(*_SURE_CLOSERS, FINAL_CHANNEL)
_HIDDEN = _any_of(
    *(mark for opener, closer, is_sure in (*THINKING, *ANSWER) if is_sure for mark in (opener, closer)),
    *("<answer>", "</answer>", "<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>"),
    *(FINAL_CHANNEL, "<|end|>", NEXT_MESSAGE),
)


def closer_of(opener: str) -> re.Pattern[str]:
    """The pattern of the closer for a match of `OPENER` or `ANSWER_OPENER`."""
    return _CLOSERS[opener.lower()]


def end_of_thinking(text: str) -> int:
    """The index where a completion's last thinking ends; 0 if it closes none."""
    end = 0
    if opened := OPENER.match(text.lstrip()):
        closed = closer_of(opened[0]).search(text)
        end = closed.end() if closed else 0
    elif bare := BARE_CHANNELS.match(text):
        end = bare.end()
    return max((match.end() for match in _ENDS.finditer(text, end)), default=end)


def without_marks(text: str) -> str:
    """`text` for display: without thinking and answer tags."""
    return _HIDDEN.sub("", text)
