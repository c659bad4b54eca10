"""Read a row of any known format as traces: the format is recognised by the names of the row's fields.

```python
interpret({"question": "2+2?", "answer": "Add.\\n#### 4"}).rows     # [{"problem": .., "reasoning": .., "answer": "4"}]
interpret(row, FormatOptions(fields={"problem": "q", "reasoning": "work", "answer": "gold"}))
```

The format of a row depends on that row alone. docs/formats.md lists the formats.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from rbfast.data.answers import (
    answer_text,
    as_text,
    ends_in_answer,
    is_placeholder,
    known_answer,
    marked_answer,
    stated_answer,
    without_answer,
)
from rbfast.data.choices import chosen_option, with_options
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
from rbfast.data.fields import Field, check_map, field_names, value_at
from rbfast.data.rendered import parse_rendered
from rbfast.data.replies import END_FIELDS, MAP_HINT, Reply, find_replies, is_flag, reply_of_turn, verdict_of
from rbfast.data.row import RowFields, check_shows_nothing, sole_candidate
from rbfast.data.thinking_marks import OPENER
from rbfast.data.trace import MAY_BE_NUMBERS, TraceError, check_text, is_finite
from rbfast.data.wrappers import unwrap
from rbfast.utils.records import show

_REPLY_FORMATS = ("generations", "trajectories", "conversations", "completions", "solutions")
FORMATS = ("native", *_REPLY_FORMATS, "batch")
_NATIVE = ("problem", "reasoning", "answer")
# A bare value: a number, perhaps in a formula or a list; a choice; a verdict. Not "None", "N/A" or "Trivial.".
_BARE = re.compile(r"(?=.*\d)(?:\S{0,80}[^\s.]|[\[(][^\[\]()\n]{1,80}[\])])|[A-J]+|True|False|Yes|No")
_COPIED_FIELDS = (*END_FIELDS, "truncated")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FormatOptions:
    """How to read rows if their field names are not enough.

    Args:
        format: one of FORMATS; no other is tried.
        fields: the field that holds the problem, the answer, ...: `{"problem": "q", "answer": "info.gold"}`.
        teacher_field: which of several teachers to take: the prefix of the teacher's field, or the field's whole name.

    Raises:
        ValueError: an unknown format or meaning.
    """

    format: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
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


def _refuse_deep_rows(read: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    @wraps(read)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return read(*args, **kwargs)
        except RecursionError:
            raise TraceError("the row is nested too deep to be read; leave the row out") from None

    return call


@_refuse_deep_rows
def interpret(row: Any, options: FormatOptions = AUTO) -> Interpretation:
    """The traces in a row, as mappings with the fields of a trace. `Trace` checks their values.

    The mappings also have `reference` (the known answer) and the fields that show a truncated reply, if the row has
    them. `finished` is true if a marked answer followed the reasoning in the reply.

    Raises TraceError if the row has no known format, holds no complete trace, or is ambiguous.
    """
    if isinstance(row, list) and parse_turns(row) is not None:
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise TraceError(f"expected an object with {', '.join(_NATIVE)}, got {show(row)}")
    if options.format in (None, "native") and (native := _native_row(row, options.fields)) is not None:
        check_shows_nothing(native)
        return Interpretation("native traces", [_as_native(native)])
    if options.format == "native":
        missing = next((name for name in _NATIVE if name not in row and name not in options.fields), None)
        if missing is not None:
            raise TraceError(f"{missing}: expected this field, got {field_names(row)}; {MAP_HINT}")
    values, batch = unwrap(row)
    check_shows_nothing(values)
    if options.format == "batch" and batch is None:
        raise TraceError(f"expected a batch's request with its response, got {field_names(row)}")
    fields = RowFields(values, options.fields, options.teacher_field)
    question = _find_question(fields)
    formats = (options.format,) if options.format in _REPLY_FORMATS else _REPLY_FORMATS
    if options.format == "native":
        formats = ("trajectories",)
    form, replies = find_replies(fields, question.reply, formats)
    name = _format_name(form, fields, question) if batch is None else batch
    try:
        return Interpretation(name, [_trace_row(fields, question, reply, form, len(replies)) for reply in replies])
    except TraceError as error:
        raise TraceError(f"read as {name}: {error}") from None


def _native_row(row: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any] | None:
    """A row that is already a trace, with the mapped fields set; None for any other row."""
    if not _is_native(row) or fields.keys() & {"reply", "solution", "conversation"}:
        return None
    mapped = {"verified" if meaning == "verdict" else meaning: value_at(row, name) for meaning, name in fields.items()}
    native = {**row, **mapped} if mapped else row
    return native if not mapped or _is_native(native) else None


def _is_native(row: Mapping[str, Any]) -> bool:
    """Whether a row is already a trace.

    It is not if its reasoning is a list, only a flag ("on"), or empty beside a worked answer; or if it has options,
    which belong in the problem.
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
    cleaned: dict[str, Any] = {name: as_text(row[name]) for name in MAY_BE_NUMBERS if name in row}
    cleaned["answer"] = (marked_answer(answer) if isinstance(answer, str) else answer_text(answer)) or answer
    if isinstance(reasoning, str) and row.get("spans") is None:
        cleaned["reasoning"] = split_thinking(reasoning)[0] or reasoning
    cleaned["verified"] = verdict_of(row.get("verified"))
    if not is_finite(row.get("difficulty")):
        cleaned["difficulty"] = None
    changed = {name: value for name, value in cleaned.items() if value is not row.get(name)}
    return {**row, **changed} if changed else row


