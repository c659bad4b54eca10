"""Guided inference over an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...).

```python
server = Server("http://localhost:8000/v1", "my-model")          # the key, if any, from RBFAST_API_KEY
solver = ServerSolver(server, tokenizer)                         # the tokenizer of the served model
guide = Guide(Limits(1024), solver.phrases())
[samples] = solver.solve([problem], guide, Sampling(16, temperature=0.8))    # stops when the vote is decided
solution = write(server, prompt, guide)                          # /completions: interventions, probes, budget
solution = chat(server, problem, guide)                          # /chat/completions: only the budget is checked
```

A completion is streamed into the same `GuideState` that guides a local batch. An order closes the stream. The next
request continues from the remaining text, which the server has in its prefix cache.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

from rbfast.data.chat_template import default_instruction, format_prompt
from rbfast.data.instruction import ANSWER, Instruction
from rbfast.data.thinking_marks import THINKING
from rbfast.inference.guide import Guide, Phrases
from rbfast.inference.solver import GREEDY, Interrupted, Listener, Sampling, Solution, check_texts
from rbfast.inference.state import GuideState, Order, Phase
from rbfast.inference.vote import decided
from rbfast.teacher.chat_reply import ChatReply, count_of, fault_of_finish, is_cut, read_chat_reply
from rbfast.teacher.client import NO_SUCH_PATH, REFUSED, IncompleteReply, Server, ServerError, pause_after
from rbfast.teacher.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CANDIDATES = 5  # log-probs per token; every server supports this many
_MOST_FAILURES = 8  # in a row, refused problems aside: then the server is at fault
_MALFORMED = (LookupError, TypeError, AttributeError)


def prompt_for(
    problem: str,
    tokenizer: PreTrainedTokenizerBase,
    instruction: Instruction | None = None,
    system: str | None = None,
) -> str:
    """`format_prompt` without the BOS token, if the server's tokenizer adds it."""
    prompt, begin = format_prompt(problem, tokenizer, instruction, system=system), tokenizer.bos_token
    adds_it = begin is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return prompt.removeprefix(str(begin)) if adds_it else prompt


def write(
    server: Server,
    prompt: str,
    guide: Guide,
    *,
    count: Callable[[str], int] | None = None,
    listen: Callable[[str, str], None] | None = None,
    abandoned: Callable[[], bool] = lambda: False,
    keep_special: bool = False,
) -> Solution:
    """A guided completion of `prompt`, which contains the model's own special tokens.

    Args:
        count: counts the tokens of a text. Without it, an inserted text counts as one token per byte, an upper bound,
            and a streamed piece as one token if the server does not report its count.
        listen: called with (kind, text) for each piece: `think`, `answer` or the kind of an intervention.
        abandoned: called at each piece; the completion stops once it returns True.
        keep_special: request text with its special tokens (`skip_special_tokens: false` of vLLM and SGLang), for a
            model whose thinking ends with one.

    Raises:
        ServerError: no answer after all retries, a text that the server ended (a filter, an abort), more tokens than
            requested, or no log-probs although the guide's `verify_above` needs them. `partial` has the solution so
            far.
    """
    state = GuideState(guide, count or (lambda text: len(text.encode())), end_cost=0)
    report = listen or (lambda kind, text: None)
    order, failures = state.start(), 0
    while True:
        if order and order.text:
            report(order.kind, order.text)
        if state.phase is Phase.DONE or abandoned():
            return Solution.of(state)
        before = state.spent
        try:
            if state.wants_probe:
                order = _probe(server, prompt + state.thinking, state)
            else:
                text = prompt + state.thinking + state.answer
                order = _one_stream(server, text, state, count, report, abandoned, keep_special)
        except ServerError as error:
            raise ServerError(str(error), error.status, Solution.of(state)) from error
        except IncompleteReply as error:
            order, failures = None, 0 if state.spent > before else failures + 1
            if failures > server.retries:
                reason = f"{server.url} broke off {failures} times: {error}"
                raise ServerError(reason, partial=Solution.of(state)) from error
            time.sleep(pause_after(failures))


