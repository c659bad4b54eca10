"""Parse conversations into turns, and split a reply into its thinking and the text after it.

```python
parse_turns([{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "<think>Add.</think>4"}])
split_thinking("<think>Add.</think>4")                              # ("Add.", "4")
```
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rbfast.data.thinking_marks import (
    ANSWER_OPENER,
    BARE_CHANNELS,
    FINAL_CHANNEL,
    LONE_CLOSER,
    NEXT_BARE_CHANNEL,
    NEXT_MESSAGE,
    OPENER,
    TOOL_CALL,
    closer_of,
)
from rbfast.data.trace import TraceError
from rbfast.utils.records import objects_of, show

SYSTEM, USER, ASSISTANT, THOUGHT = "system", "user", "assistant", "thought"
_ROLES = dict.fromkeys(("system", "developer", "context"), SYSTEM)
_ROLES |= dict.fromkeys(("user", "human", "prompter", "student", "question"), USER)
_ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "ai", "teacher", "answer"), ASSISTANT)
_ROLES |= dict.fromkeys(("think", "thinking", "thought", "thoughts", "reasoning", "analysis"), THOUGHT)
_ROLE_KEYS, _TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts", "message")
_THOUGHT_KEYS = (
    *("reasoning_content", "reasoning", "thinking", "think_content", "thinking_content"),
    *("thought", "thoughts", "thinking_blocks"),
)

_OPENING = re.compile(r"\s*(?:<\|start\|>assistant|<｜Assistant｜>|<\|im_start\|>assistant)?\s*")
_FINAL = re.compile(rf"(?:{re.escape(NEXT_MESSAGE)})?{re.escape(FINAL_CHANNEL)}")
_ENDS = tuple(f"<|{name}|>" for name in ("im_end", "eot_id", "endoftext", "return", "end", "end_of_text"))
_ENDS += ("<｜end▁of▁sentence｜>", "</s>")


@dataclass(frozen=True)
class Turn:
    """A message: its role, its text, the thinking in its other fields, and the whole message."""

    role: str
    text: str
    thought: str | None
    rest: Mapping[str, Any]


def parse_turns(value: object) -> list[Turn] | None:
    """The turns of a conversation, or None if `value` is not one.

    `value` may be a list of messages (OpenAI's, ShareGPT's, Claude's, Gemini's), one message, a mapping of lists (as
    `datasets` stores a list of objects), or any of these as JSON text.

    Raises TraceError, naming the turn, if a message has an unknown role or content that is not text.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping):
        value = objects_of(value) or [dict(value)]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, Mapping) for item in value):
        return None
    turns: list[Turn] = []
    for number, message in enumerate(value, start=1):
        parsed = _turns_of(message, number)
        if parsed is None:
            return None
        turns += parsed
    return _attach_thoughts(turns)


def parse_pairs(value: object) -> list[Turn] | None:
    """The turns of a list of (question, reply) pairs, or None if `value` is not one."""
    if not isinstance(value, list | tuple) or not value or not all(_is_pair(item) for item in value):
        return None
    return [Turn(role, text, None, {}) for pair in value for role, text in zip((USER, ASSISTANT), pair, strict=True)]


def _is_pair(item: object) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item)


def _parsed(text: str) -> Any:
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _turns_of(message: Mapping[str, Any], number: int) -> list[Turn] | None:
    """The turn of a message; two turns of an object like {"human": .., "assistant": ..}; None if it is neither."""
    role = _role(message)
    if role is None:
        if message and all(str(key).lower() in _ROLES for key in message):
            return [
                Turn(_ROLES[str(key).lower()], split_content(text, number)[1], None, {})
                for key, text in message.items()
            ]
        return None
    kind = _ROLES.get(role.lower())
    if kind is None:
        raise TraceError(
            f"turn {number}: expected a role of system, user or assistant, got {role!r}; leave the row out"
        )
    content = next((message[key] for key in _TEXT_KEYS if message.get(key) is not None), None)
    info = message["info"] if isinstance(message.get("info"), Mapping) else {}
    separate = separate_thought(message) or separate_thought(info)
    if kind == THOUGHT and not (content or separate):
        content = message.get("summary")
    thought, text = split_content(content, number)
    return [Turn(kind, text, separate or thought, {**info, **message})]


def _role(message: Mapping[str, Any]) -> str | None:
    """The role of a message. Reasoning channels and reasoning items count as thoughts, whatever their role."""
    if message.get("channel") in ("analysis", "commentary") or message.get("type") == "reasoning":
        return THOUGHT
    author = message.get("author")
    message = {**author, **message} if isinstance(author, Mapping) else message
    return next((message[key] for key in _ROLE_KEYS if isinstance(message.get(key), str)), None)


def separate_thought(message: Mapping[str, Any]) -> str | None:
    """The thinking in a field beside a message's content: a text, an object with a text, or a list of blocks."""
    for key in _THOUGHT_KEYS:
        value = message.get(key)
        if isinstance(value, Mapping):
            value = value.get("content") or value.get("text")
        if isinstance(value, list) and value and all(isinstance(item, str | Mapping) for item in value):
            value = "\n\n".join(filter(None, split_content(value)))
        if isinstance(value, str) and value.strip():
            return value
    details = message.get("reasoning_details")
    if isinstance(details, list):
        parts = [item.get("text") or item.get("summary") for item in details if isinstance(item, Mapping)]
        return "\n\n".join(part for part in parts if isinstance(part, str)) or None
    inner = message.get("provider_specific_fields")
    return separate_thought(inner) if isinstance(inner, Mapping) else None


