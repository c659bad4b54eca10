"""The state machine of one guided completion: what to insert into the thinking, and when, within one token budget.

```python
state = GuideState(guide, count)                           # count(text) -> tokens that inserting the text costs
order = state.write(" so x = 3.", tokens=1, entropy=0.4)   # None: let the model continue; else carry out the order
```

The phases are thinking, answer, done. The state depends only on the pieces of text that were written, not on the batch;
the Hugging Face loop and the server client share it. An `Order` strikes the last pieces, if the model was inside
something that must not be cut, and inserts a text. Every token that was written, struck, inserted or spent on a probe
counts against the budget.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from rbfast.inference.boundary import Boundary
from rbfast.inference.guide import OTHER, VERIFY, WAIT, WRAP_UP, Guide

STABLE, CLOSE = "stable", "close"  # why the thinking was ended: probes agreed; the model ended its turn while thinking

_DECAY = 0.9  # of the moving average of the entropy, per token
_PATIENCE = 32  # the most tokens that a due intervention waits for the end of a sentence
_FENCE_END = "```\n"


class Phase(Enum):
    THINK, ANSWER, DONE = "think", "answer", "done"


@dataclass(frozen=True)
class Order:
    """What to do now: strike the last `strike` pieces, insert `text`, and end the turn if `end`."""

    kind: str
    strike: int = 0
    text: str = ""
    end: bool = False


@dataclass(frozen=True)
class Event:
    """An intervention: its kind, the number of characters of thinking before it, and the text that it struck."""

    kind: str
    at: int
    struck: str


@dataclass
class GuideState:
    """The state of one guided completion.

    Args:
        count: the tokens that inserting a text costs, or an upper bound.
        end_cost: the tokens that ending the turn costs: 1 if an end token is written, 0 if the caller stops.

    Raises:
        ValueError: the reserve is too small for the wrap-up, one token of answer and the end.
    """

    guide: Guide
    count: Callable[[str], int]
    end_cost: int = 1
    phase: Phase = Phase.THINK
    spent: int = 0
    probed_tokens: int = 0
    finished: bool = False  # the answer is complete
    answer: str = ""
    events: list[Event] = field(default_factory=list)
    sentences: list[float] = field(default_factory=list)  # the average entropy at each end of a sentence

    def __post_init__(self) -> None:
        self.limits, self.phrases = self.guide.limits, self.guide.phrases
        self._pieces: list[tuple[str, int]] = []
        self._kept = 0
        self._boundary = Boundary(self.phrases.close)
        self._safe, self._repair = 0, ""  # pieces up to the last safe place; text to insert there first (a fence's end)
        self._tail = ""
        self._average: float | None = None
        self._recent: deque[str] = deque(maxlen=self.limits.loop_length)
        self._met: Counter[tuple[str, ...]] = Counter()
        self._used, self._last = 0, 0
        self._due: tuple[str, int] | None = None
        self._probes: list[str] = []
        self._next_probe = self.limits.probe_every
        self._finish_cost = (self.count(self.phrases.finish) if self.phrases.finish else 0) + self.end_cost
        self._limit = self._thinking_limit() if self._wraps_up else self.limits.budget
        if self.limits.minimum > self._limit:
            raise ValueError(
                f"minimum must be at most {self._limit}, the tokens of thinking that a budget of {self.limits.budget} "
                f"allows, got {self.limits.minimum}: lower minimum or raise budget"
            )

    def _thinking_limit(self) -> int:
        """The most tokens of thinking before the wrap-up."""
        budget, kept_back = self.limits.budget, self.limits.kept_back
        needed = self._wrap_cost() + 1 + self._finish_cost
        if kept_back < needed:
            enough = replace(self.limits, budget=4 * needed).kept_back >= needed  # False if the reserve was given
            remedy = f"the budget to {4 * needed}" if enough else f"the reserve (of Limits) to {needed}"
            raise ValueError(
                f"the wrap-up, an answer and its end need {needed} tokens, the reserve is {kept_back} "
                f"of a budget of {budget}: raise {remedy}"
            )
        return min(budget - kept_back, self.limits.maximum or budget)

    @property
    def thinking(self) -> str:
        """The thinking without struck text, with the close marker once it is there."""
        return "".join(text for text, _ in self._pieces)

    @property
    def left(self) -> int:
        """The most tokens that the model may write before the next order."""
        if self.phase is Phase.THINK:
            return self._limit - self.spent
        return self.limits.budget - self.spent - (self._finish_cost if self._wraps_up else 0)

    @property
    def _wraps_up(self) -> bool:
        return WRAP_UP in self.guide.interventions

    # ------------------------------------------------------------------------------------------------------- inputs

    def start(self) -> Order | None:
        """The order before the first token, if there is one: a budget that is all reserve leaves no thinking."""
        return self._stop_thinking(WRAP_UP) if self._wraps_up and self.left < 1 else None

    def write(self, text: str, tokens: int = 1, entropy: float | None = None, ended: bool = False) -> Order | None:
        """Process what the model wrote: `text`, of `tokens` tokens, from a distribution of `entropy` nats.

        Args:
            ended: the model ended its turn.
        """
        self.spent += tokens
        if self.phase is Phase.THINK:
            self._pieces.append(("" if ended else text, tokens))
            self._kept += tokens
            return self._ended_thinking() if ended else self._think(text, entropy)
        if self.phase is Phase.ANSWER:
            return self._answer(text, ended)
        raise ValueError("the completion is done: nothing more can be written to it")

    @property
    def wants_probe(self) -> bool:
        """Whether it is time to probe the answer, and the budget for thinking covers the probe and one more token."""
        due = 0 < self._next_probe <= self.spent - self.probed_tokens and self.phase is Phase.THINK
        return due and self.spent + self.limits.probe_tokens + self.count(self.probe_text) < self._limit

    @property
    def probe_text(self) -> str:
        return self._with_separator(self.phrases.close + self.phrases.probe, 0)

    def probed(self, text: str, tokens: int) -> Order | None:
        """Process the model's reply to a probe, which cost `tokens` tokens (inserted and written, then discarded)."""
        self.spent += tokens
        self.probed_tokens += tokens
        # The next interval starts here: an inserted text may be longer than an interval.
        self._next_probe = self.spent - self.probed_tokens + self.limits.probe_every
        self._probes = [*self._probes, _first_answer(text, self.phrases.finish)][-self.limits.probe_agree :]
        stable = len(self._probes) == self.limits.probe_agree and len(set(self._probes)) == 1 and self._probes[0]
        pays = self._wraps_up or self.spent + self.count(self._with_separator(self.phrases.close)) < self.limits.budget
        return self._stop_thinking(STABLE) if stable and pays and self._kept >= self.limits.minimum else None

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
            return self._stop_thinking(WRAP_UP) if self._wraps_up else self._done(finished=False)
        return self._at_sentence_end() if self._boundary.sentence_end and text else self._overdue()

    def _find_close(self, text: str) -> int | None:
        """The number of characters after the close marker, if it ends in `text`, else None."""
        close = self.phrases.close
        recent = self._tail + text
        at = recent.find(close)
        self._tail = recent[-(len(close) - 1) :] if len(close) > 1 else ""
        return None if at < 0 else len(recent) - at - len(close)

    def _closed(self, rest: int) -> Order | None:
        strike = self._pieces_to_strike(self._marker_pieces(rest))
        if self._kept < self.limits.minimum and (order := self._intervene(WAIT, self.phrases.wait, strike)):
            return order
        text, tokens = self._pieces[-1]
        self._pieces[-1] = text[: len(text) - rest], tokens
        self.phase = Phase.ANSWER
        return self._answer(text[len(text) - rest :], ended=False)

    def _marker_pieces(self, rest: int) -> int:
        """The number of last pieces that contain the close marker, which ends `rest` characters before their end."""
        pieces, length = 0, 0
        while length < rest + len(self.phrases.close):
            pieces += 1
            length += len(self._pieces[-pieces][0])
        return pieces

    def _pieces_to_strike(self, pieces: int) -> int:
        """The number of pieces to strike: the last `pieces`, or all since the last safe place if a formula is open."""
        return max(pieces, len(self._pieces) - self._safe) if self._boundary.open else pieces

    def _ended_thinking(self) -> Order | None:
        """Handle a turn that the model ended without an answer."""
        strike = self._pieces_to_strike(1)
        if self._kept < self.limits.minimum and (order := self._intervene(WAIT, self.phrases.wait, strike)):
            return order
        if not self._wraps_up:
            return self._done(finished=True)
        return self._insert(CLOSE, self._with_separator(self.phrases.close, strike), strike, Phase.ANSWER)

    def _remember_safe_place(self, text: str) -> None:
        # A piece without text is part of a character: nothing may be inserted here.
        if not text:
            return
        if self._boundary.safe:
            self._safe, self._repair = len(self._pieces), ""
        elif self._boundary.in_fence and not self._boundary.in_line:
            self._safe, self._repair = len(self._pieces), _FENCE_END

    def _look_for_loop(self, text: str) -> None:
        self._recent.append(text)
        if len(self._recent) < self.limits.loop_length:
            return
        key = tuple(self._recent)
        self._met[key] += 1
        if self._met[key] < self.limits.loop_times or self._due is not None:
            return
        if OTHER in self.guide.interventions and self._used < self.limits.cap:
            if self._has_cooled_down:
                self._due = OTHER, self.spent + _PATIENCE
        elif self._wraps_up:
            self._due = WRAP_UP, self.spent + _PATIENCE

    @property
    def _has_cooled_down(self) -> bool:
        return self.spent - self._last >= self.limits.cooldown

    def _at_sentence_end(self) -> Order | None:
        if self._average is not None:
            self.sentences.append(self._average)
        if self._due is not None:
            return self._run_due()
        if self._wraps_up and self.left <= self._limit // 16:
            return self._stop_thinking(WRAP_UP)
        above = self.limits.verify_above
        if above is not None and self._average is not None and self._average > above and self._has_cooled_down:
            return self._intervene(VERIFY, self.phrases.verify, 0)
        return None

    def _overdue(self) -> Order | None:
        return self._run_due() if self._due is not None and self.spent >= self._due[1] else None

    def _run_due(self) -> Order | None:
        assert self._due is not None
        kind, _ = self._due
        self._due = None
        if kind == OTHER and (order := self._intervene(OTHER, self.phrases.other, len(self._pieces) - self._safe)):
            return order
        return self._stop_thinking(WRAP_UP) if self._wraps_up else None

    # ------------------------------------------------------------------------------------------------- interventions

    def _intervene(self, kind: str, text: str, strike: int) -> Order | None:
        """The order for an intervention, if it is on, below the cap, and within the budget for thinking."""
        if kind not in self.guide.interventions or self._used >= self.limits.cap:
            return None
        joined = self._with_separator(text + "\n", strike)
        if self.spent + self.count(joined) >= self._limit:
            return None
        self._used += 1
        return self._insert(kind, joined, strike, Phase.THINK)

    def _stop_thinking(self, kind: str) -> Order:
        strike = len(self._pieces) - self._safe
        words = "" if kind == STABLE else f"{self.phrases.wrap_up}\n"
        opener = self.phrases.open if strike == len(self._pieces) else ""
        return self._insert(
            kind, opener + self._with_separator(words + self.phrases.close, strike), strike, Phase.ANSWER
        )

    def _insert(self, kind: str, text: str, strike: int, phase: Phase) -> Order:
        struck = self._pieces[len(self._pieces) - strike :]
        del self._pieces[len(self._pieces) - strike :]
        cost = self.count(text)
        self.events.append(Event(kind, len(self.thinking), "".join(piece for piece, _ in struck)))
        self._pieces.append((text, cost))
        self._kept += cost - sum(tokens for _, tokens in struck)
        self.spent += cost
        self._last, self.phase = self.spent, phase
        self._reset_tracking()
        return Order(kind, strike, text)

    def _reset_tracking(self) -> None:
        """Reset the tracking of the text: it restarts at an inserted text."""
        self._boundary.restart(self._pieces[-1][0])
        self._safe, self._repair, self._tail, self._due = len(self._pieces), "", "", None
        self._recent.clear()
        self._met.clear()

    def _with_separator(self, text: str, strike: int | None = None) -> str:
        """`text` as it is inserted: in a new paragraph, after closing an open code fence."""
        strike = len(self._pieces) - self._safe if strike is None else strike
        kept = len(self._pieces) - strike
        repair = self._repair if kept == self._safe else ""
        before = repair or next((piece for piece, _ in reversed(self._pieces[:kept]) if piece), "\n")
        return repair + ("" if before.endswith("\n") else "\n\n") + text

    def _wrap_cost(self) -> int:
        words = f"{self.phrases.wrap_up}\n{self.phrases.close}"
        return max(self.count(before + words) for before in (self.phrases.open, "\n\n", _FENCE_END))

    # ------------------------------------------------------------------------------------------------------- answer

    def _answer(self, text: str, ended: bool) -> Order | None:
        if ended:
            return self._done(finished=True)
        self.answer += text
        if self.phrases.finish and self._wraps_up and self.phrases.finish in self.answer:
            self.finished = True
            return self._finish("")
        return self._end_if_due()

    def _end_if_due(self) -> Order | None:
        if self.left >= 1:
            return None
        return self._finish(self.phrases.finish) if self._wraps_up else self._done(finished=False)

    def _finish(self, text: str) -> Order:
        self.answer += text
        self.spent += self.end_cost + (self.count(text) if text else 0)
        self.phase = Phase.DONE
        return Order("end", 0, text, end=True)

    def _done(self, finished: bool) -> Order | None:
        self.finished, self.phase = finished, Phase.DONE
        return None


def _first_answer(text: str, finish: str) -> str:
    """The answer in a probe's reply: up to the finish text, or the end of the first line."""
    if finish:
        text = text.partition(finish)[0]
    return text.strip().partition("\n")[0].strip()