def _format_name(form: str, row: RowFields, question: "_Question") -> str:
    """The name of the row's format in messages."""
    names = {"generations": "problems with generations", "completions": "prompts with completions"}
    names |= {"solutions": "problems with solutions", "conversations": "conversations"}
    if form == "trajectories":
        fields = [field.name for field, _ in row.candidates("reasoning")]
        return "s1K trajectories" if any("traject" in name for name in fields) else f"problems with {fields[0]}"
    if form == "generations" and "correctness_math_verify" in row.values:
        return "OpenR1 generations"
    if form == "conversations" and question.reply is not None and "<|begin_of_thought|>" in question.reply.text:
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
    turns = _problem_turns(row) if conversation is None else conversation
    own_system, earlier, question, reply = split_exchange([*_history(row), *turns])
    rest: Mapping[str, Any] = {}
    if conversation is not None:
        reply_fields = reply.rest if reply else {}
        rest = {**question.rest, **{name: value for name, value in reply_fields.items() if value is not None}}
    text = with_options(question.text, row.options) if row.options else question.text
    return _Question(text, own_system or _system(row), reply, rest, earlier)


def _problem_turns(row: RowFields) -> list[Turn]:
    """The turns of a problem field: a text is one turn, unless a template rendered it."""
    problem = _problem_field(row)
    turns = parse_rendered(problem) if isinstance(problem, str) else parse_turns(problem)
    if turns:
        last = turns[-1].text.strip()
        # A rendered generation prompt ends in an assistant turn that only opens a reply.
        opens_reply = turns[-1].role == ASSISTANT and (not last or OPENER.fullmatch(last) is not None)
        return turns[:-1] if opens_reply else turns
    if isinstance(problem, str):
        return [Turn(USER, problem, None, {})]
    raise TraceError(f"problem: expected text or messages, got {show(problem)}; {MAP_HINT}")


def _conversation(row: RowFields) -> list[Turn] | None:
    candidate = row.one("conversation")
    turns = (parse_turns(candidate[1]) or parse_pairs(candidate[1])) if candidate else None
    if candidate and turns is None and "conversation" in row.fields:
        raise TraceError(f"{candidate[0].name}: expected messages with role and content, got {show(candidate[1])}")
    if turns and any(turn.role == USER for turn in turns):
        return turns
    return None if row.candidates("problem") and row.has_reply else _unnamed_conversation(row)


def _unnamed_conversation(row: RowFields) -> list[Turn] | None:
    """A conversation in a field with another name: messages (with a preferred reply, say) or rendered text."""
    candidates = [(field.name, value) for field, value in row.candidates("reply")]
    candidates += [item for item in row.unknown() if item not in candidates]
    conversations = []
    for name, value in candidates:
        turns = parse_rendered(value) if isinstance(value, str) else _turns_or_none(value)
        if turns and {USER, ASSISTANT} <= {turn.role for turn in turns}:
            conversations.append((Field(name), turns))
    chosen = sole_candidate("conversation", conversations)
    return chosen[1] if chosen else None


