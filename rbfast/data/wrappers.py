"""Flatten nested rows: API requests with their responses, batch files, and objects inside an object. The fields of the
flat row can then be looked up by meaning.
"""

from collections.abc import Mapping
from typing import Any

from rbfast.data.conversations import ASSISTANT, SYSTEM, parse_turns
from rbfast.data.fields import fields_by_meaning
from rbfast.data.trace import TraceError
from rbfast.utils.records import objects_of, show

_WRAPPERS = {"request", "response", "body", "params", "result", "choices", "candidates", "error"}
_CONTENTS = ("messages", "input", "contents")
_SYSTEMS = ("system", "instructions", "systemInstruction", "system_instruction")


def unwrap(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """A flat row, and the name of its batch format, or None if it is not from a batch.

    A batch's request and response become fields of one row. In any other row, the only object that holds a problem is
    merged into the row.

    Raises TraceError for a request that was answered with an error.
    """
    request, response = _request(row), _response(row)
    messages = next((request[key] for key in _CONTENTS if request.get(key)), None)
    replies = _replies(response) or _replies({key: row[key] for key in ("choices", "candidates") if key in row})
    if row.get("error") and not replies and ("custom_id" in row or messages):
        raise TraceError(f"expected a response, got the error {show(row['error'])}; ask again")
    if not messages and not replies:
        return _merge_inner(row), None
    flat = {key: value for key, value in row.items() if key not in _WRAPPERS and value is not request}
    if messages:
        flat["messages"] = _with_system(messages, next((request[key] for key in _SYSTEMS if request.get(key)), None))
    if replies:
        flat["generations"] = [[{"role": ASSISTANT, **message}] for message, _ in replies]
        flat["finish_reasons"] = [reason for _, reason in replies]
    flat["model"] = response.get("model") or response.get("modelVersion") or request.get("model") or flat.get("model")
    return flat, _batch_name(row, request, response)


def _batch_name(row: Mapping[str, Any], request: Mapping[str, Any], response: Mapping[str, Any]) -> str | None:
    if "candidates" in response or "contents" in request:
        return "Gemini batch rows"
    if "params" in row or ("content" in response and "choices" not in response):
        return "Anthropic batch rows"
    return "OpenAI batch rows" if response or "choices" in row or "custom_id" in row else None


def _request(row: Mapping[str, Any]) -> Mapping[str, Any]:
    request: Any = next(
        (row[key] for key in ("request", "body", "params", "input") if isinstance(row.get(key), Mapping)), {}
    )
    request = request["body"] if isinstance(request.get("body"), Mapping) else request
    return request if any(isinstance(request.get(key), list | str) for key in _CONTENTS) else {}


def _response(row: Mapping[str, Any]) -> Mapping[str, Any]:
    response: Any = next(
        (row[key] for key in ("response", "result", "completion") if isinstance(row.get(key), Mapping)), {}
    )
    return next((response[key] for key in ("body", "message") if isinstance(response.get(key), Mapping)), response)


def _replies(response: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Any]]:
    """The messages of a response, each with its finish reason."""
    choices = response.get("choices") or response.get("candidates")
    if isinstance(choices, Mapping):
        choices = objects_of(choices)
    replies: list[tuple[Mapping[str, Any], Any]] = []
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, Mapping):
            continue
        message = choice.get("message") or choice.get("content")
        if not message and isinstance(choice.get("text"), str) and choice.keys() & {"finish_reason", "index"}:
            message = {"content": choice["text"]}
        if isinstance(message, Mapping):
            message = {**message, "role": ASSISTANT}  # Gemini's is "model"
            replies.append((message, choice.get("finish_reason") or choice.get("finishReason")))
    content = response.get("content") or response.get("output")
    if not choices and isinstance(content, list):
        replies.append(({"content": content}, response.get("stop_reason") or response.get("status")))
    return replies


def _with_system(messages: Any, system: Any) -> Any:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return [{"role": SYSTEM, "content": system}, *messages] if system and isinstance(messages, list) else messages


def _merge_inner(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row merged with the one object in it that holds a problem, if the row itself has none."""
    if _has_problem(row):
        return row
    inner = [(name, value) for name, value in row.items() if isinstance(value, Mapping) and _has_problem(value)]
    if len(inner) != 1:
        return row
    name, value = inner[0]
    return {**value, **{key: other for key, other in row.items() if key != name}}


def _has_problem(row: Mapping[str, Any]) -> bool:
    """Whether a row has a field that may be its problem or its conversation."""
    by_meaning = fields_by_meaning(tuple(map(str, row)))
    fields = [*by_meaning.get("problem", ()), *by_meaning.get("conversation", ())]
    if any(row.get(field.name) for field in fields):
        return True
    return any(_is_conversation(row.get(field.name)) for field in by_meaning.get("reply", ()))


def _is_conversation(value: Any) -> bool:
    try:
        return parse_turns(value) is not None
    except TraceError:
        return True