def _one_stream(
    server: Server,
    text: str,
    state: GuideState,
    count: Callable[[str], int] | None,
    report: Callable[[str, str], None],
    abandoned: Callable[[], bool],
    keep_special: bool,
) -> Order | None:
    """Stream text until an order, a probe, or the end of the requested tokens."""
    allowed, before, written, reported, reason = state.left, state.spent, 0, 0, None
    measures, measured = state.limits.verify_above is not None, False
    body = {"prompt": text, "max_tokens": allowed, "stream": True, "stream_options": {"include_usage": True}}
    if keep_special:
        body["skip_special_tokens"] = False
    if measures:
        body["logprobs"] = _CANDIDATES
    with closing(server.stream("/completions", body)) as events:
        for piece in _pieces(server, events):
            reason = piece.reason or reason
            # A piece is at least one token. Only counts that the server reports are checked; `count` is an estimate.
            reported = max(reported, piece.total)
            written = max(written + (piece.tokens or bool(piece.text)), reported)
            _check(server, allowed, written)
            if not piece.text and not piece.tokens:
                continue
            measured = measured or piece.entropy is not None
            if measures and not measured:
                raise ServerError(f"{server.url} sends no log-probs, which verify_above needs: leave it out")
            tokens = piece.tokens or max(1, count(piece.text) if count else 1)
            phase = state.phase.value
            order = state.write(piece.text, min(tokens, state.left), piece.entropy)
            report(phase, piece.text)
            if order or state.phase is Phase.DONE or state.wants_probe or abandoned():
                return order
    if reason is None:
        raise IncompleteReply("the stream ended without a finish_reason")
    if not is_cut(reason):
        if fault := fault_of_finish(reason):
            raise ServerError(f"{server.url}: {fault}")
        return state.write("", max(0, written - (state.spent - before)), ended=True)
    # Without a count, all requested tokens are used up, even if there were fewer pieces. A server whose context is full
    # (llama.cpp) reports fewer.
    rest = (reported or allowed) - (state.spent - before)
    return state.write("", rest) if rest > 0 else None


class _Piece(NamedTuple):
    """One streamed piece.

    Attributes:
        tokens: the tokens in `text`; 0 if the server does not report them.
        total: the tokens so far; 0 if the server does not report them.
        entropy: nats, the mean over its tokens.
    """

    text: str
    tokens: int
    total: int
    entropy: float | None
    reason: str | None


def _pieces(server: Server, events: Iterator[dict[str, Any]]) -> Iterator[_Piece]:
    for chunk in events:
        try:
            choice = (chunk.get("choices") or [{}])[0]
            candidates = _candidates(choice.get("logprobs") or {})
            entropies = [_entropy(logprobs) for logprobs in candidates if logprobs]
            text, reason = choice.get("text") or "", choice.get("finish_reason") or None
            if not isinstance(text, str) or not isinstance(reason, str | None):
                raise TypeError(f"expected text and finish_reason as strings, got {text!r:.40} and {reason!r:.40}")
            yield _Piece(
                text=text,
                tokens=len(candidates),
                total=count_of((chunk.get("usage") or {}).get("completion_tokens")) or 0,
                entropy=sum(entropies) / len(entropies) if entropies else None,
                reason=reason,
            )
        except _MALFORMED as error:
            raise ServerError(f"{server.url} sent no completion: {type(error).__name__}: {error}") from error


def _candidates(logprobs: dict[str, Any]) -> list[Sequence[float]]:
    """The top log-probs at each token, in the format of OpenAI's completions or of its chat API (llama.cpp)."""
    if "content" in logprobs:
        return [[top["logprob"] for top in token.get("top_logprobs", [])] for token in logprobs["content"]]
    tokens = logprobs.get("tokens") or []
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return [list((top or {}).values()) for top in tops]


def _entropy(logprobs: Sequence[float]) -> float:
    """The entropy [nats] of the top log-probs, with the rest as one token: a lower bound."""
    chances = [math.exp(min(value, 0.0)) for value in logprobs]
    chances.append(1.0 - sum(chances))
    return -sum(chance * math.log(chance) for chance in chances if chance > 0.0)