def _turns_or_none(value: Any) -> list[Turn] | None:
    try:
        return parse_turns(value) if isinstance(value, list | tuple) else None
    except TraceError:
        return None


def _history(row: RowFields) -> list[Turn]:
    """The turns before the problem, if a separate field holds them."""
    field_and_value = row.one("earlier")
    if field_and_value is None:
        return []
    source, value = field_and_value
    turns = parse_turns(value) or parse_pairs(value)
    if turns is None:
        raise TraceError(f"{source.name}: expected turns before the problem, got {show(value)}; leave the row out")
    return turns


def _system(row: RowFields) -> str | None:
    """The system prompt in a separate field: a text, or blocks of text."""
    texts = (split_content(value)[1].strip() for _, value in row.candidates("system"))
    return next(filter(None, texts), None)


def _problem_field(row: RowFields) -> Any:
    candidates = row.candidates("problem")
    texts = [value for _, value in candidates if isinstance(value, str)]
    are_texts = len(texts) == len(candidates)
    if are_texts and {field.name for field, _ in candidates} == {"instruction", "input"}:
        return "\n\n".join(texts)
    if not candidates and (conversation := row.one("conversation")) and _is_question(conversation[1]):
        return conversation[1][0]
    shortest = min(texts, key=len, default="")
    if are_texts and all(shortest.strip() in text for text in texts):
        candidates = [(field, value) for field, value in candidates if value == shortest]  # others add an instruction
    chosen = sole_candidate("problem", candidates)
    if chosen is None:
        hint = (
            "a batch's output holds no questions: join it with its requests" if "custom_id" in row.values else MAP_HINT
        )
        raise TraceError(f"problem: expected this field, got {field_names(row.values)}; {hint}")
    problem, context = chosen[1], row.one("context")
    if context and isinstance(problem, str) and isinstance(context[1], str):
        return f"{context[1]}\n\n{problem}"
    return problem


def _is_question(value: Any) -> bool:
    """Whether the value is a single user turn as text: `turns: ["2+2?"]`."""
    return isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str)


@_refuse_deep_rows
def question_of(row: Any, options: FormatOptions = AUTO) -> dict[str, Any]:
    """The `problem` of a row, with `answer`, `system`, `domain`, `source` and `id` if it has them. No reply is needed.

    Raises TraceError if the row has no problem, several fields that may be the problem, or a problem that is not valid
    Unicode.
    """
    if not isinstance(row, Mapping):
        raise TraceError(f"expected an object with a problem, got {show(row)}")
    trace = _native_row(row, options.fields)
    fields = RowFields(unwrap(row)[0], options.fields, options.teacher_field)
    check_shows_nothing(fields.values)
    question = _find_question(fields) if trace is None else _question_of_trace(trace, fields)
    if earlier := question.earlier:
        raise TraceError(f"problem: expected a question alone, got one after {len(earlier)} turns; leave the row out")
    known = None
    if trace is not None and trace.get("reference") is not None and "answer" not in options.fields:
        known = known_answer(str(trace["reference"]))  # the trace's own answer may be wrong
    known = known or _answer_field(fields) or _known_answer(fields, question)
    values = {"problem": question.text, "answer": known, "system": question.system}
    for name in ("problem", "system"):
        if values[name] is not None:
            check_text(name, values[name])  # half a surrogate pair cannot be sent
    values |= {name: fields.text(name) for name in ("domain", "source", "id")}
    return {name: value for name, value in values.items() if value is not None}


def _question_of_trace(trace: Mapping[str, Any], fields: RowFields) -> _Question:
    """The question of a native trace, whose `turns` come before its problem."""
    problem = trace["problem"]
    if not isinstance(problem, str) or not problem:
        return _find_question(fields)
    return _Question(problem, _system(fields), None, {}, parse_turns(trace.get("turns") or ()) or ())


def _known_answer(row: RowFields, question: _Question) -> str | None:
    """The known answer in a solution field or in the question's message."""
    candidates = [*row.candidates("solution"), *row.candidates("reference")]
    texts = [value for _, value in candidates if isinstance(value, str)]
    return (
        next(filter(None, map(stated_answer, texts)), None)
        or as_text(question.rest.get("reference_answer"))
        or (stated_answer(question.reply.text) if question.reply else None)
    )


