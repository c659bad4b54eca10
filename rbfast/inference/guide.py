"""Guided inference: what to put into a model's thinking, and when; one budget for everything it writes.

```python
guide = Guide(budget=2048, reserve=256, minimum=200)       # tokens
row = Row(guide, count)                                    # count(text) -> tokens that putting the text in costs
order = row.write(" so x = 3.", tokens=1, entropy=0.4)     # None: let the model go on; else do what the order says
```

A row is thinking, then answering, then done. It is a fold over what was written, so the same pieces of text give the
same state whatever the batch, and the Hugging Face loop and the server client share it. An `Order` strikes the last
pieces, where the model was inside of something that must not be cut, and puts a text in. What is struck has been paid
for: every token that was ever written, put in or spent on a probe counts against the one budget.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from rbfast.inference.boundary import Boundary

WAIT, VERIFY, OTHER, WRAP_UP = INTERVENTIONS = ("wait", "verify", "other approach", "wrap up")
STABLE, CLOSE = "stable", "close"  # the thinking ends: probes agreed; the model ended its turn without an answer

_DECAY = 0.9  # of the entropy's moving average, a token
_PATIENCE = 32  # tokens that a due intervention waits for the end of a sentence
_FENCE_END = "```\n"


@dataclass(frozen=True)
class Guide:
    """How to guide. Lengths are in tokens.

    Args:
        budget: everything after the prompt, at most: thinking, interventions, what was struck, probes, answer.
        reserve: kept back for the wrap-up and the answer (default: a quarter of the budget, at most 256).
        minimum: an end of thinking before so many tokens is struck, and `wait` put in its place.
        maximum: of thinking (default: what the reserve leaves).
        close: the marker that ends the thinking and begins the answer.
        finish: the text that ends the answer; empty where only the end of turn does.
        interventions: which are on, of `INTERVENTIONS`; none of them is plain generation up to the budget.
        cap: interventions in a row, at most, the wrap-up aside.
        cooldown: tokens between an intervention and a `verify` or `other approach`.
        verify_above: nats; `verify` comes at the end of a sentence where the moving average of the entropy is above
            it. A high quantile of a model's own, see `calibrate`; None turns `verify` off.
        loop_length, loop_times: so many tokens in a row, met so many times, are a loop: `other approach`.
        probe_every: tokens between probes of the answer; 0 for none.
        probe: what a probe puts after the close marker to have the answer at once.
        probe_agree: equal probed answers in a row that end the thinking.
        probe_tokens: the length of a probed answer, at most.

    Raises:
        ValueError: a number out of its range, or an unknown intervention.
    """

    budget: int
    reserve: int | None = None
    minimum: int = 0
    maximum: int | None = None
    close: str = "</think>"
    finish: str = ""
    interventions: Sequence[str] = INTERVENTIONS
    cap: int = 4
    cooldown: int = 64
    verify_above: float | None = None
    loop_length: int = 24
    loop_times: int = 3
    probe_every: int = 0
    probe: str = ""
    probe_agree: int = 3
    probe_tokens: int = 16
    wait: str = "Wait, let me check that again."
    verify: str = "Let me verify this step before going on."
    other: str = "I am going in circles. Let me try another approach."
    wrap_up: str = "I have to stop here and give my best answer."

    def __post_init__(self) -> None:
        least = {"budget": 1, "minimum": 0, "cap": 0, "cooldown": 0, "loop_length": 1, "loop_times": 2}
        least |= {"probe_every": 0, "probe_agree": 2, "probe_tokens": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.maximum is not None and self.maximum < max(1, self.minimum):
            raise ValueError(f"maximum must be at least {max(1, self.minimum)}, got {self.maximum}")
        if self.reserve is not None and not 0 < self.reserve <= self.budget:
            raise ValueError(f"reserve must lie in 1 .. budget ({self.budget}), got {self.reserve}")
        if not self.close:
            raise ValueError("close must be the text that ends the thinking, got an empty text")
        if unknown := set(self.interventions) - set(INTERVENTIONS):
            raise ValueError(f"interventions must be of {', '.join(INTERVENTIONS)}; got {', '.join(sorted(unknown))}")

    @property
    def kept_back(self) -> int:
        return self.reserve if self.reserve is not None else min(256, max(1, self.budget // 4))

    @property
    def passive(self) -> bool:
        """Whether nothing is ever put in: plain generation."""
        return not self.interventions and not self.probe_every


class Phase(Enum):
    THINK, ANSWER, DONE = "think", "answer", "done"


@dataclass(frozen=True)
class Order:
    """What must happen now: the last `strike` pieces are struck, `text` is put in; with `end` the turn ends."""

    kind: str
    strike: int = 0
    text: str = ""
    end: bool = False


@dataclass(frozen=True)
class Event:
    """An intervention: its kind, how many characters of thinking stood before it, the text it struck."""

    kind: str
    at: int
    struck: str


@dataclass
class Row:
    """The state of one completion.

    Args:
        count: tokens that putting a text in costs, at most.
        end_cost: tokens that ending the turn costs: 1 where an end token is written, 0 where one stops asking.

    Raises:
        ValueError: the reserve does not hold the wrap-up, one token of answer and the end.
    """

    guide: Guide
    count: Callable[[str], int]
    end_cost: int = 1
    phase: Phase = Phase.THINK
    spent: int = 0
    probed_tokens: int = 0
    finished: bool = False  # the model ended its answer by itself, or wrote all of it
    answer: str = ""
    events: list[Event] = field(default_factory=list)
    sentences: list[float] = field(default_factory=list)  # the entropy's average at each end of a sentence

    def __post_init__(self) -> None:
        guide = self.guide
        self._pieces: list[tuple[str, int]] = []
        self._kept = 0
        self._boundary = Boundary(guide.close)
        self._safe, self._repair = 0, ""  # pieces up to the last safe place, and the text that makes it safe
        self._tail = ""
        self._average: float | None = None
        self._recent: deque[str] = deque(maxlen=guide.loop_length)
        self._met: Counter[tuple[str, ...]] = Counter()
        self._used, self._last = 0, 0
        self._due: tuple[str, int] | None = None
        self._probes: list[str] = []
        self._next_probe = guide.probe_every
        self._finish_cost = (self.count(guide.finish) if guide.finish else 0) + self.end_cost
        self._limit = guide.budget
        if WRAP_UP in guide.interventions:
            self._limit -= guide.kept_back
            needed = self._wrap_cost() + 1 + self._finish_cost
            if guide.kept_back < needed:
                raise ValueError(
                    f"the wrap-up, an answer and its end need {needed} tokens, the reserve holds {guide.kept_back} "
                    f"of a budget of {guide.budget}: raise the reserve, or the budget to {4 * needed}"
                )
            self._limit = min(self._limit, guide.maximum or self._limit)
        if guide.minimum > self._limit:
            raise ValueError(
                f"minimum must fit into the budget, got {guide.minimum} of {self._limit} tokens of thinking "
                f"(a budget of {guide.budget}, {guide.kept_back} of them kept back): lower minimum or raise budget"
            )

    @property
    def thinking(self) -> str:
        """What is left of the thinking, the close marker included once it is there."""
        return "".join(text for text, _ in self._pieces)

    @property
    def left(self) -> int:
        """Tokens that the model may write before the next order at the latest."""
        if self.phase is Phase.THINK:
            return self._limit - self.spent
        return self.guide.budget - self.spent - self._finish_cost if self._guarded else self.guide.budget - self.spent

    @property
    def _guarded(self) -> bool:
        return WRAP_UP in self.guide.interventions

    # ------------------------------------------------------------------------------------------------- what happens

    def start(self) -> Order | None:
        """The order before the first token, if there is one: a budget that is all reserve leaves no thinking."""
        return self._stop_thinking(WRAP_UP) if self._guarded and self.left < 1 else None

    def write(self, text: str, tokens: int = 1, entropy: float | None = None, ended: bool = False) -> Order | None:
        """Takes what the model wrote: `text`, of `tokens` tokens, from a distribution of `entropy` nats.

        Args:
            ended: this was the end of the turn, not text.
        """
        self.spent += tokens
        if self.phase is Phase.THINK:
            self._pieces.append(("" if ended else text, tokens))
            self._kept += tokens
            return self._ended_thinking() if ended else self._think(text, entropy)
        if self.phase is Phase.ANSWER:
            return self._answer(text, ended)
        raise ValueError("the row is done: nothing more can be written to it")

    @property
    def wants_probe(self) -> bool:
        """Whether it is time to probe the answer, and the thinking's share of the budget has a token more than that."""
        due = 0 < self._next_probe <= self.spent - self.probed_tokens and self.phase is Phase.THINK
        return due and self.spent + self.guide.probe_tokens + self.count(self.probe_text) < self._limit

    @property
    def probe_text(self) -> str:
        return self._joined(self.guide.close + self.guide.probe, 0)

    def probed(self, text: str, tokens: int) -> Order | None:
        """Takes what the model wrote to a probe, for `tokens` tokens (put in and written, then thrown away)."""
        self.spent += tokens
        self.probed_tokens += tokens
        self._next_probe += self.guide.probe_every
        self._probes = [*self._probes, _first_answer(text, self.guide.finish)][-self.guide.probe_agree :]
        stable = len(self._probes) == self.guide.probe_agree and len(set(self._probes)) == 1 and self._probes[0]
        pays = self._guarded or self.spent + self.count(self._joined(self.guide.close)) < self.guide.budget
        return self._stop_thinking(STABLE) if stable and pays and self._kept >= self.guide.minimum else None

    # ----------------------------------------------------------------------------------------------------- thinking

    def _think(self, text: str, entropy: float | None) -> Order | None:
        if entropy is not None:
            self._average = entropy if self._average is None else _DECAY * self._average + (1 - _DECAY) * entropy
        marker = self._find_close(text)
        if marker is not None:
            return self._closed(marker)
        self._boundary.write(text)
        self._remember_safe_place(text)
        self._look_for_loop(text)
        if self.left < 1:
            return self._stop_thinking(WRAP_UP) if self._guarded else self._done(finished=False)
        return self._at_sentence_end() if self._boundary.sentence_end and text else self._overdue()

    def _find_close(self, text: str) -> int | None:
        """Characters of `text` that follow the close marker, where the marker ends in `text`."""
        close = self.guide.close
        seen = self._tail + text
        at = seen.find(close)
        self._tail = seen[-(len(close) - 1) :] if len(close) > 1 else ""
        return None if at < 0 else len(seen) - at - len(close)

    def _closed(self, rest: int) -> Order | None:
        strike = self._back_over(self._marker_pieces(rest))
        if self._kept < self.guide.minimum and (order := self._intervene(WAIT, self.guide.wait, strike)):
            return order
        text, tokens = self._pieces[-1]
        self._pieces[-1] = text[: len(text) - rest], tokens
        self.phase, self.answer = Phase.ANSWER, text[len(text) - rest :]
        return self._end_if_due()

    def _marker_pieces(self, rest: int) -> int:
        """How many of the last pieces hold the close marker, which ends `rest` characters before their end."""
        pieces, length = 0, 0
        while length < rest + len(self.guide.close):
            pieces += 1
            length += len(self._pieces[-pieces][0])
        return pieces

    def _back_over(self, pieces: int) -> int:
        """What to strike with the last pieces: nothing, for they ended what came before, unless a formula is open."""
        return max(pieces, len(self._pieces) - self._safe) if self._boundary.open else pieces

    def _ended_thinking(self) -> Order | None:
        """The model ended its turn without an answer."""
        strike = self._back_over(1)
        if self._kept < self.guide.minimum and (order := self._intervene(WAIT, self.guide.wait, strike)):
            return order
        if not self._guarded:
            return self._done(finished=True)
        return self._put(CLOSE, self._joined(self.guide.close, strike), strike, Phase.ANSWER)

    def _remember_safe_place(self, text: str) -> None:
        # A piece without text is a part of a character: no place to interrupt.
        if not text:
            return
        if self._boundary.safe:
            self._safe, self._repair = len(self._pieces), ""
        elif self._boundary.in_fence and not self._boundary.in_line:
            self._safe, self._repair = len(self._pieces), _FENCE_END

    def _look_for_loop(self, text: str) -> None:
        self._recent.append(text)
        if len(self._recent) < self.guide.loop_length:
            return
        key = tuple(self._recent)
        self._met[key] += 1
        if self._met[key] < self.guide.loop_times or self._due is not None:
            return
        if OTHER in self.guide.interventions and self._used < self.guide.cap:
            if self._cool:
                self._due = OTHER, self.spent + _PATIENCE
        elif self._guarded:
            self._due = WRAP_UP, self.spent + _PATIENCE

    @property
    def _cool(self) -> bool:
        return self.spent - self._last >= self.guide.cooldown

    def _at_sentence_end(self) -> Order | None:
        if self._average is not None:
            self.sentences.append(self._average)
        if self._due is not None:
            return self._do_due()
        if self._guarded and self.left <= self._limit // 16:
            return self._stop_thinking(WRAP_UP)
        above = self.guide.verify_above
        if above is not None and self._average is not None and self._average > above and self._cool:
            return self._intervene(VERIFY, self.guide.verify, 0)
        return None

    def _overdue(self) -> Order | None:
        return self._do_due() if self._due is not None and self.spent >= self._due[1] else None

    def _do_due(self) -> Order | None:
        assert self._due is not None
        kind, _ = self._due
        self._due = None
        if kind == OTHER and (order := self._intervene(OTHER, self.guide.other, len(self._pieces) - self._safe)):
            return order
        return self._stop_thinking(WRAP_UP) if self._guarded else None

    # ------------------------------------------------------------------------------------------------- interventions

    def _intervene(self, kind: str, text: str, strike: int) -> Order | None:
        """An intervention, where it is on, not used up, and the thinking's share of the budget pays for it."""
        if kind not in self.guide.interventions or self._used >= self.guide.cap:
            return None
        joined = self._joined(text + "\n", strike)
        if self.spent + self.count(joined) >= self._limit:
            return None
        self._used += 1
        return self._put(kind, joined, strike, Phase.THINK)

    def _stop_thinking(self, kind: str) -> Order:
        strike = len(self._pieces) - self._safe
        words = "" if kind == STABLE else f"{self.guide.wrap_up}\n"
        return self._put(kind, self._joined(words + self.guide.close, strike), strike, Phase.ANSWER)

    def _put(self, kind: str, text: str, strike: int, phase: Phase) -> Order:
        struck = self._pieces[len(self._pieces) - strike :]
        del self._pieces[len(self._pieces) - strike :]
        cost = self.count(text)
        self.events.append(Event(kind, len(self.thinking), "".join(piece for piece, _ in struck)))
        self._pieces.append((text, cost))
        self._kept += cost - sum(tokens for _, tokens in struck)
        self.spent += cost
        self._last, self.phase = self.spent, phase
        self._forget()
        return Order(kind, strike, text)

    def _forget(self) -> None:
        """After a text was put in, what came before it says nothing about what follows."""
        self._boundary.restart(self._pieces[-1][0])
        self._safe, self._repair, self._tail, self._due = len(self._pieces), "", "", None
        self._recent.clear()
        self._met.clear()

    def _joined(self, text: str, strike: int | None = None) -> str:
        """`text` as it follows the last safe place: an open code fence closed, in a paragraph of its own."""
        strike = len(self._pieces) - self._safe if strike is None else strike
        kept = len(self._pieces) - strike
        repair = self._repair if kept == self._safe else ""
        before = repair or next((piece for piece, _ in reversed(self._pieces[:kept]) if piece), "\n")
        return repair + ("" if before.endswith("\n") else "\n\n") + text

    def _wrap_cost(self) -> int:
        words = f"{self.guide.wrap_up}\n{self.guide.close}"
        return max(self.count(before + words) for before in ("", "\n\n", _FENCE_END))

    # ------------------------------------------------------------------------------------------------------- answer

    def _answer(self, text: str, ended: bool) -> Order | None:
        if ended:
            return self._done(finished=True)
        self.answer += text
        if self.guide.finish and self._guarded and self.guide.finish in self.answer:
            self.finished = True
            return self._finish("")
        return self._end_if_due()

    def _end_if_due(self) -> Order | None:
        if self.left >= 1:
            return None
        return self._finish(self.guide.finish) if self._guarded else self._done(finished=False)

    def _finish(self, text: str) -> Order:
        self.answer += text
        self.spent += self.end_cost + (self.count(text) if text else 0)
        self.phase = Phase.DONE
        return Order("end", 0, text, end=True)

    def _done(self, finished: bool) -> Order | None:
        self.finished, self.phase = finished, Phase.DONE
        return None


def _first_answer(text: str, finish: str) -> str:
    """What a probe was told: up to the end of the answer, or of its first line."""
    if finish:
        text = text.partition(finish)[0]
    return text.strip().partition("\n")[0].strip()


def calibrated(guide: Guide, quantile: float, sentences: Callable[[Guide], Iterable[float]]) -> float:
    """The `verify_above` [nats] that is exceeded at 1 - `quantile` of the ends of sentences of unguided thinking.

    Args:
        sentences: the entropies at the ends of sentences (`Row.sentences`) under the guide that it is given.

    Raises:
        ValueError: a quantile outside (0, 1), or no sentence end.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie in (0, 1), got {quantile}")
    ends = list(sentences(replace(guide, interventions=(), minimum=0, probe_every=0, verify_above=math.inf)))
    if not ends:
        raise ValueError("no sentence ended in what the model wrote: give more prompts or a larger budget")
    return float(np.quantile(ends, quantile))
