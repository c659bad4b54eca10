"""Read a row of any known format as traces: the format is recognised by the names of the row's fields.

```python
interpret({"question": "2+2?", "answer": "Add.\\n#### 4"}).rows     # [{"problem": .., "reasoning": .., "answer": "4"}]
interpret(row, FormatOptions(fields={"problem": "q", "reasoning": "work", "answer": "gold"}))
```

The format of a row depends on that row alone. docs/formats.md lists the formats.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rbfast.data.answers import answer_text, as_text, ends_in_answer, marked_answer, stated_answer, without_answer
from rbfast.data.choices import chosen_label, with_options
from rbfast.data.conversations import (
    ASSISTANT,
    USER,
    Turn,
    parse_pairs,
    parse_turns,
    split_content,
    split_exchange,
    split_thinking,
)
from rbfast.data.fields import Field, check_map, field_names
from rbfast.data.rendered import parse_rendered
from rbfast.data.replies import END_FIELDS, MAP_HINT, Reply, find_replies, is_flag, reply_of_turn, verdict_of
from rbfast.data.row import RowFields, sole_candidate
from rbfast.data.thinking_marks import OPENER
from rbfast.data.trace import MAY_BE_NUMBERS, TraceError, is_finite
from rbfast.data.wrappers import unwrap
from rbfast.utils.records import show

_REPLY_FORMATS = ("generations", "trajectories", "conversations", "completions", "solutions")
FORMATS = ("native", *_REPLY_FORMATS, "batch")
_NATIVE = ("problem", "reasoning", "answer")
# A bare value: a number, perhaps in a formula or a list; a choice; a verdict. Not "None", "N/A" or "Trivial.".
_BARE = re.compile(r"(?=.*\d)(?:\S{0,80}[^\s.]|[\[(][^\[\]()\n]{1,80}[\])])|[A-J]+|True|False|Yes|No")
_COPIED_FIELDS = ("plan", *END_FIELDS, "truncated")


@dataclass(frozen=True)
class FormatOptions:
    """How to read rows if their field names are not enough.

    Args:
        format: one of FORMATS; no other is tried.
        fields: the field that holds the problem, the answer, ...: `{"problem": "q", "answer": "info.gold"}`.
        teacher_field: which of several teachers to take: the prefix of its field's name, or the whole name.

    Raises:
        ValueError: an unknown format or meaning.
    """

    format: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    teacher_field: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")
        object.__setattr__(self, "fields", check_map(self.fields))


AUTO = FormatOptions()


@dataclass(frozen=True)
class Interpretation:
    """The format of a row, described in words, and the traces in it as rows with the fields of a trace."""

    name: str
    rows: list[Mapping[str, Any]]


def interpret(row: Any, options: FormatOptions = AUTO) -> Interpretation:
    """The traces in a row, as mappings with the fields of a trace. `Trace` checks their values.

    If the row has them, also `reference` (the known answer) and the fields that show a truncated reply. `finished` is
    true if a marked answer followed the reasoning in the reply.

    Raises TraceError if the row has no known format, holds no complete trace, or is ambiguous.
    """
    if isinstance(row, list) and parse_turns(row) is not None:
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise TraceError(f"expected an object with {', '.join(_NATIVE)}, got {show(row)}")
    if options.format in (None, "native") and not options.fields and _is_native(row):
        return Interpretation("native traces", [_as_native(row)])
    if options.format == "native":
        missing = next((name for name in _NATIVE if name not in row and name not in options.fields), None)
        if missing is not None:
            raise TraceError(f"{missing}: expected this field, got {field_names(row)}; {MAP_HINT}")
    values, batch = unwrap(row)
    if options.format == "batch" and batch is None:
        raise TraceError(f"expected a batch's request with its response, got {field_names(row)}")
    one = RowFields(values, options.fields, options.teacher_field)
    asked = _find_question(one)
    formats = (options.format,) if options.format in _REPLY_FORMATS else _REPLY_FORMATS
    if options.format == "native":
        formats = ("trajectories",)
    form, replies = find_replies(one, asked.reply, formats)
    name = _format_name(form, one, asked) if batch is None else batch
    try:
        return Interpretation(name, [_trace_row(one, asked, reply, form, len(replies)) for reply in replies])
    except TraceError as error:
        raise TraceError(f"read as {name}: {error}") from None


def _is_native(row: Mapping[str, Any]) -> bool:
    """Whether a row is a trace already.

    Not so: reasoning that is a list or only a flag ("on"), empty reasoning beside a worked answer, or options that
    belong in the problem.
    """
    if not all(name in row for name in _NATIVE) or RowFields(row).options is not None:
        return False
    reasoning, answer = row["reasoning"], row["answer"]
    if isinstance(reasoning, list) or is_flag(reasoning):
        return False
    return bool(reasoning) or not isinstance(answer, str) or stated_answer(answer) in (None, answer.strip())


def _as_native(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with numbers as text, without thinking tags and answer marks, and without values of another type
    ("difficulty": "hard"). The same object if nothing changes."""
    answer, reasoning = row["answer"], row["reasoning"]
    told: dict[str, Any] = {name: as_text(row[name]) for name in MAY_BE_NUMBERS if name in row}
    told["answer"] = (marked_answer(answer) if isinstance(answer, str) else answer_text(answer)) or answer
    if isinstance(reasoning, str) and row.get("spans") is None:
        told["reasoning"] = split_thinking(reasoning)[0] or reasoning
    told |= {"verified": verdict_of(row.get("verified"))}
    told |= {} if is_finite(row.get("difficulty")) else {"difficulty": None}
    changed = {name: value for name, value in told.items() if value is not row.get(name)}
    return {**row, **changed} if changed else row