def _answer_field(row: RowFields) -> str | None:
    """The answer in an answer field, else in an object of the row. If several fields have one, they must agree."""
    if row.options and (option := chosen_option([value for _, value in row.choices()], row.options)):
        return option
    candidates = row.candidates("answer") or row.inner_answers() or _bare_solutions(row)
    texts = [(field, text) for field, value in candidates if (text := answer_text(value)) and text.strip()]
    short = [(field, stated_answer(text) or text.strip()) for field, text in texts if not field.teacher]
    agreed = sole_candidate("answer", short)
    return agreed[1] if agreed else None


def _bare_solutions(row: RowFields) -> list[tuple[Field, str]]:
    """Solutions that are a bare value, as in s1K: "128", "BCD", "[7, 8]"."""
    texts = [(field, as_text(value)) for field, value in row.candidates("solution")]
    return [(field, text) for field, text in texts if text and _BARE.fullmatch(text.strip())]


# -------------------------------------------------------------------------------------------------------- traces


def _trace_row(row: RowFields, question: _Question, reply: Reply, form: str, count: int) -> dict[str, Any]:
    """The fields of a trace.

    The answer is the one that the reply states, else the one in an answer field. If both are missing and the reply has
    thinking, the answer is the whole text after it. If that text has code, only a marked answer counts: "the answer is
    printed" states none.
    """
    is_code = bool(reply.thought) and "```" in reply.text
    field_answer, own = _answer_field(row), marked_answer(reply.text) if is_code else stated_answer(reply.text)
    field_answer = None if field_answer is None or is_placeholder(field_answer) else field_answer
    answer = own or field_answer
    if answer is None and reply.thought:
        answer = reply.text.strip() or stated_answer(reply.thought)
    if not answer:
        raise TraceError(
            r"answer: expected a marked answer (\boxed{}, ####, <answer>) or an answer field, got neither; "
            "name the field with --map answer=FIELD"
        )
    reasoning = reply.thought or without_answer(reply.text)
    if not reasoning.strip() or reasoning.strip() == answer.strip():
        raise TraceError(f"reasoning: expected working before the answer, got none; {MAP_HINT}")
    reference = field_answer or as_text(question.rest.get("reference_answer")) or row.text("reference")
    trace: dict[str, Any] = {
        "problem": question.text.strip(),
        "reasoning": reasoning.strip(),
        "answer": answer.strip(),
        "system": question.system,
        "turns": [_earlier_turn(turn) for turn in question.earlier] or None,
    }
    trace |= _metadata(row, question, reply, count)
    if own and not reply.thought and ends_in_answer(reply.text):
        trace["finished"] = True
    if own and reference and form != "solutions" and "verified" not in trace:
        trace["reference"] = reference
    return {name: value for name, value in trace.items() if value is not None}


def _earlier_turn(turn: Turn) -> dict[str, str]:
    """A turn before the problem, in the form of `Trace.turns`."""
    if turn.role == USER:
        return {"role": USER, "content": turn.text}
    thought, text, *_ = reply_of_turn(turn)
    return {"role": ASSISTANT, "content": text} | ({"reasoning": thought} if thought else {})


def _metadata(row: RowFields, question: _Question, reply: Reply, count: int) -> dict[str, Any]:
    """The metadata of a trace: domain, source, id, teacher, plan, difficulty, finish reason, verdict."""
    metadata: dict[str, Any] = {name: row.text(name) for name in ("domain", "source", "id", "teacher", "plan")}
    metadata["source"] = metadata["source"] or as_text(question.rest.get("source"))
    metadata["teacher"] = reply.teacher or metadata["teacher"]
    if metadata["id"] and count > 1:
        metadata["id"] += f"/{reply.number}"
    difficulty = next((value for _, value in row.candidates("difficulty")), None)
    metadata["difficulty"] = difficulty if is_finite(difficulty) else None
    metadata |= {
        name: row.values[name]
        for name in _COPIED_FIELDS
        if name in row.values and not isinstance(row.values[name], list)
    }
    if not any(metadata.get(name) for name in END_FIELDS):
        metadata["finish_reason"] = row.text("finish")
    if reply.verified is not None:
        metadata["verified"] = reply.verified
    return {name: value for name, value in metadata.items() if value is not None}
