"""The shapes in which people hold traces and problems, known by what their fields mean, one row at a time.

```python
interpret({"question": "2+2?", "answer": "Add.\\n#### 4"}).rows     # [{"problem": .., "reasoning": .., "answer": "4"}]
interpret(row, FormatOptions(fields={"problem": "q", "reasoning": "work", "answer": "gold"}))
```

The format of a row depends on that row alone. docs/formats.md lists the formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from rbfast.data.answers import as_text, stated_answer, without_answer
from rbfast.data.conversations import ASSISTANT, USER, Turn, exchange, parse_turns
from rbfast.data.fields import check_map, names_of
from rbfast.data.replies import ADVICE, Reply, Row, find_replies, only, reply_of_turn
from rbfast.data.trace import MAY_BE_NUMBERS, TraceError
from rbfast.utils.records import objects_of, show

_FOUND = ("generations", "trajectories", "conversations", "completions", "solutions")
FORMATS = ("native", *_FOUND, "batch")
_NATIVE = ("problem", "reasoning", "answer")
_KEPT = ("plan", "finish_reason", "done_reason", "stop_reason", "truncated")


@dataclass(frozen=True)
class FormatOptions:
    """How rows are read, if not by what their fields mean.

    Args:
        format: one of FORMATS; only this one is tried.
        fields: the field that holds the problem, the answer, ...: `{"problem": "q", "answer": "info.gold"}`.
        teacher_field: which teacher's trajectory, of several: the start of the field's name, or the whole name.

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
    """The format of a row, in words for people, and the traces in it as rows with the fields of a trace."""

    name: str
    rows: list[Mapping[str, Any]]


def interpret(row: Any, options: FormatOptions = AUTO) -> Interpretation:
    """The traces in a row, with the fields of a trace and, if the row has them, `reference` (the known answer) and the
    marks of a cut reply. The fields' own checks are left to `Trace`.

    Raises TraceError if the row is of no known shape, holds no whole trace, or may be read in several ways.
    """
    if not isinstance(row, Mapping):
        raise TraceError(f"expected an object with {', '.join(_NATIVE)}, got {show(row)}")
    if options.format in (None, "native") and not options.fields and all(name in row for name in _NATIVE):
        return Interpretation("native traces", [_as_native(row)])
    if options.format == "native":
        missing = next((name for name in _NATIVE if name not in row and name not in options.fields), None)
        if missing is not None:
            raise TraceError(f"{missing}: expected this field, got {names_of(row)}; {ADVICE}")
    values, batch = _unwrapped(row)
    if options.format == "batch" and batch is None:
        raise TraceError(f"expected a batch's request with its response, got {names_of(row)}")
    one = Row(values, options.fields, options.teacher_field)
    asked = _question(one)
    formats = (options.format,) if options.format in _FOUND else _FOUND
    if options.format == "native":
        formats = ("trajectories",)
    form, replies = find_replies(one, asked.reply, formats)
    name = _name(form, one, asked) if batch is None else batch
    try:
        return Interpretation(name, [_trace_row(one, asked, reply, form, len(replies)) for reply in replies])
    except TraceError as error:
        raise TraceError(f"read as {name}: {error}") from None