def _format_name(form: str, row: RowFields, asked: "_Question") -> str:
    """What to call such rows in messages."""
    names = {"generations": "problems with generations", "completions": "prompts with completions"}
    names |= {"solutions": "problems with solutions", "conversations": "conversations"}
    if form == "trajectories":
        fields = [found.name for found, _ in row.candidates("reasoning")]
        return "s1K trajectories" if any("traject" in name for name in fields) else f"problems with {fields[0]}"
    if form == "generations" and "correctness_math_verify" in row.values:
        return "OpenR1 generations"
    if form == "conversations" and asked.reply is not None and "<|begin_of_thought|>" in asked.reply.text:
        return "OpenThoughts conversations"
    return names[form]


# ----------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class _Question:
    text: str
    system: str | None
    reply: Turn | None
    rest: Mapping[str, Any]  # the other fields of its message
    earlier: Sequence[Turn] = ()


def _find_question(row: RowFields) -> _Question:
    """The question, with its options if it has any. A conversation takes precedence over a problem field."""
    conversation = None if "problem" in row.fields and "conversation" not in row.fields else _conversation(row)
    found: Any = conversation
    if conversation is None:
        found = _problem_field(row)
        turns = parse_rendered(found) if isinstance(found, str) else parse_turns(found)
        if turns is None and not isinstance(found, str):
            raise TraceError(f"problem: expected text or messages, got {show(found)}; {MAP_HINT}")
        found = _without_opening(turns) if turns else found
    found = [Turn(USER, found, None, {})] if isinstance(found, str) else found
    own_system, earlier, asked, reply = split_exchange([*_history(row), *found])
    rest = {**asked.rest, **{name: value for name, value in (reply.rest if reply else {}).items() if value is not None}}
    rest = rest if conversation is not None else {}
    text = with_options(asked.text, row.options) if row.options else asked.text
    return _Question(text, own_system or _system(row), reply, rest, earlier)


def _without_opening(turns: list[Turn]) -> list[Turn]:
    """The turns without a final assistant turn that only opens a reply, as a rendered generation prompt does."""
    said = turns[-1].text.strip()
    only_opens = turns[-1].role == ASSISTANT and (not said or OPENER.fullmatch(said) is not None)
    return turns[:-1] if only_opens else turns