def _check(server: Server, allowed: int, written: int) -> None:
    if written > allowed:
        raise ServerError(f"{server.url} ignores max_tokens: requested at most {allowed}, got {written}")


def _probe(server: Server, text: str, state: GuideState) -> Order | None:
    """Request the answer now, hand it to the state, and discard it."""
    limit, finish, probe = state.limits.probe_tokens, state.phrases.finish, state.probe_text
    body = {"prompt": text + probe, "max_tokens": limit, "temperature": 0.0, "stop": [finish] if finish else None}
    reply = server.ask("/completions", body)
    try:
        answer = str(reply["choices"][0]["text"])
        written = count_of((reply.get("usage") or {}).get("completion_tokens"))
    except _MALFORMED as error:
        raise ServerError(f"{server.url} sent no completion: {type(error).__name__}: {error}") from error
    _check(server, limit, written or 0)
    return state.probed(answer, state.count(probe) + (limit if written is None else written))


def chat(server: Server, problem: str, guide: Guide, instruction: Instruction = ANSWER) -> Solution:
    """A solution from a server with only a chat API: nothing can be inserted, so the budget is requested and checked.

    Raises:
        ServerError: no answer after all retries, a malformed reply, a refusal, a reply that the server ended (a filter,
            an abort), no token count, or a count above the budget.
    """
    body = {
        "messages": [
            *([{"role": "system", "content": instruction.system}] if instruction.system else []),
            {"role": "user", "content": instruction.request(problem)},
        ],
        "max_tokens": guide.limits.budget,
        "stream": False,
    }
    answer = server.ask("/chat/completions", body)
    try:
        reply = read_chat_reply(answer)
    except ValueError as error:
        raise ServerError(f"{server.url} sent no chat completion: {error}") from error
    tokens, thinking, cut = reply.written, _marked_thinking(reply), is_cut(reply.finish_reason)
    solution = Solution(thinking + reply.text, thinking, reply.text, tokens or 0, cut)
    if not cut and (fault := reply.fault or fault_of_finish(reply.finish_reason)):
        raise ServerError(f"{server.url}: {fault}", partial=solution)
    if tokens is None or tokens > guide.limits.budget:
        raise ServerError(
            f"{server.url} did not honour the budget: requested at most {guide.limits.budget} tokens, it reports "
            f"{'no count' if tokens is None else tokens}",
            partial=solution,
        )
    return solution


def _marked_thinking(reply: ChatReply) -> str:
    """The separate thinking of a reply, put in thinking tags so that nothing in it is taken for the answer."""
    if not reply.thinking:
        return ""
    opener, closer, _ = THINKING[0]
    is_open = is_cut(reply.finish_reason) and not reply.text
    return f"{opener}\n{reply.thinking}\n" + ("" if is_open else f"{closer}\n\n")


class _Asked(NamedTuple):
    """A problem, its own system prompt if it has one, and the seed of its first sample."""

    problem: str
    system: str | None
    seed: int


