"""Guided inference over an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...).

```python
server = Server("http://localhost:8000/v1", "my-model")          # the key, if any, from RBFAST_API_KEY
prompt = prompt_for(problem, tokenizer)                          # the served model's own chat template
solution = solve(server, prompt, guide)                          # completions: interventions, probes, budget
solution = chat(server, problem, guide)                          # chat only: the budget is asked for, and checked
votes = solve_many(server, problem, prompt, guide, samples=16)   # whichever it has; stops when the vote is decided
```

A completion is streamed and read by the same `Row` as in a batch. An order closes the stream; the next request goes on
from what is left of the text, which the server's prefix cache has read already.
"""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rbfast.data.encoding import INSTRUCTION, format_prompt
from rbfast.grading.grade import answer_key, without_tags
from rbfast.inference.guide import Event, Guide, Order, Phase, Row, calibrated
from rbfast.inference.vote import decided
from rbfast.teacher.client import LONGEST_PAUSE, Server, ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CANDIDATES = 5  # log-probs a token: what every server gives
_NO_COMPLETIONS = (404, 405, 501)
_MALFORMED = (LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class ServerSolution:
    """What a server wrote: the text, its cost in tokens as far as the server says it, the interventions.

    Attributes:
        truncated: the budget cut the answer.
        probe_tokens: of `tokens`, those thrown away after probes.
        abandoned: the vote was decided before this sample ended.
        sentences: nats; the entropy's moving average at each end of a sentence of thinking, where it was measured.
    """

    text: str
    thinking: str
    answer: str
    tokens: int
    truncated: bool
    events: tuple[Event, ...] = ()
    probe_tokens: int = 0
    abandoned: bool = False
    sentences: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A record for `json.dumps`; `thinking` and `answer` without their tags, which `text` keeps."""
        return asdict(self) | {"thinking": without_tags(self.thinking), "answer": without_tags(self.answer)}


def prompt_for(problem: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`format_prompt` without the token that begins a text, where a server that reads text puts it in itself."""
    prompt, begin = format_prompt(problem, tokenizer), tokenizer.bos_token
    adds_it = begin is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return prompt.removeprefix(str(begin)) if adds_it else prompt


def solve(
    server: Server,
    prompt: str,
    guide: Guide,
    *,
    count: Callable[[str], int] | None = None,
    listen: Callable[[str, str], None] | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> ServerSolution:
    """A guided completion of `prompt`, which carries the model's own special tokens.

    Args:
        count: tokens of a text, by the model's tokenizer. Without it a streamed piece counts as one token where the
            server does not say how many it is, and what is put in as one token a byte, which is never too few.
        listen: called with (kind, text) for each piece: `think`, `answer` or the kind of an intervention.
        abandoned: asked at each piece; once it is true, the rest is not written.

    Raises:
        ServerError: no answer after all retries, more tokens than were asked for, or no log-probs where the guide's
            `verify_above` needs them; `partial` holds what there is.
    """
    row = Row(guide, count or (lambda text: len(text.encode())), end_cost=0)
    hear = listen or (lambda kind, text: None)
    order, failures = row.start(), 0
    while True:
        if order and order.text:
            hear(order.kind, order.text)
        if row.phase is Phase.DONE or abandoned():
            return _solution(row)
        before = row.spent
        try:
            if row.wants_probe:
                order = _probe(server, prompt + row.thinking, row)
            else:
                order = _one_stream(server, prompt + row.thinking + row.answer, row, count, hear, abandoned)
        except ServerError as error:
            raise ServerError(str(error), error.status, _solution(row)) from error
        except (OSError, http.client.HTTPException) as error:
            order, failures = None, 0 if row.spent > before else failures + 1
            if failures > server.retries:
                reason = f"{server.url} broke off {failures} times: {type(error).__name__}: {error}"
                raise ServerError(reason, partial=_solution(row)) from error
            time.sleep(min(LONGEST_PAUSE, server.pause * 2**failures))


def _solution(row: Row) -> ServerSolution:
    return ServerSolution(
        text=row.thinking + row.answer,
        thinking=row.thinking,
        answer=row.answer,
        tokens=row.spent,
        truncated=not row.finished,
        events=tuple(row.events),
        probe_tokens=row.probed_tokens,
        abandoned=row.phase is not Phase.DONE,
        sentences=tuple(row.sentences),
    )


def _one_stream(
    server: Server,
    text: str,
    row: Row,
    count: Callable[[str], int] | None,
    hear: Callable[[str, str], None],
    abandoned: Callable[[], bool],
) -> Order | None:
    """Lets the model write until an order, a probe, or the end of what was asked for."""
    allowed, before, said, reason = row.left, row.spent, 0, None
    measures, measured = row.guide.verify_above is not None, False
    body = {"prompt": text, "max_tokens": allowed, "stream": True, "stream_options": {"include_usage": True}}
    if measures:
        body["logprobs"] = _CANDIDATES
    with closing(server.post("/completions", body)) as response:
        for piece in _pieces(server, response):
            reason = piece.reason or reason
            # A piece is one token at least; a count that the server gives is the truth, one by `count` is not.
            said = max(said + (piece.tokens or bool(piece.text)), piece.total)
            _check(server, allowed, said)
            if not piece.text and not piece.tokens:
                continue
            measured = measured or piece.entropy is not None
            if measures and not measured:
                raise ServerError(f"{server.url} sends no log-probs, and verify_above needs them: leave it out")
            tokens = piece.tokens or max(1, count(piece.text) if count else 1)
            phase = row.phase.value
            order = row.write(piece.text, min(tokens, row.left), piece.entropy)
            hear(phase, piece.text)
            if order or row.phase is Phase.DONE or row.wants_probe or abandoned():
                return order
    if reason is None:
        raise http.client.IncompleteRead(b"")
    if reason != "length":
        return row.write("", max(0, said - (row.spent - before)), ended=True)
    # Fewer pieces than tokens: pieces of several tokens. What was asked for is used up, and no more than that.
    rest = allowed - (row.spent - before)
    return row.write("", rest) if rest else None


class _Piece(NamedTuple):
    """What came at a time.

    Attributes:
        tokens: in `text`; 0 where the server does not say.
        total: tokens so far; 0 where the server does not say.
        entropy: nats, the mean over its tokens.
    """

    text: str
    tokens: int
    total: int
    entropy: float | None
    reason: str | None


def _pieces(server: Server, response: http.client.HTTPResponse) -> Iterator[_Piece]:
    for chunk in server.events(response):
        try:
            choice = (chunk.get("choices") or [{}])[0]
            candidates = _candidates(choice.get("logprobs") or {})
            entropies = [_entropy(logprobs) for logprobs in candidates if logprobs]
            yield _Piece(
                text=choice.get("text") or "",
                tokens=len(candidates),
                total=(chunk.get("usage") or {}).get("completion_tokens") or 0,
                entropy=sum(entropies) / len(entropies) if entropies else None,
                reason=choice.get("finish_reason"),
            )
        except _MALFORMED as error:
            raise ServerError(f"{server.url} sent no completion: {type(error).__name__}: {error}") from error


def _candidates(said: dict[str, Any]) -> list[Sequence[float]]:
    """The best log-probs at each token, in the shape of OpenAI's completions or of its chat (llama.cpp)."""
    if "content" in said:
        return [[other["logprob"] for other in token.get("top_logprobs", [])] for token in said["content"]]
    tokens = said.get("tokens") or []
    tops = said.get("top_logprobs") or [None] * len(tokens)
    return [list((top or {}).values()) for top in tops]


def _entropy(logprobs: Sequence[float]) -> float:
    """Nats of a distribution whose best log-probs are these, all the rest as one token: at most the true entropy."""
    chances = [math.exp(value) for value in logprobs]
    chances.append(1.0 - sum(chances))
    return -sum(chance * math.log(chance) for chance in chances if chance > 0.0)


def _check(server: Server, allowed: int, written: int) -> None:
    if written > allowed:
        raise ServerError(f"{server.url} ignores max_tokens: at most {allowed} were asked for, {written} came")


def _probe(server: Server, text: str, row: Row) -> Order | None:
    """Has the model give its answer now, and throws it away."""
    limit, finish, put = row.guide.probe_tokens, row.guide.finish, row.probe_text
    body = {"prompt": text + put, "max_tokens": limit, "temperature": 0.0, "stop": [finish] if finish else None}
    reply = server.ask("/completions", body)
    try:
        answer = str(reply["choices"][0]["text"])
        written = (reply.get("usage") or {}).get("completion_tokens")
    except _MALFORMED as error:
        raise ServerError(f"{server.url} sent no completion: {type(error).__name__}: {error}") from error
    _check(server, limit, written or 0)
    return row.probed(answer, row.count(put) + (limit if written is None else written))


def chat(server: Server, problem: str, guide: Guide) -> ServerSolution:
    """An answer by a server that only chats: nothing can be put in, so the budget is asked for and checked.

    Raises:
        ServerError: no answer after all retries, a reply that is none, no token count, or one above the budget.
    """
    body = {
        "messages": [{"role": "user", "content": f"{problem}\n\n{INSTRUCTION}"}],
        "max_tokens": guide.budget,
        "stream": False,
    }
    reply = server.ask("/chat/completions", body)
    try:
        choice = reply["choices"][0]
        answer = choice["message"].get("content") or ""
        thinking = choice["message"].get("reasoning_content") or ""
    except _MALFORMED as error:
        raise ServerError(f"{server.url} sent no chat completion: {type(error).__name__}: {error}") from error
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    solution = ServerSolution(thinking + answer, thinking, answer, tokens or 0, choice.get("finish_reason") == "length")
    if tokens is None or tokens > guide.budget:
        raise ServerError(
            f"{server.url} did not honour the budget: at most {guide.budget} tokens were asked for, it says "
            f"{'nothing of how many' if tokens is None else tokens} it wrote",
            partial=solution,
        )
    return solution


def solve_or_chat(server: Server, problem: str, prompt: str, guide: Guide, **options: Any) -> ServerSolution:
    """`solve`, or `chat` where the server has no completions (404, 405, 501)."""
    try:
        return solve(server, prompt, guide, **options)
    except ServerError as error:
        if error.status not in _NO_COMPLETIONS:
            raise
        return chat(server, problem, guide)


def solve_many(
    server: Server,
    problem: str,
    prompt: str,
    guide: Guide,
    *,
    samples: int = 1,
    concurrency: int = 8,
    early_stop: bool = True,
    **options: Any,
) -> list[ServerSolution]:
    """`samples` solutions by `solve_or_chat`, whose answers vote (see `vote`); a seed each, from the server's on.

    Args:
        concurrency: requests at a time.
        early_stop: abandon the samples that can no longer change the majority.
        options: of `solve`.

    Raises:
        ValueError: numbers out of range, or several samples at temperature 0.
        ServerError: one sample met it; `partial` is the list of what all of them had written.
    """
    if samples < 1 or concurrency < 1:
        raise ValueError(f"samples and concurrency must be at least 1, got {samples} and {concurrency}")
    if samples > 1 and server.temperature == 0:
        raise ValueError("several samples of one prompt need a temperature above 0: greedy ones are all the same")
    over, lock = threading.Event(), threading.Lock()
    answers: list[str | None] = []

    def one(copy: int) -> ServerSolution:
        seeded = replace(server, seed=None if server.seed is None else server.seed + copy)
        solution = solve_or_chat(seeded, problem, prompt, guide, abandoned=over.is_set, **options)
        with lock:  # here, not where they are waited for: the next sample in the queue begins at once
            answers.append(answer_key(solution.text))
            if early_stop and decided(answers, samples - len(answers)):
                over.set()
        return solution

    with ThreadPoolExecutor(min(samples, concurrency)) as pool:
        futures = [pool.submit(one, copy) for copy in range(samples)]
        try:
            for future in as_completed(futures):
                future.result()
        except ServerError as error:
            over.set()
            raise ServerError(str(error), error.status, list(filter(None, map(_outcome, futures)))) from error
        finally:
            over.set()  # an interrupt too ends the samples that are under way
    return [future.result() for future in futures]


def _outcome(future: Future[ServerSolution]) -> ServerSolution | None:
    """What there is of a sample, whether it succeeded or not."""
    error = future.exception()
    return error.partial if isinstance(error, ServerError) else None if error else future.result()


def calibrate(server: Server, prompts: Sequence[str], guide: Guide, *, quantile: float = 0.9, **options: Any) -> float:
    """As `rbfast.inference.local.calibrate`, by what the server says of its best five candidates at each token.

    Raises:
        ValueError: a quantile outside (0, 1), or no sentence end in what the model wrote.
        ServerError: as `solve`.
    """

    def sentences(plain: Guide) -> list[float]:
        return [end for prompt in prompts for end in solve(server, prompt, plain, **options).sentences]

    return calibrated(guide, quantile, sentences)
