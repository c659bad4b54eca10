"""What a chat completion holds, in whatever shape a server sends it: text, thinking, tokens, log-probs.

```python
reply = read_chat_reply({"choices": [{"message": {"content": "4", "reasoning": "Add."}, "finish_reason": "stop"}]})
reply.text, reply.thinking                                         # "4", "Add."
fault_of_finish("content_filter")                                  # why such a reply is no trace
```
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rbfast.data.conversations import ASSISTANT, parse_turns
from rbfast.data.replies import AT_LIMIT, FINISHED, split_reply
from rbfast.data.trace import TraceError

_LONGEST = 2**53  # tokens: what JSON holds exactly; a larger count is none


@dataclass(frozen=True)
class ChatReply:
    """A chat completion.

    Attributes:
        message: as it was sent.
        text: what was written after the thinking, or with it in tags.
        thinking: what was sent beside or before the text.
        fault: why the message is no solution, whatever it says.
        read, written, reasoned: tokens; None if the server does not say. `written` includes all that is billed.
        logprobs: per token its bytes and the (bytes, log-prob) of its candidates, bytes as Latin-1.
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
        """Whether tokens of thinking were counted, and none were sent."""
        return self.reasoned > 0 and not self.thinking and not thinks(self.text)


def read_chat_reply(reply: Mapping[str, Any]) -> ChatReply:
    """What a chat completion holds.

    Raises:
        ValueError: it is none: no choice or no message; or it holds half a surrogate pair, which no file can.
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
        fault or _said_error(choice),
        reason if isinstance(reason, str) else None,
        usage,
        read,
        written,
        reasoned,
        _logprobs(choice),
    )


def is_cut(reason: str | None) -> bool:
    """Whether the limit of tokens ended a reply."""
    return (reason or "").lower() in AT_LIMIT


def fault_of_finish(reason: str | None) -> str | None:
    """Why a reply that ended so is no trace (cut, filtered, aborted, a call of a tool), None if it is one."""
    said = (reason or "").lower()
    if not said or said in FINISHED:
        return None
    if is_cut(reason):
        return "the reply was cut at the limit of tokens; raise max_tokens"
    if said == "model_length":
        return "the reply was cut at the model's own limit (finish_reason 'model_length'); take a shorter problem"
    return f"the server ended the reply with finish_reason {reason!r}, expected 'stop'"


def thinks(text: str) -> bool:
    """Whether a text has its thinking in tags."""
    try:
        return split_reply(None, text).thought is not None
    except TraceError:
        return True


def _texts(message: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """The text, the thinking, and why there is none of both."""
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


def _said_error(choice: Mapping[str, Any]) -> str | None:
    error = choice.get("error")
    return f"the server ended the reply with an error: {json.dumps(error, default=str):.200}" if error else None


def _counts(usage: Mapping[str, Any]) -> tuple[int | None, int | None, int]:
    """Tokens read, written and thought. Some servers count thinking in the total only, or beside what was written."""
    read, written = (
        _count(usage.get(f"{name}_tokens", usage.get(f"{other}_tokens")))
        for name, other in (("prompt", "input"), ("completion", "output"))
    )
    total = _count(usage.get("total_tokens"))
    details = usage.get("completion_tokens_details", usage.get("output_tokens_details"))
    reasoned = _count(details.get("reasoning_tokens")) if isinstance(details, Mapping) else None
    reasoned = reasoned or _count(usage.get("reasoning_tokens")) or 0
    if written is not None and reasoned > written:
        written += reasoned
    if total is not None and read is None and written is not None:
        read = max(0, total - written)
    elif total is not None:
        written = max(written or 0, total - (read or 0))
    return read, written, reasoned


def _count(said: Any) -> int | None:
    said = int(said) if isinstance(said, float) and said.is_integer() else said
    return said if type(said) is int and 0 <= said < _LONGEST else None


def _logprobs(choice: Mapping[str, Any]) -> list[list[Any]]:
    """Those of the reply's tokens; none if they have another shape, for the text is paid for."""
    try:
        top = (choice.get("logprobs") or {}).get("content") or []
        return [[_latin(token), [[_latin(c), float(c["logprob"])] for c in _candidates(token)]] for token in top]
    except (LookupError, TypeError, AttributeError, ValueError):
        return []


def _candidates(token: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return token.get("top_logprobs") or []


def _latin(token: Mapping[str, Any]) -> str:
    """A token's bytes as JSON can hold them, a letter for each."""
    raw = token.get("bytes")
    return (bytes(raw) if raw is not None else token["token"].encode()).decode("latin-1")
