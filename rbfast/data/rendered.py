"""Parse text that a chat template rendered back into turns, by the marks of known templates."""

import re

from rbfast.data.conversations import ASSISTANT, SYSTEM, USER, Turn

_ROLE = r"(?P<role>system|user|assistant|model)"
# Patterns for the start of a turn and for its end. The next turn's start ends it too.
_MARKS = (
    (rf"<\|im_start\|>{_ROLE}\n", r"<\|im_end\|>"),
    (rf"<\|start_header_id\|>{_ROLE}<\|end_header_id\|>\s*", r"<\|eot_id\|>|<\|end_of_text\|>"),
    (rf"<start_of_turn>{_ROLE}\n", r"<end_of_turn>"),
    (rf"<\|{_ROLE}\|>\n?", r"<\|end\|>|<\|endoftext\|>|</s>"),
    (r"<｜(?P<role>User|Assistant)｜>", r"<｜end▁of▁sentence｜>"),
    (r"(?:^|\n)#{2,3} (?P<role>Instruction|Response|Input):\s*", r"\Z"),
)
_PATTERNS = [(re.compile(begin), re.compile(end)) for begin, end in _MARKS]
_ROLES = {"system": SYSTEM, "user": USER, "instruction": USER, "input": USER}


def parse_rendered(text: str) -> list[Turn] | None:
    """The turns of a rendered conversation, or None if `text` is not one with a user and an assistant turn."""
    for begin, end in _PATTERNS:
        marks = list(begin.finditer(text))
        if len(marks) < 2:
            continue
        turns: list[Turn] = []
        for mark, following in zip(marks, [*marks[1:], None], strict=True):
            content = text[mark.end() : following.start() if following else len(text)]
            role = _ROLES.get(mark["role"].lower(), ASSISTANT)
            content = end.split(content, maxsplit=1)[0].strip()
            if turns and turns[-1].role == role == USER:  # Alpaca's input after its instruction
                turns[-1] = Turn(USER, f"{turns[-1].text}\n\n{content}", None, {})
            else:
                turns.append(Turn(role, content, None, {}))
        if {USER, ASSISTANT} <= {turn.role for turn in turns}:
            return turns
    return None