def split_content(content: object, number: int = 1) -> tuple[str | None, str]:
    """(thinking, text) of a message's content: a text, a list of blocks, or an object with one of these."""
    if isinstance(content, Mapping) and (inner := content.get("parts") or content.get("text")):
        content = inner
    if content is None:
        return None, ""
    if isinstance(content, str):
        return None, content
    if not isinstance(content, list | tuple):
        raise TraceError(f"turn {number}: content: expected text or a list of blocks, got {show(content)}")
    thoughts: list[str] = []
    texts: list[str] = []
    for block in content:
        kind, text = _block(block, number)
        (thoughts if kind == THOUGHT else texts).append(text)
    return "\n\n".join(filter(None, thoughts)) or None, "\n\n".join(filter(None, texts))


def _block(block: object, number: int) -> tuple[str, str]:
    if isinstance(block, str):
        return "", block
    if not isinstance(block, Mapping):
        raise TraceError(f"turn {number}: content: expected blocks of text, got {show(block)}")
    block = _normalize_bedrock(block)
    kind = str(block.get("type") or "")
    is_thought = "think" in kind or "reason" in kind or block.get("thought") is True
    is_thought = is_thought or (not kind and isinstance(block.get("thinking"), str))
    keys = ("thinking", "reasoning", "text", "summary", "content") if is_thought else ("text", "content", "output_text")
    text = next((block[key] for key in keys if block.get(key)), "" if "text" in kind or is_thought else None)
    if isinstance(text, list):
        text = "\n\n".join(filter(None, split_content(text, number)))
    if not isinstance(text, str):
        raise TraceError(f"turn {number}: content: expected blocks of text or thinking, got {kind or show(block)}")
    return THOUGHT if is_thought else "", text


def _normalize_bedrock(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """A Bedrock thinking block in the common form; any other block unchanged."""
    inner = block.get("reasoningContent")
    if not isinstance(inner, Mapping):
        return block
    inner = inner["reasoningText"] if isinstance(inner.get("reasoningText"), Mapping) else inner
    return {"type": "thinking", "thinking": inner.get("text")}


def _attach_thoughts(turns: Sequence[Turn]) -> list[Turn]:
    """Attach thoughts that came as separate messages to the assistant turn after them."""
    attached: list[Turn] = []
    thoughts: list[str] = []
    for turn in turns:
        if turn.role == THOUGHT:
            thoughts += dict.fromkeys(filter(None, (turn.thought, turn.text)))  # some messages hold it twice
            continue
        if thoughts and turn.role == ASSISTANT:
            turn = Turn(turn.role, turn.text, "\n\n".join(filter(None, [*thoughts, turn.thought])), turn.rest)
            thoughts = []
        attached.append(turn)
    return attached


class Exchange(NamedTuple):
    """A conversation's system prompt, the turns before its last question, that question, and its reply, if any."""

    system: str | None
    earlier: list[Turn]
    asked: Turn
    reply: Turn | None


def split_exchange(turns: Sequence[Turn]) -> Exchange:
    """Split a conversation at its last question. Raises TraceError unless user and assistant turns alternate."""
    system = "\n\n".join(turn.text for turn in turns if turn.role == SYSTEM) or None
    spoken = [turn for turn in turns if turn.role != SYSTEM]
    order = [turn.role for turn in spoken]
    if not order or order != [(USER, ASSISTANT)[number % 2] for number in range(len(order))]:
        raise TraceError(
            "conversation: expected alternating turns, the user's first, got "
            f"{', '.join(order[:8]) or 'no turns'}; leave the row out"
        )
    if order[-1] == USER:
        return Exchange(system, spoken[:-1], spoken[-1], None)
    return Exchange(system, spoken[:-2], spoken[-2], spoken[-1])


def split_thinking(reply: str) -> tuple[str | None, str]:
    """(thinking, text after it) of a reply, both without their tags. The thinking is None if absent or empty.

    A closing tag without an opening one ends the thinking, because the chat template may have opened it in the prompt.
    Raises TraceError if the thinking is never closed (the reply was truncated) or if the reply calls a tool.
    """
    if TOOL_CALL.search(reply):
        raise TraceError("reply: it calls a tool, but a student has no tools; leave the row out")
    rest = reply[_OPENING.match(reply).end() :]  # type: ignore[union-attr]
    thoughts = []
    while opened := OPENER.match(rest):
        closed = closer_of(opened[0]).search(rest, opened.end())
        if closed is None:
            raise TraceError(f"reply: {opened[0]} is never closed: the reply was truncated; leave the row out")
        thoughts.append(rest[opened.end() : closed.start()].strip())
        rest = rest[closed.end() :].lstrip().removeprefix(NEXT_MESSAGE)  # the next message may be thinking too
    if not thoughts and (bare := BARE_CHANNELS.match(rest)):
        thoughts += [thought.strip() for thought in NEXT_BARE_CHANNEL.split(bare[1])]
        rest = rest[bare.end() :]
    if not thoughts and (closed := LONE_CLOSER.search(rest)):
        thoughts.append(rest[: closed.start()].strip())
        rest = rest[closed.end() :]
    return "\n\n".join(filter(None, thoughts)) or None, _final_text(rest)


def opens_with_thinking(text: str) -> bool:
    """Whether a text starts with tagged thinking."""
    return OPENER.match(text, _OPENING.match(text).end()) is not None  # type: ignore[union-attr]


def _final_text(text: str) -> str:
    text = _FINAL.sub("", text, count=1) if "<|channel|>" in text else text
    text = text.strip()
    while end := next((end for end in _ENDS if text.endswith(end)), None):
        text = text.removesuffix(end).rstrip()
    if opened := ANSWER_OPENER.match(text):
        closed = closer_of(opened[0]).search(text, opened.end())
        text = text[opened.end() : closed.start() if closed else None].strip()
    return text