@dataclass(frozen=True)
class ServerSolver:
    """A served model as a `Solver`.

    Args:
        tokenizer: of the served model, for its chat template and to count tokens. Without it, the prompt is plain text,
            and an inserted text counts as one token per byte; if there is nothing for a guide to insert or measure, the
            chat API is used instead.
        concurrency: the most requests at a time.
        instruction: what follows a problem; None: the tokenizer's default, or `ANSWER` without a tokenizer.

    Raises:
        ValueError: a concurrency below 1.
    """

    server: Server
    tokenizer: PreTrainedTokenizerBase | None = None
    concurrency: int = 8
    instruction: Instruction | None = None

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {self.concurrency}")

    def phrases(self) -> Phrases:
        """The markers of this model."""
        from rbfast.inference.tokens import phrases_for

        return phrases_for(self.tokenizer, self.instruction)

    @property
    def _used_instruction(self) -> Instruction:
        if self.instruction is not None or self.tokenizer is None:
            return self.instruction or ANSWER
        return default_instruction(self.tokenizer)

    def solve(
        self, problems: Sequence[str], guide: Guide, sampling: Sampling = GREEDY, *, listen: Listener | None = None
    ) -> list[list[Solution]]:
        """The samples of every problem; see `Solver`. Raises as `solve_each` does."""
        solved = dict(self.solve_each(problems, guide, sampling, listen=listen))
        return [solved[i] for i in range(len(problems))]

    def solve_each(
        self,
        problems: Sequence[str],
        guide: Guide,
        sampling: Sampling = GREEDY,
        *,
        systems: Sequence[str | None] | None = None,
        listen: Listener | None = None,
    ) -> Iterator[tuple[int, list[Solution]]]:
        """Yields the index of a problem and its samples, as soon as all of them are written.

        Sample i has the seed `seed + i`, within 31 bits. The chat API is used if the server has no completions (404,
        405, 501), without guidance and with a warning, or if there is neither a tokenizer nor anything for a guide to
        insert or measure.

        Args:
            systems: the system prompt of each problem; None for the instruction's.
            listen: as in `Solver.solve`.

        Raises:
            ServerError: a sample failed; `partial` lists the solutions so far of all samples of its problem. It is
                raised after the other problems are solved, or once eight in a row have failed for another reason than
                a refusal (400, 413, 422).
            Interrupted: after Ctrl-C, once the replies under way have arrived and the problems that they complete were
                yielded, or at a second Ctrl-C. Streams are closed at once.
        """
        check_texts(problems, sampling)
        seeds = sampling.seed if isinstance(sampling.seed, Sequence) else [sampling.seed] * len(problems)
        asked = list(starmap(_Asked, zip(problems, systems or [None] * len(problems), seeds, strict=True)))
        votes = [_RunningVote(sampling.samples, sampling.early_stop) for _ in problems]
        stop = threading.Event()

        def is_abandoned(i: int) -> bool:
            return stop.is_set() or votes[i].over.is_set()

        def sample(key: tuple[int, int]) -> Solution:
            i, number = key
            server = self._server_for(sampling, asked[i].seed + number)
            heard = partial(listen, i) if listen else None
            solution = self._solve_sample(asked[i], guide, server, heard, partial(is_abandoned, i))
            votes[i].take(solution.key)  # in this thread, before it starts the next sample in the queue
            return solution

        keys = [(i, number) for i in range(len(problems)) for number in range(sampling.samples)]
        samples = _EndedSamples(problems, sampling.samples)
        try:
            with closing(Workers(sample, keys, self.concurrency).ended(self.server.retried, stop)) as ended:
                for (i, number), job in ended:
                    if not job.exception() and job.result().abandoned and not votes[i].over.is_set():
                        continue  # by `stop`: it is not written
                    samples.add(i, number, job)
                    if i in samples.errors:
                        votes[i].over.set()
                    if samples.are_written(i):
                        yield i, samples.solutions(i)
                    if samples.failures == _MOST_FAILURES:
                        stop.set()
        except KeyboardInterrupt:
            raise Interrupted([samples.solutions(i) for i in range(len(problems))]) from None
        samples.raise_errors()

    def _solve_sample(
        self,
        asked: _Asked,
        guide: Guide,
        server: Server,
        listen: Callable[[str, str], None] | None,
        abandoned: Callable[[], bool],
    ) -> Solution:
        only_text = guide.passive and guide.limits.verify_above is None
        if self.tokenizer is None and only_text and not abandoned():
            return self._chat(asked, guide, server, listen)
        try:
            prompt, count = self._prompt(asked), self._count(guide)
            special = self._closes_by_special(guide)
            return write(server, prompt, guide, count=count, listen=listen, abandoned=abandoned, keep_special=special)
        except ServerError as error:
            if error.status not in NO_SUCH_PATH:
                raise
            if not guide.passive:
                warnings.warn(f"{server.url} only chats: it gets the budget, but no guidance", stacklevel=2)
            return self._chat(asked, guide, server, listen)

    def _chat(self, asked: _Asked, guide: Guide, server: Server, listen: Callable[[str, str], None] | None) -> Solution:
        instruction = self._used_instruction
        if asked.system is not None:
            instruction = replace(instruction, system=asked.system)
        solution = chat(server, asked.problem, guide, instruction)
        for kind, text in ((Phase.THINK, solution.thinking), (Phase.ANSWER, solution.answer)):
            if listen and text:
                listen(kind.value, text)
        return solution

    def _server_for(self, sampling: Sampling, seed: int) -> Server:
        """The server with the settings of the sampling."""
        top_p = sampling.top_p if sampling.top_p < 1 else None
        return replace(self.server, temperature=sampling.temperature, top_p=top_p, seed=seed % 2**31)

    def _prompt(self, asked: _Asked) -> str:
        if self.tokenizer is None:
            instruction = self._used_instruction
            system = instruction.system if asked.system is None else asked.system
            return "".join(f"{text}\n\n" for text in (system, instruction.request(asked.problem)) if text)
        return prompt_for(asked.problem, self.tokenizer, self.instruction, asked.system)

    def _closes_by_special(self, guide: Guide) -> bool:
        """Whether the close marker contains a special token: servers leave those out of the text."""
        special = self.tokenizer.all_special_tokens if self.tokenizer is not None else []
        return any(token in guide.phrases.close for token in special)

    def _count(self, guide: Guide) -> Callable[[str], int] | None:
        if self.tokenizer is None:
            return None
        from rbfast.inference.tokens import Vocabulary

        return Vocabulary(self.tokenizer, guide, ()).count


