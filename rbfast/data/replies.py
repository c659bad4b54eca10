"""Find the replies in a row: generations with verdicts, trajectories of several teachers, a conversation's last turn,
a completion, a worked solution. `find_replies` looks fields up by meaning (`rbfast.data.fields`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rbfast.data.answers import as_text, stated_answer
from rbfast.data.conversations import (
    ASSISTANT,
    Turn,
    opens_with_thinking,
    parse_turns,
    separate_thought,
    split_content,
    split_thinking,
)
from rbfast.data.fields import Field, as_mapping, field_names, fields_by_meaning
from rbfast.data.row import RowFields, sole_candidate
from rbfast.data.trace import TraceError
from rbfast.utils.records import show

_FLAGS = {"on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high"}  # thinking modes, not thoughts
_RIGHT = {"yes", "true", "correct", "right", "1", "pass", "passed", "y"}
_WRONG = {"no", "false", "incorrect", "wrong", "0", "fail", "failed", "n"}
END_FIELDS = ("finish_reason", "done_reason", "stop_reason")
# Values of these fields for a complete reply, for one that hit the token limit, and for any truncated one.
FINISHED = {"stop", "stop_sequence", "end_turn", "eos", "eos_token", "complete", "completed", "finished", "done"}
AT_LIMIT = {"length", "max_tokens", "max_output_tokens", "max_completion_tokens"}
_CUT = AT_LIMIT | {"model_length", "incomplete", "content_filter", "error", "abort"}


class Reply(NamedTuple):
    """A teacher's reply: the thinking, if there is any, and the text."""

    thought: str | None
    text: str
    verified: bool | None = None
    teacher: str = ""
    number: int | None = None  # its index among the row's replies


def find_replies(row: RowFields, reply: Turn | None, formats: Sequence[str]) -> tuple[str, list[Reply]]:
    """The first of `formats` with a reply in the row, and its replies: several only if several were judged right.

    `reply` is the last assistant turn of the row's conversation, if it has one. Raises TraceError if there is no reply.
    """
    for name in formats:
        if replies := _FINDERS[name](row, reply):
            return name, replies
    marked = [
        (Field(name), value) for name, value in row.unknown() if isinstance(value, str) and opens_with_thinking(value)
    ]
    if "completions" in formats and not row.fields and (candidate := sole_candidate("reply", marked)):
        return "completions", [read_reply(candidate[1])]
    raise _no_reply_error(row, reply, formats)


def _no_reply_error(row: RowFields, reply: Turn | None, formats: Sequence[str]) -> TraceError:
    """The error for a row without a reply."""
    for field, value in row.candidates("answer"):
        if isinstance(value, str) and "\n" in value.strip():
            return TraceError(
                rf"answer: expected working that marks its answer (\boxed{{}}, ####, <answer>), got {field.name} "
                "without a mark; leave the row out, or name the answer's field with --map answer=FIELD"
            )
    wanted = "this field"
    if reply is None and "conversations" in formats and row.candidates("conversation"):
        wanted = "a reply to the last turn or this field"
    return TraceError(f"reasoning: expected {wanted}, got {field_names(row.values)}; {MAP_HINT}")


MAP_HINT = "name the fields with --map problem=FIELD,reasoning=FIELD,answer=FIELD"


# --------------------------------------------------------------------------------------------------- generations


def _generations(row: RowFields, _: Turn | None) -> list[Reply]:
    lists = [(field, value) for field, value in row.candidates("reply") if _is_list_of_replies(value)]
    if row.fields.keys() & {"reply", "reasoning"} and not lists:
        return []
    chosen = sole_candidate("reply", _of_one_teacher(row, lists)) if lists else None
    if chosen is not None:
        field, values = chosen
        return _select_replies(row, field.teacher, list(map(_try_read_reply, values)), _verdicts(row, values))
    numbered = [(field, value) for field, value in row.candidates("reply") if field.number is not None]
    if len(numbered) > 1:
        teacher = numbered[0][0].teacher
        return _select_replies(row, teacher, [_try_read_reply(value) for _, value in numbered], [None] * len(numbered))
    return []


def _is_list_of_replies(value: object) -> bool:
    """Whether a value is a list of replies (texts or messages), not a conversation and not a list of blocks."""
    if not isinstance(value, list | tuple) or parse_turns(value) is not None:
        return False
    return not all(isinstance(item, Mapping) and "type" in item for item in value)