def _as_native(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, with numbers as text; itself if nothing has to change."""
    changed = {name: as_text(row[name]) for name in MAY_BE_NUMBERS if isinstance(row.get(name), int | float)}
    changed = {name: text for name, text in changed.items() if text is not None}
    return {**row, **changed} if changed else row


def _name(form: str, row: Row, asked: "_Question") -> str:
    """The name of such rows, for people."""
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
    rest: Mapping[str, Any]  # what else its message holds
    earlier: Sequence[Turn] = ()


def _question(row: Row) -> _Question:
    """The question: a conversation's own before that of another field."""
    conversation = None if "problem" in row.fields and "conversation" not in row.fields else _conversation(row)
    system = row.text("system")
    if conversation is not None:
        own_system, earlier, asked, reply = exchange(conversation)
        rest = {**asked.rest, **(reply.rest if reply else {})}
        return _Question(asked.text, own_system or system, reply, rest, earlier)
    found = _problem_field(row)
    if isinstance(found, str):
        return _Question(found, system, None, {})
    turns = parse_turns(found)
    if turns is None:
        raise TraceError(f"problem: expected text or messages, got {show(found)}; {ADVICE}")
    own_system, earlier, asked, reply = exchange(turns)
    return _Question(asked.text, own_system or system, reply, {}, earlier)


def _conversation(row: Row) -> list[Turn] | None:
    found = row.one("conversation")
    turns = parse_turns(found[1]) if found else None
    if found and turns is None and "conversation" in row.fields:
        raise TraceError(f"{found[0].name}: expected messages with role and content, got {show(found[1])}")
    return turns if turns and any(turn.role == USER for turn in turns) else None


def _problem_field(row: Row) -> Any:
    found = row.candidates("problem")
    if {one.name for one, _ in found} == {"instruction", "input"} and all(isinstance(v, str) for _, v in found):
        return "\n\n".join(value for _, value in found)
    problem = only("problem", found)
    if problem is None:
        hint = "a batch's output holds no questions: join it with its requests" if "custom_id" in row.values else ADVICE
        raise TraceError(f"problem: expected this field, got {names_of(row.values)}; {hint}")
    context = row.one("context")
    if context and isinstance(problem[1], str) and isinstance(context[1], str):
        return f"{context[1]}\n\n{problem[1]}"
    return problem[1]


def question_of(row: Any, options: FormatOptions = AUTO) -> dict[str, Any]:
    """The `problem` of a row, with `answer`, `system`, `domain`, `source` and `id` if it has them; no reply is needed.

    Raises TraceError if it has no problem, or more than one field that may be it.
    """
    if not isinstance(row, Mapping):
        raise TraceError(f"expected an object with a problem, got {show(row)}")
    one = Row(_unwrapped(row)[0], options.fields, options.teacher_field)
    asked = _question(one)
    if asked.earlier:
        raise TraceError(f"problem: expected a question alone, got one after {len(asked.earlier)} turns; leave it out")
    known = _stated_field(one) or _gold(one, asked)
    found = {"problem": asked.text, "answer": known, "system": asked.system}
    found |= {name: one.text(name) for name in ("domain", "source", "id")}
    return {name: value for name, value in found.items() if value is not None}


def _gold(row: Row, asked: _Question) -> str | None:
    """The known answer in a solution or in the question's own message."""
    texts = [value for role in ("solution", "reference") for _, value in row.candidates(role) if isinstance(value, str)]
    found = next((answer for text in texts if (answer := stated_answer(text))), None)
    return (
        found
        or as_text(asked.rest.get("reference_answer"))
        or (stated_answer(asked.reply.text) if asked.reply else None)
    )


def _stated_field(row: Row) -> str | None:
    """The answer in a field of its own; several fields must agree."""
    found = [(one, text) for one, value in row.candidates("answer") if (text := as_text(value)) and text.strip()]
    short = [(one, stated_answer(text) or text.strip()) for one, text in found if not one.teacher]
    chosen = only("answer", short)
    return chosen[1] if chosen else None


# -------------------------------------------------------------------------------------------------------- traces


def _trace_row(row: Row, asked: _Question, reply: Reply, form: str, count: int) -> dict[str, Any]:
    """A trace's fields. The answer is the one the reply states, else the one in a field of its own; after thinking, a
    reply that marks none is the answer."""
    field_answer, own = _stated_field(row), stated_answer(reply.text)
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
        raise TraceError(f"reasoning: expected working before the answer, got none; {ADVICE}")
    reference = field_answer or as_text(asked.rest.get("reference_answer")) or row.text("reference")
    found = {
        "problem": asked.text.strip(),
        "reasoning": reasoning.strip(),
        "answer": answer.strip(),
        "system": asked.system,
        "turns": [_earlier(turn) for turn in asked.earlier] or None,
    }
    found |= _about(row, asked, reply, count)
    if own and reference and form != "solutions" and "verified" not in found:
        found["reference"] = reference
    return {name: value for name, value in found.items() if value is not None}


def _earlier(turn: Turn) -> dict[str, str]:
    """A turn before the problem as a trace keeps it."""
    if turn.role == USER:
        return {"role": USER, "content": turn.text}
    thought, text, *_ = reply_of_turn(turn)
    return {"role": ASSISTANT, "content": text} | ({"reasoning": thought} if thought else {})


def _about(row: Row, asked: _Question, reply: Reply, count: int) -> dict[str, Any]:
    """What the row says of its trace."""
    found: dict[str, Any] = {name: row.text(name) for name in ("domain", "source", "id", "teacher")}
    found["source"] = found["source"] or as_text(asked.rest.get("source"))
    found["teacher"] = reply.teacher or found["teacher"]
    if found["id"] and count > 1:
        found["id"] += f"/{reply.number}"
    difficulty = next((value for _, value in row.candidates("difficulty")), None)
    is_number = isinstance(difficulty, int | float) and not isinstance(difficulty, bool) and isfinite(difficulty)
    found["difficulty"] = difficulty if is_number else None
    found |= {name: row.values[name] for name in _KEPT if name in row.values and not isinstance(row.values[name], list)}
    if reply.verified is not None:
        found["verified"] = reply.verified
    return {name: value for name, value in found.items() if value is not None}


# --------------------------------------------------------------------------------------------------------- batches


_WRAPPERS = {"request", "response", "body", "params", "result", "choices"}


def _unwrapped(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The request and the response of a batch as fields of a row, and what people call it; else the row, and None."""
    request: Any = next((row[key] for key in ("request", "body", "params") if isinstance(row.get(key), Mapping)), {})
    request = request["body"] if isinstance(request.get("body"), Mapping) else request
    response: Any = next(
        (row[key] for key in ("response", "result", "completion") if isinstance(row.get(key), Mapping)), {}
    )
    response = next((response[key] for key in ("body", "message") if isinstance(response.get(key), Mapping)), response)
    choices = response.get("choices") or row.get("choices")
    if isinstance(choices, Mapping):
        choices = objects_of(choices)
    if row.get("error") and not choices:
        raise TraceError(f"expected a response, got the error {show(row['error'])}; ask again")
    messages = request.get("messages") or request.get("input")
    if not messages and not choices:
        return row, None
    flat = {key: value for key, value in row.items() if key not in _WRAPPERS}
    if messages:
        system = [{"role": "system", "content": request["system"]}] if isinstance(request.get("system"), str) else []
        flat["messages"] = [*system, *messages] if isinstance(messages, list) else messages
    if isinstance(choices, list):
        said = [
            choice for choice in choices if isinstance(choice, Mapping) and isinstance(choice.get("message"), Mapping)
        ]
        flat["generations"] = [[choice["message"]] for choice in said]
        flat["finish_reasons"] = [choice.get("finish_reason") for choice in said]
    elif response.get("content"):
        flat["generations"] = [[{"role": ASSISTANT, "content": response["content"]}]]
        flat["finish_reasons"] = [response.get("stop_reason")]
    flat["model"] = response.get("model") or request.get("model") or flat.get("model")
    return flat, "Anthropic batch rows" if "params" in row else "OpenAI batch rows"
