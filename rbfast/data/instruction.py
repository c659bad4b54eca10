r"""The instruction after a problem, and how the student marks its answer: the same in training and at inference.

```python
BOXED.request("2+2?")                                    # "2+2?\n\nPlease reason step by step, and put ..."
BOXED.write("4")                                         # "\\boxed{4}"
instruction_named("none")                                # or "answer", "boxed", any text of your own
```
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rbfast.data.answers import closing_brace
from rbfast.utils.files import write_text
from rbfast.utils.hub import local_copy
from rbfast.utils.records import check_present_fields, check_shape, read_json

FILE = "prompt.json"
Style = Literal["tags", "box", "plain"]
_PHRASE = "The answer is "


@dataclass(frozen=True)
class Instruction:
    """What a prompt says after the problem, and how an answer is marked.

    Attributes:
        text: the instruction; empty for none.
        style: "tags": `<answer>4</answer>`. "box": `\\boxed{4}`. "plain": the answer alone, after `The answer is` if
            it follows no closed thinking.
        system: the system prompt for problems without their own; empty for none.
    """

    text: str
    style: Style
    system: str = ""

    def request(self, problem: str) -> str:
        return f"{problem}\n\n{self.text}" if self.text else problem

    def write(self, answer: str, *, after_thinking: bool = False) -> str:
        """The answer as the student writes it. An answer that does not fit a box (several lines, unbalanced braces) is
        written without one."""
        if self.style == "tags":
            return f"<answer>{answer}</answer>"
        if self.style == "box" and _fits_a_box(answer):
            return f"\\boxed{{{answer}}}"
        return answer if after_thinking else f"{_PHRASE}{answer}"

    @property
    def opens(self) -> str:
        """The text before an answer that follows no closed thinking."""
        return {"tags": "<answer>", "box": "\\boxed{", "plain": _PHRASE.strip()}[self.style]

    @property
    def closes(self) -> str:
        """The text after an answer; empty if only the end of the turn ends it."""
        return "</answer>" if self.style == "tags" else ""


ANSWER = Instruction("Think step by step, then give the final answer between <answer> and </answer>.", "tags")
BOXED = Instruction("Please reason step by step, and put your final answer within \\boxed{}.", "box")
NONE = Instruction("", "plain")
_NAMED = {"answer": ANSWER, "boxed": BOXED, "none": NONE}


def instruction_named(name: str) -> Instruction:
    """The instruction called `name` (answer, boxed, none), else one whose text is `name` and whose style is that of the
    mark it mentions."""
    if name.strip().lower() in _NAMED:
        return _NAMED[name.strip().lower()]
    style: Style = "tags" if "<answer>" in name else "box" if "\\boxed" in name else "plain"
    return Instruction(name.strip(), style)


def _fits_a_box(answer: str) -> bool:
    return "\n" not in answer and closing_brace(f"{{{answer}}}", 0) == len(answer) + 1


def write_instruction(folder: str | Path, instruction: Instruction, about: Mapping[str, Any]) -> None:
    """Write prompt.json into a student's folder. `about` holds further entries, for people to read."""
    record = {"instruction": instruction.text, "style": instruction.style, "system": instruction.system, **about}
    write_text(Path(folder) / FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def saved_instruction(*names: str | Path | None) -> Instruction | None:
    """The instruction in the first of these folders and hub repositories that has a prompt.json of rbfast; None if none
    has. Raises ValueError for a broken file."""
    return next((found for name in names if name and (found := _read_instruction(name))), None)


def _read_instruction(name: str | Path) -> Instruction | None:
    try:
        path = local_copy(name, [FILE]) / FILE
    except OSError:  # no such repository, or no connection
        return None
    record = read_json(path, object)
    if not isinstance(record, dict) or not {"instruction", "style"} & record.keys():
        return None  # no file, or another program's
    check_shape(record, {"instruction": str, "style": str}, str(path))
    if record["style"] not in ("tags", "box", "plain"):
        raise ValueError(f"{path}: style: expected tags, box or plain, got {record['style']!r}")
    check_present_fields(record, {"system": str}, str(path))
    return Instruction(record["instruction"], record["style"], record.get("system", ""))