def _select_replies(
    row: RowFields, teacher: str, replies: Sequence[Reply | TraceError], verdicts: Sequence[bool | None]
) -> list[Reply]:
    """Every reply that was judged right, else the first complete one."""
    whole = _which_complete(row, len(replies))
    complete = [
        reply._replace(verified=verdict, teacher=teacher, number=number)
        for number, (reply, verdict) in enumerate(zip(replies, verdicts, strict=True))
        if whole[number] and isinstance(reply, Reply)
    ]
    if not complete:
        for reply, is_complete in zip(replies, whole, strict=True):
            if is_complete and isinstance(reply, TraceError):
                raise reply
        raise TraceError(f"generations: expected a complete reply, got {len(replies)} truncated; leave the row out")
    return [reply for reply in complete if reply.verified] or complete[:1]


def _verdicts(row: RowFields, replies: Sequence[Any]) -> list[bool | None]:
    """The verdict on each generation: True if any of the row's judges accepts it, False if all judges reject it."""
    count = len(replies)
    columns: list[Any] = [[_verdict_in(reply) for reply in replies]]
    columns += [value for _, value in row.candidates("verdict")]
    columns += [value for name, value in row.values.items() if name.startswith("correctness_")]
    judgements: list[list[bool]] = [[] for _ in range(count)]
    for column in columns:
        column = [column] if count == 1 and not isinstance(column, list | tuple) else column
        if isinstance(column, list | tuple) and len(column) == count:
            for marks, value in zip(judgements, column, strict=True):
                marks += [verdict for verdict in [verdict_of(value)] if verdict is not None]
    return [any(marks) if marks else None for marks in judgements]


def _verdict_in(reply: Any) -> Any:
    """The verdict inside a reply that is an object."""
    if not isinstance(reply, Mapping):
        return None
    return next((reply[field.name] for field in fields_by_meaning(tuple(map(str, reply))).get("verdict", ())), None)


