"""How a server scores a prompt: the candidates for each of its tokens, in three dialects.

- "vllm": completions with `prompt_logprobs`
- "sglang": SGLang's own `/generate`, beside `/v1`, with `return_logprob`
- "echo": completions that repeat the prompt with `logprobs`, as OpenAI's

```python
scorer = PromptScorer(Server("http://localhost:8000/v1", "my-model"), k=20, dialect="vllm")
for candidates in scorer.by_ids([1, 2, 3]):
    ...
```
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rbfast.teacher.align import Piece
from rbfast.teacher.client import NO_SUCH_PATH, Server, ServerError
from rbfast.utils.records import show

Dialect = Literal["vllm", "sglang", "echo"]
DIALECTS: tuple[Dialect, ...] = ("vllm", "sglang", "echo")
BY_IDS: tuple[Dialect, ...] = ("vllm", "sglang")  # those that take token ids

_Entry = Sequence[Any]  # SGLang's [log-prob, id, text]; the text may be null, and the log-prob is null for -inf


class Candidate(NamedTuple):
    """A token that may stand at a place in a prompt. text: None if the server does not show it."""

    id: int
    text: str | None
    logprob: float


class PromptScorer:
    """Requests the best `k` candidates for each token of a prompt. The first token has none; the others may have the
    token itself as one more.

    The methods raise ServerError for a refusal or a reply without log-probs, and LookupError, TypeError,
    AttributeError or ValueError for log-probs in an unknown format.
    """

    def __init__(self, server: Server, k: int, dialect: Dialect) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")
        self.server, self.k, self.dialect = server, k, dialect
        self._has_shown_texts = False

    def by_ids(self, ids: Sequence[int]) -> list[list[Candidate]]:
        """The candidates of each token of a prompt given by its ids.

        In dialect "sglang" only the first prompts get texts, because SGLang decodes each candidate on its own.
        """
        if self.dialect == "vllm":
            body = {"prompt": ids, "prompt_logprobs": self.k, "add_special_tokens": False}
            return [_vllm_candidates(top) for top in self._ask_completions(body, "prompt_logprobs")["prompt_logprobs"]]
        scored = self._ask_sglang({"input_ids": ids}, has_texts=not self._has_shown_texts)
        self._has_shown_texts = True
        return [_sglang_candidates(own, top) for own, top in scored]

    def by_text(self, text: str) -> list[Piece]:
        """The tokens that the server's tokenizer cuts a prompt into, with their candidates."""
        if self.dialect == "vllm":
            body = {"prompt": text, "prompt_logprobs": self.k, "return_token_ids": True}
            return list(_vllm_pieces(self._ask_completions(body, "prompt_logprobs")))
        if self.dialect == "sglang":
            return [_sglang_piece(own, top) for own, top in self._ask_sglang({"text": text}, has_texts=True)]
        choice = self._ask_completions({"prompt": text, "echo": True, "logprobs": self.k}, "logprobs")
        return list(_echo_pieces(choice["logprobs"]))[: choice["prompt_tokens"]]

    def _ask_completions(self, body: dict[str, Any], wanted: str) -> dict[str, Any]:
        # `max_tokens` is 1, because some servers refuse 0. So the last token that "echo" returns is not the prompt's.
        reply = self.server.ask("/completions", {"max_tokens": 1} | body)
        choice = (reply.get("choices") or [{}])[0]
        # vLLM puts them into the choice, or beside the choices.
        logprobs = self._require(choice.get(wanted) or reply.get(wanted), wanted)
        counted = (reply.get("usage") or {}).get("prompt_tokens", -1)
        return choice | {wanted: logprobs, "prompt_tokens": counted}

    def _ask_sglang(self, prompt: dict[str, Any], has_texts: bool) -> list[tuple[_Entry, list[_Entry] | None]]:
        """For each token of a prompt its own entry and those of its candidates."""
        body = {
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": self.k,
            "return_text_in_logprobs": has_texts,
        }
        try:
            found = self.server.ask("/../generate", prompt | body).get("meta_info") or {}
        except ServerError as error:
            if error.status not in NO_SUCH_PATH:
                raise
            hint = f"dialect 'sglang' needs SGLang's own /generate; dialects: {', '.join(DIALECTS)}"
            raise ServerError(f"{error}; {hint}", error.status) from error
        tops = self._require(found.get("input_top_logprobs"), "input_top_logprobs")
        return list(zip(found["input_token_logprobs"], tops, strict=True))

    def _require(self, logprobs: Any, name: str) -> Any:
        if not logprobs:
            raise ServerError(
                f"{self.server.url} sends no {name}: it does not score prompts as dialect {self.dialect!r} asks; "
                f"dialects: {', '.join(DIALECTS)}"
            )
        return logprobs


def _vllm_candidates(top: Mapping[str, Any] | None) -> list[Candidate]:
    if not all(number.isdecimal() for number in top or ()):
        raise TypeError(f"expected token ids, got {show(next(n for n in top or () if not n.isdecimal()))}")
    return [Candidate(int(n), entry.get("decoded_token"), entry["logprob"]) for n, entry in (top or {}).items()]


def _vllm_pieces(choice: Mapping[str, Any]) -> Iterator[Piece]:
    numbers = choice.get("prompt_token_ids") or [None] * len(choice["prompt_logprobs"])
    for number, top in zip(numbers, choice["prompt_logprobs"], strict=True):
        # The first token has no candidates. In the others, the actual token is listed first.
        if top is None:
            yield Piece(b"", [])
            continue
        written = top[str(number)] if number is not None else next(iter(top.values()))
        yield Piece(
            str(written["decoded_token"]).encode(),
            [(str(entry["decoded_token"]).encode(), entry["logprob"]) for entry in top.values()],
        )


def _sglang_candidates(own: _Entry, top: Sequence[_Entry] | None) -> list[Candidate]:
    if not top:  # the first token
        return []
    others = [entry for entry in top if entry[1] != own[1]]
    return [Candidate(id, text, -math.inf if value is None else value) for value, id, text in (own, *others)]


def _sglang_piece(own: _Entry, top: Sequence[_Entry] | None) -> Piece:
    return Piece(own[2].encode(), [(str(one.text).encode(), one.logprob) for one in _sglang_candidates(own, top)])


def _echo_pieces(logprobs: Mapping[str, Any]) -> Iterator[Piece]:
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        yield Piece(token.encode(), [(other.encode(), value) for other, value in (top or {}).items()])
