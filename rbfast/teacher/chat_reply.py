"""Parse a chat completion of any server: text, thinking, token counts, log-probs.

```python
reply = read_chat_reply({"choices": [{"message": {"content": "4", "reasoning": "Add."}, "finish_reason": "stop"}]})
reply.text, reply.thinking                                         # "4", "Add."
fault_of_finish("content_filter")                                  # why such a reply is not a trace
```
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rbfast.data.conversations import ASSISTANT, parse_turns
from rbfast.data.replies import AT_LIMIT, FINISHED, split_reply
from rbfast.data.trace import TraceError

_LONGEST = 2**53  # tokens; JSON cannot hold larger counts exactly, so they are ignored


@dataclass(frozen=True)
class ChatReply:
    """A chat completion.

    Attributes:
        message: as it was sent.
        text: the text, which may contain thinking in tags.
        thinking: the thinking that was sent separately.
        fault: why the message is not a solution; None if it may be one.
        read, written: token counts; None if the server does not report them. `written` includes all that is billed.
        reasoned: tokens of thinking; 0 if the server does not report them.
        logprobs: for each token its bytes and the (bytes, log-prob) of its candidates, bytes as Latin-1.
    """

    message: dict[str, Any]
    text: str
    thinking: str
    fault: str | None
    finish_reason: str | None
    usage: dict[str, Any]
    read: int | None
    written: int | None
    reasoned: int
    logprobs: list[list[Any]]

    @property
    def hides_thinking(self) -> bool:
        """Whether thinking tokens were counted but not sent."""
        return self.reasoned > 0 and not self.thinking and not has_tagged_thinking(self.text)


def read_chat_reply(reply: Mapping[str, Any]) -> ChatReply:
    """Parse a chat completion.

    Raises:
        ValueError: it has no choice or no message, or it contains a lone surrogate, which cannot be written to a file.
    """
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ValueError(f"expected choices with a message, got {json.dumps(reply, default=str):.200}")
    json.dumps(reply, ensure_ascii=False, default=str).encode()
    text, thinking, fault = _texts(message)
    reason = choice.get("finish_reason")
    usage = reply.get("usage")
    usage = dict(usage) if isinstance(usage, Mapping) else {}
    read, written, reasoned = _counts(usage)
    return ChatReply(
        dict(message),
        text,
        thinking,
        fault or _error_of(choice),
        reason if isinstance(reason, str) else None,
        usage,
        read,
        written,
        reasoned,
        _logprobs(choice),
    )


def is_cut(reason: str | None) -> bool:
    """Whether a finish reason says that the token limit cut the reply."""
    return (reason or "").lower() in AT_LIMIT


def fault_of_finish(reason: str | None) -> str | None:
    """Why a reply with this finish reason is not a trace (cut, filtered, aborted, a tool call); None if it may be."""
    lowered = (reason or "").lower()
    if not lowered or lowered in FINISHED:
        return None
    if is_cut(reason):
        return "the reply was cut at the token limit; raise max_tokens, or the server's context if that is shorter"
    if lowered == "model_length":
        return "the reply was cut at the model's own limit (finish_reason 'model_length'); take a shorter problem"
    return f"the server ended the reply with finish_reason {reason!r}, expected 'stop'"


def has_tagged_thinking(text: str) -> bool:
    """Whether a text contains thinking in tags."""
    try:
        return split_reply(None, text).thought is not None
    except TraceError:
        return True


def _texts(message: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """(text, thinking, why the message has neither)."""
    blocks = message.get("content")
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, Mapping) and isinstance(block.get("refusal"), str):
            return "", "", f"the teacher refused: {block['refusal']:.200}"
    try:
        turns = parse_turns([{**message, "role": ASSISTANT}])
    except TraceError as error:
        return "", "", str(error)
    turn = turns[0] if turns else None
    text, thinking = (turn.text, turn.thought or "") if turn else ("", "")
    refusal = message.get("refusal")
    if not text and isinstance(refusal, str) and refusal:
        return "", thinking, f"the teacher refused: {refusal:.200}"
    return text, thinking, None


def _error_of(choice: Mapping[str, Any]) -> str | None:
    error = choice.get("error")
    return f"the server ended the reply with an error: {json.dumps(error, default=str):.200}" if error else None


def _counts(usage: Mapping[str, Any]) -> tuple[int | None, int | None, int]:
    """Tokens read, written and reasoned. Some servers count thinking only in the total, or not within `written`."""
    read, written = (
        count_of(usage.get(f"{name}_tokens", usage.get(f"{other}_tokens")))
        for name, other in (("prompt", "input"), ("completion", "output"))
    )
    total = count_of(usage.get("total_tokens"))
    details = usage.get("completion_tokens_details", usage.get("output_tokens_details"))
    reasoned = count_of(details.get("reasoning_tokens")) if isinstance(details, Mapping) else None
    reasoned = reasoned or count_of(usage.get("reasoning_tokens")) or 0
    if written is not None and reasoned > written:
        written += reasoned
    if total is not None and read is None and written is not None:
        read = max(0, total - written)
    elif total is not None:
        written = max(written or 0, total - (read or 0))
    return read, written, reasoned


def count_of(value: Any) -> int | None:
    """A number of tokens as a server reports it; None if it is not a count."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if type(value) is int and 0 <= value < _LONGEST else None


def _logprobs(choice: Mapping[str, Any]) -> list[list[Any]]:
    """The log-probs of the reply's tokens; empty if their format is unknown: the text is paid for."""
    try:
        top = (choice.get("logprobs") or {}).get("content") or []
        return [
            [_latin(token), [[_latin(c), float(c["logprob"])] for c in token.get("top_logprobs") or []]]
            for token in top
        ]
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        return []


def _latin(token: Mapping[str, Any]) -> str:
    """A token's bytes as Latin-1, which JSON can hold."""
    raw = token.get("bytes")
    return (bytes([*raw]) if raw is not None else token["token"].encode()).decode("latin-1")