def verdict_of(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    text = (as_text(value) or "").strip().lower()
    return True if text in _RIGHT else False if text in _WRONG else None


def cut_by_server(row: Mapping[str, Any]) -> str | None:
    """Why a reply was truncated, by its server's finish reason (Gemini's is in capitals); None if it was not."""
    for field in END_FIELDS:
        if str(row.get(field)).lower() in _CUT:
            return f"truncated: its {field} is {row[field]}"
    return "truncated: its field truncated is true" if verdict_of(row.get("truncated")) else None


def _which_complete(row: RowFields, count: int) -> list[bool]:
    whole = [True] * count
    for meaning in ("complete", "finish"):
        for _, value in row.candidates(meaning):
            if isinstance(value, list | tuple) and len(value) == count:
                whole = [
                    so_far and mark is not False and str(mark).lower() not in _CUT
                    for so_far, mark in zip(whole, value, strict=True)
                ]
    return whole


def _try_read_reply(value: object) -> Reply | TraceError:
    try:
        return read_reply(value)
    except TraceError as error:
        return error


def read_reply(value: object) -> Reply:
    """A reply from a text, a message, messages of one reply, or blocks."""
    if isinstance(value, str) and _fields_of_reply(as_mapping(value)) is None:
        return Reply(*split_thinking(value))
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if (turns := parse_turns(value)) is not None:
        spoken = [turn for turn in turns if turn.role == ASSISTANT]
        if len(spoken) != 1:
            raise TraceError(
                f"reply: expected one assistant's turn, got {len(spoken)}; name the field with --map reply=FIELD"
            )
        return reply_of_turn(spoken[0])
    if (fields := _fields_of_reply(as_mapping(value))) is not None:
        return split_reply(*fields)
    if isinstance(value, Mapping):
        inner = next(
            (value[key] for key in ("text", "content", "generation", "response", "output") if value.get(key)), None
        )
        if inner is None:
            raise TraceError(f"reply: expected text, got {show(value)}")
        reply = read_reply(inner)
        return reply._replace(thought=reply.thought or separate_thought(value))
    thought, text = split_content(value)
    return split_reply(thought, text)


def _fields_of_reply(value: Mapping[str, Any]) -> tuple[str, str] | None:
    """(thinking, text) of a reply that is an object with both, `{"reasoning": .., "answer": ..}`; None for others."""
    fields = fields_by_meaning(tuple(map(str, value)))
    thoughts = [text for field in fields.get("reasoning", ()) if (text := _thought_text(field, value[field.name]))]
    texts = [as_text(value[field.name]) for meaning in ("reply", "answer") for field in fields.get(meaning, ())]
    text = next(filter(None, texts), None)
    return (thoughts[0], text) if thoughts and text else None


def reply_of_turn(turn: Turn) -> Reply:
    return split_reply(turn.thought, turn.text)


def split_reply(thought: str | None, text: str) -> Reply:
    """A reply with `thought` as its thinking, else with the tagged thinking. Raises TraceError for unclosed tags."""
    tagged, rest = split_thinking(text)
    return Reply((thought and thought.strip()) or tagged, rest)


# ------------------------------------------------------------------------------------ trajectories, completions, ...


def _trajectories(row: RowFields, reply: Turn | None) -> list[Reply]:
    """A reply whose thinking has a separate field."""
    thoughts = [(field, text) for field, value in row.candidates("reasoning") if (text := _thought_text(field, value))]
    if not thoughts:
        return []
    chosen = sole_candidate("reasoning", _of_one_teacher(row, thoughts))
    assert chosen is not None
    teacher = chosen[0].teacher
    thought, after = split_thinking(chosen[1])
    own = [(field, value) for field, value in row.candidates("reply") if field.teacher == teacher]
    written = sole_candidate("reply", own) or (row.one("solution") if reply is None else None)
    text = read_reply(_first_text(written[1])).text if written else reply_of_turn(reply).text if reply else ""
    return [Reply(thought or after, text or (after if thought else ""), _verdict_by(row, teacher), teacher)]


def is_flag(value: object) -> bool:
    """Whether a value is only a thinking mode: "on", "high"."""
    return isinstance(value, str) and value.strip().lower() in _FLAGS


def _thought_text(field: Field, value: object) -> str | None:
    if isinstance(value, list | tuple):
        texts = [text for item in value if isinstance(text := _inner_text(item), str)]
        value = "\n\n".join(texts) if "step" in field.name.lower() else next(iter(texts), None)
    value = _inner_text(value)
    return value if isinstance(value, str) and value.strip() and not is_flag(value) else None


def _inner_text(value: object) -> object:
    return value.get("content") or value.get("text") if isinstance(value, Mapping) else value


def _first_text(value: object) -> object:
    return value[0] if isinstance(value, list | tuple) and value and isinstance(value[0], str) else value


def _of_one_teacher(row: RowFields, candidates: Sequence[tuple[Field, Any]]) -> list[tuple[Field, Any]]:
    """The fields of one teacher: the requested one, the only one, the first graded right, or the first graded."""
    teachers = list(dict.fromkeys(field.teacher for field, _ in candidates))
    if row.teacher_field is not None:
        wanted = [(field, value) for field, value in candidates if row.teacher_field in (field.teacher, field.name)]
        if not wanted:
            names = ", ".join(field.name for field, _ in candidates)
            raise TraceError(f"expected a field of the teacher {row.teacher_field!r}, got {names}; see --teacher-field")
        return wanted
    if len(teachers) < 2:
        return list(candidates)
    verdicts = {teacher: _verdict_by(row, teacher) for teacher in teachers}
    if all(verdict is None for verdict in verdicts.values()):
        names = " and ".join(field.name for field, _ in candidates)
        raise TraceError(
            f"expected one teacher or a grade for each, got {names}; choose one with --teacher-field {teachers[0]}"
        )
    teacher = next((name for name, verdict in verdicts.items() if verdict), teachers[0])
    return [(field, value) for field, value in candidates if field.teacher == teacher]


def _verdict_by(row: RowFields, teacher: str) -> bool | None:
    """The verdict on a teacher's reply. If the row has only one verdict, it counts for any teacher."""
    verdicts = [
        (field, value) for field, value in row.candidates("verdict") if field.name != "label" or isinstance(value, bool)
    ]
    return next(
        (verdict_of(value) for field, value in verdicts if field.teacher == teacher or len(verdicts) == 1), None
    )


def _conversations(row: RowFields, reply: Turn | None) -> list[Reply]:
    return [reply_of_turn(reply)._replace(verified=_verdict_by(row, ""))] if reply is not None else []


def _completions(row: RowFields, _: Turn | None) -> list[Reply]:
    candidates = row.candidates("reply")
    if not candidates:
        return []
    field, value = sole_candidate("reply", _of_one_teacher(row, candidates)) or candidates[0]
    return [read_reply(value)._replace(verified=_verdict_by(row, field.teacher), teacher=field.teacher)]


def _solutions(row: RowFields, _: Turn | None) -> list[Reply]:
    """A worked solution, or an answer field that contains the working, as in GSM8K."""
    if solution := row.one("solution"):
        return [read_reply(_first_text(solution[1]))._replace(verified=_verdict_by(row, ""))]
    for value in (value for _, value in row.candidates("answer") if isinstance(value, str)):
        written = read_reply(value)
        if written.thought or (stated_answer(written.text) not in (None, written.text.strip())):
            return [written._replace(verified=_verdict_by(row, ""))]
    return []


_FINDERS = {
    "generations": _generations,
    "trajectories": _trajectories,
    "conversations": _conversations,
    "completions": _completions,
    "solutions": _solutions,
}