def _conversation(row: RowFields) -> list[Turn] | None:
    found = row.one("conversation")
    turns = (parse_turns(found[1]) or parse_pairs(found[1])) if found else None
    if found and turns is None and "conversation" in row.fields:
        raise TraceError(f"{found[0].name}: expected messages with role and content, got {show(found[1])}")
    if turns and any(turn.role == USER for turn in turns):
        return turns
    return None if row.candidates("problem") and row.has_reply else _unnamed_conversation(row)


def _unnamed_conversation(row: RowFields) -> list[Turn] | None:
    """A conversation in a field whose name does not say so: messages (of a preferred reply, say) or rendered text."""
    found = [(one.name, value) for one, value in row.candidates("reply")]
    found += [item for item in row.unknown() if item not in found]
    whole = []
    for name, value in found:
        turns = parse_rendered(value) if isinstance(value, str) else _turns_or_none(value)
        if turns and {USER, ASSISTANT} <= {turn.role for turn in turns}:
            whole.append((Field(name), turns))
    chosen = sole_candidate("conversation", whole)
    return chosen[1] if chosen else None


def _turns_or_none(value: Any) -> list[Turn] | None:
    try:
        return parse_turns(value) if isinstance(value, list | tuple) else None
    except TraceError:
        return None


def _history(row: RowFields) -> list[Turn]:
    """The turns before the problem, if a separate field holds them."""
    found = row.one("earlier")
    turns = (parse_turns(found[1]) or parse_pairs(found[1])) if found else []
    if turns is None:
        assert found is not None
        raise TraceError(f"{found[0].name}: expected turns before the problem, got {show(found[1])}; leave the row out")
    return turns


def _system(row: RowFields) -> str | None:
    """The system prompt in a separate field: a text, or blocks of text."""
    found = row.candidates("system")
    return next((text for _, value in found if (text := split_content(value)[1].strip())), None)


def _problem_field(row: RowFields) -> Any:
    found = row.candidates("problem")
    texts = [value for _, value in found if isinstance(value, str)]
    if {one.name for one, _ in found} == {"instruction", "input"} and len(texts) == len(found):
        return "\n\n".join(texts)
    if not found and (asked := row.one("conversation")) and _is_question(asked[1]):
        return asked[1][0]
    shortest = min(texts, key=len, default="")
    if len(texts) == len(found) > 1 and all(shortest.strip() in text for text in texts):
        found = [(one, value) for one, value in found if value == shortest]  # the others add an instruction
    problem = sole_candidate("problem", found)
    if problem is None:
        hint = (
            "a batch's output holds no questions: join it with its requests" if "custom_id" in row.values else MAP_HINT
        )
        raise TraceError(f"problem: expected this field, got {field_names(row.values)}; {hint}")
    context = row.one("context")
    if context and isinstance(problem[1], str) and isinstance(context[1], str):
        return f"{context[1]}\n\n{problem[1]}"
    return problem[1]


def _is_question(value: Any) -> bool:
    """Whether the value is a single user turn as text: `turns: ["2+2?"]`."""
    return isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str)


def question_of(row: Any, options: FormatOptions = AUTO) -> dict[str, Any]:
    """The `problem` of a row, with `answer`, `system`, `domain`, `source` and `id` if it has them. It needs no reply.

    Raises TraceError if it has no problem, or several fields that may be the problem.
    """
    if not isinstance(row, Mapping):
        raise TraceError(f"expected an object with a problem, got {show(row)}")
    one = RowFields(unwrap(row)[0], options.fields, options.teacher_field)
    asked = _find_question(one)
    if asked.earlier:
        raise TraceError(f"problem: expected a question alone, got one after {len(asked.earlier)} turns; leave it out")
    known = _answer_field(one) or _known_answer(one, asked)
    found = {"problem": asked.text, "answer": known, "system": asked.system}
    found |= {name: one.text(name) for name in ("domain", "source", "id")}
    return {name: value for name, value in found.items() if value is not None}


def _known_answer(row: RowFields, asked: _Question) -> str | None:
    """The known answer in a solution field or in the question's message."""
    texts = [value for role in ("solution", "reference") for _, value in row.candidates(role) if isinstance(value, str)]
    found = next((answer for text in texts if (answer := stated_answer(text))), None)
    return (
        found
        or as_text(asked.rest.get("reference_answer"))
        or (stated_answer(asked.reply.text) if asked.reply else None)
    )


