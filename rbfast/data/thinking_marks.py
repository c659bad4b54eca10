"""The marks that models put around their thinking and their answers: one table for all who read, grade or show replies.

A mark that nothing else means ends the thinking wherever it stands. One that may be a text's own subject (an element of
XML, a sentence) is thinking's only if it opens the reply.
"""

import re
from typing import NamedTuple


class Marks(NamedTuple):
    """What opens a part of a reply, and what closes it.

    Attributes:
        is_sure: nothing else is written so. Such a closer ends the thinking without its opener, which a chat template
            may have put into the prompt; such marks are no text for people; and a template that names them thinks.
    """

    opener: str
    closer: str
    is_sure: bool = True


def _elements(names: str, *, is_sure: bool) -> list[Marks]:
    return [Marks(f"<{name}>", f"</{name}>", is_sure) for name in names.split()]


# A template may name several; the first of this order is its thinking's.
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
    Marks("<|channel|>analysis<|message|>", "<|end|>", is_sure=False),  # every message ends so
    Marks("<|im_start|>think", "<|im_start|>answer", is_sure=False),  # turns of ChatML, with roles of their own
    Marks("Here is my thought process:", "Here is my response:", is_sure=False),
    *_elements("thoughts reason deep_think deepthink scratchpad cot thought_process", is_sure=False),
)
# Around a reply's answer. `<answer>` is not among them: `rbfast.data.answers` reads what it holds.
ANSWER = (
    Marks("<|begin_of_solution|>", "<|end_of_solution|>"),
    Marks("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *_elements("solution response", is_sure=True),
    *_elements("output", is_sure=False),  # HTML has it
)
# A reply of gpt-oss is two messages, each closed by `<|end|>`.
FINAL_CHANNEL, NEXT_MESSAGE = "<|channel|>final<|message|>", "<|start|>assistant"
BARE_CHANNELS = re.compile(r"analysis(.*?)assistantfinal", re.DOTALL)  # the same, if a server left its tokens out


def _any_of(*marks: str) -> re.Pattern[str]:
    """What finds one of these marks, in any case."""
    return re.compile("|".join(map(re.escape, marks)), re.IGNORECASE)


_SURE_CLOSERS = [marks.closer for marks in THINKING if marks.is_sure]
OPENER = _any_of(*(marks.opener for marks in THINKING))
ANSWER_OPENER = _any_of(*(marks.opener for marks in ANSWER))
LONE_CLOSER = _any_of(*_SURE_CLOSERS)
_CLOSERS = {marks.opener.lower(): _any_of(marks.closer) for marks in (*THINKING, *ANSWER)}
_ENDS = _any_of(*_SURE_CLOSERS, FINAL_CHANNEL)
_SHOWN_TO_NOBODY = _any_of(
    *(mark for opener, closer, is_sure in (*THINKING, *ANSWER) if is_sure for mark in (opener, closer)),
    *("<answer>", "</answer>", "<|channel|>analysis<|message|>", FINAL_CHANNEL, "<|end|>", NEXT_MESSAGE),
)


def closer_of(opener: str) -> re.Pattern[str]:
    """What closes that which a match of `OPENER` or of `ANSWER_OPENER` opens."""
    return _CLOSERS[opener.lower()]


def end_of_thinking(text: str) -> int:
    """Where a completion's last thinking ends; 0 if it closes none."""
    end = 0
    if opened := OPENER.match(text.lstrip()):
        closed = closer_of(opened[0]).search(text)
        end = closed.end() if closed else 0
    elif bare := BARE_CHANNELS.match(text):
        end = bare.end()
    return max((match.end() for match in _ENDS.finditer(text, end)), default=end)


def without_marks(text: str) -> str:
    """`text` as people read it."""
    return _SHOWN_TO_NOBODY.sub("", text)