class _RunningVote:
    """Collects the answers of concurrent samples; sets `over` once the rest cannot change the majority."""

    def __init__(self, samples: int, early_stop: bool):
        self.over = threading.Event()
        self._samples, self._early_stop = samples, early_stop
        self._answers: list[str | None] = []
        self._lock = threading.Lock()

    def take(self, answer: str | None) -> None:
        with self._lock:
            self._answers.append(answer)
            if self._early_stop and decided(self._answers, self._samples - len(self._answers)):
                self.over.set()


class _EndedSamples:
    """The samples of each problem that have ended.

    Attributes:
        errors: the first error of each problem that failed, in the order of failing.
        failures: how many of the last problems to end failed in a row, for another reason than a refusal.
    """

    def __init__(self, problems: Sequence[str], samples: int) -> None:
        self.errors: dict[int, ServerError] = {}
        self.failures = 0
        self._problems, self._samples = problems, samples
        self._jobs: list[dict[int, Future[Solution]]] = [{} for _ in problems]

    def add(self, i: int, number: int, job: Future[Solution]) -> None:
        """Adds sample `number` of problem i. Raises its error unless that is a ServerError."""
        self._jobs[i][number] = job
        error = job.exception()
        if isinstance(error, ServerError):
            self.errors.setdefault(i, error)
        elif error:
            raise error
        if self.are_written(i):
            self.failures = 0
        elif len(self._jobs[i]) == self._samples and self.errors[i].status not in REFUSED:
            self.failures += 1

    def are_written(self, i: int) -> bool:
        """Whether all samples of a problem have ended without an error."""
        return len(self._jobs[i]) == self._samples and i not in self.errors

    def solutions(self, i: int) -> list[Solution]:
        """Those samples of a problem that have ended without an error, in order."""
        return [job.result() for _, job in sorted(self._jobs[i].items()) if not job.exception()]

    def raise_errors(self) -> None:
        """If a problem failed, raises the error of the first one, with the solutions so far of its samples.

        Its status is that of a refusal only if every problem was refused.
        """
        if not self.errors:
            return
        i, first = next(iter(self.errors.items()))
        decisive = next((error for error in self.errors.values() if error.status not in REFUSED), first)
        name = f"problem {self._problems[i][:60]!r}: " if len(self._problems) > 1 else ""
        more = f" (and {len(self.errors) - 1} more failed)" if len(self.errors) > 1 else ""
        so_far = [solution for _, job in sorted(self._jobs[i].items()) if (solution := _partial_solution(job))]
        raise ServerError(f"{name}{first}{more}", decisive.status, so_far) from first


def _partial_solution(future: Future[Solution]) -> Solution | None:
    """The solution of a sample, or its partial solution if it failed; None if there is none."""
    error = future.exception()
    return error.partial if isinstance(error, ServerError) else None if error else future.result()