def _answer_field(row: RowFields) -> str | None:
    """The answer in an answer field, else in an object of the row. If several fields have one, they must agree."""
    if row.options and (label := chosen_label([value for _, value in row.choices()], row.options)):
        return label
    found = row.candidates("answer") or row.inner_answers() or _bare_solutions(row)
    texts = [(one, text) for one, value in found if (text := answer_text(value)) and text.strip()]
    short = [(one, stated_answer(text) or text.strip()) for one, text in texts if not one.teacher]
    agreed = sole_candidate("answer", short)
    return agreed[1] if agreed else None


def _bare_solutions(row: RowFields) -> list[tuple[Field, str]]:
    """Solutions that are a bare value, as in s1K: "128", "BCD", "[7, 8]"."""
    texts = [(one, as_text(value)) for one, value in row.candidates("solution")]
    return [(one, text) for one, text in texts if text and _BARE.fullmatch(text.strip())]


# -------------------------------------------------------------------------------------------------------- traces


def _trace_row(row: RowFields, asked: _Question, reply: Reply, form: str, count: int) -> dict[str, Any]:
    """A trace's fields.

    The answer is the one that the reply states, else the one in an answer field, else, after thinking, the whole reply.
    In a reply with code only a marked answer counts: "the answer is printed" states none.
    """
    is_code = bool(reply.thought) and "```" in reply.text
    field_answer, own = _answer_field(row), marked_answer(reply.text) if is_code else stated_answer(reply.text)
    answer = own or field_answer
    if answer is None and reply.thought:
        answer = reply.text.strip() or stated_answer(reply.thought)
    if not answer:
        raise TraceError(
            r"answer: expected one that the text marks (\boxed{}, ####, <answer>) or a field of its own, got neither; "
            "name the field with --map answer=FIELD"
        )
    reasoning = reply.thought or without_answer(reply.text)
    if not reasoning.strip() or reasoning.strip() == answer.strip():
        raise TraceError(f"reasoning: expected working before the answer, got none; {MAP_HINT}")
    reference = field_answer or as_text(asked.rest.get("reference_answer")) or row.text("reference")
    found: dict[str, Any] = {
        "problem": asked.text.strip(),
        "reasoning": reasoning.strip(),
        "answer": answer.strip(),
        "system": asked.system,
        "turns": [_earlier_turn(turn) for turn in asked.earlier] or None,
    }
    found |= _metadata(row, asked, reply, count)
    if own and not reply.thought and ends_in_answer(reply.text):
        found["finished"] = True
    if own and reference and form != "solutions" and "verified" not in found:
        found["reference"] = reference
    return {name: value for name, value in found.items() if value is not None}


def _earlier_turn(turn: Turn) -> dict[str, str]:
    """A turn before the problem, in the form of `Trace.turns`."""
    if turn.role == USER:
        return {"role": USER, "content": turn.text}
    thought, text, *_ = reply_of_turn(turn)
    return {"role": ASSISTANT, "content": text} | ({"reasoning": thought} if thought else {})


def _metadata(row: RowFields, asked: _Question, reply: Reply, count: int) -> dict[str, Any]:
    """The metadata of a trace: domain, source, id, teacher, difficulty, finish reason, verdict."""
    found: dict[str, Any] = {name: row.text(name) for name in ("domain", "source", "id", "teacher")}
    found["source"] = found["source"] or as_text(asked.rest.get("source"))
    found["teacher"] = reply.teacher or found["teacher"]
    if found["id"] and count > 1:
        found["id"] += f"/{reply.number}"
    difficulty = next((value for _, value in row.candidates("difficulty")), None)
    found["difficulty"] = difficulty if is_finite(difficulty) else None
    found |= {
        name: row.values[name]
        for name in _COPIED_FIELDS
        if name in row.values and not isinstance(row.values[name], list)
    }
    if not any(found.get(name) for name in END_FIELDS):
        found["finish_reason"] = row.text("finish")
    if reply.verified is not None:
        found["verified"] = reply.verified
    return {name: value for name, value in found.items() if value is not None}
