"""The interface of guided models, local (`local`) and served (`remote`): `Solver`, `Sampling`, `Solution`.

```python
solver = LocalSolver(model, tokenizer)                      # or ServerSolver(Server(url, name), tokenizer)
guide = Guide(Limits(1024), solver.phrases())
[[solution]] = solver.solve([problem], guide)
guide = guide.with_limits(verify_above=calibrate(solver, problems, guide))
[samples] = solver.solve([problem], guide, Sampling(samples=16, temperature=0.8, seed=1))
vote_of(samples).answer
```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

from rbfast.grading.grade import answer_key, without_tags
from rbfast.inference.guide import Guide, Phrases
from rbfast.inference.state import Event, GuideState, Phase
from rbfast.inference.vote import Vote, majority
from rbfast.utils.records import check_numbers

Listener = Callable[[int, str, str], None]


@dataclass(frozen=True)
class Sampling:
    """How many completions to draw for each prompt, and how.

    Args:
        temperature: 0 for greedy decoding.
        top_p: nucleus sampling: draw from the smallest set of tokens with this mass.
        seed: one seed for each prompt, or one for all.
        early_stop: abandon the running samples of a prompt once they can no longer change the majority.

    Raises:
        ValueError: a number out of its range, or several samples at temperature 0.
        TypeError: something other than a number.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    early_stop: bool = True

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be 0 or more and top_p in (0, 1], got {self.temperature}, {self.top_p}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples of a prompt need a temperature above 0: greedy samples are all the same")


GREEDY = Sampling()


def seed_named(name: str) -> int:
    """The seed for a name: its 64-bit hash."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Solution:
    """One guided completion.

    Attributes:
        text: the completion without struck text and special tokens; `thinking` and `answer` are its parts.
        tokens: the whole cost: `text`, struck tokens, and the discarded `probe_tokens`; of a server, what it reports.
        truncated: the budget cut off the answer.
        abandoned: the vote was decided before this sample ended.
        sentences: nats; the moving average of the entropy at the end of each sentence of thinking, if it was measured.
        ids: the tokens of `text`; empty for a server, which sends none.
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
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, state: GuideState) -> Solution:
        """The solution so far."""
        return cls(
            text=state.thinking + state.answer,
            thinking=state.thinking,
            answer=state.answer,
            tokens=state.spent,
            truncated=not state.finished,
            events=tuple(state.events),
            probe_tokens=state.probed_tokens,
            abandoned=state.phase is not Phase.DONE,
            sentences=tuple(state.sentences),
        )

    @property
    def key(self) -> str | None:
        """The answer, as a vote counts it; None if there is none."""
        return answer_key(self.text, truncated=self.truncated)

    def to_dict(self) -> dict[str, Any]:
        """A record for `json.dumps`. `thinking` and `answer` have no tags; `text` keeps them."""
        return asdict(self) | {"thinking": without_tags(self.thinking), "answer": without_tags(self.answer)}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. `partial`: the samples of each problem that had ended by then."""

    def __init__(self, partial: list[list[Solution]]) -> None:
        super().__init__()
        self.partial = partial


class Solver(Protocol):
    """A model that solves problems under a guide."""

    def phrases(self) -> Phrases:
        """The markers of this model."""
        ...

    def solve(
        self,
        problems: Sequence[str],
        guide: Guide,
        sampling: Sampling = GREEDY,
        *,
        listen: Listener | None = None,
    ) -> list[list[Solution]]:
        """The samples of every problem, in the order of `problems`.

        Args:
            listen: called with (problem index, kind, text) for each piece as it is written; kind is `think`, `answer`
                or an intervention's. Only for one sample per problem. The pieces of problems that are solved at the
                same time alternate; over a server they come from several threads.
        """
        ...


def check_texts(texts: Sequence[str], sampling: Sampling) -> None:
    """Raises TypeError for a single text, whose characters would be solved one by one, and ValueError unless there is
    a seed for each text, or one for all."""
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, got one: {texts[:60]!r}; put it in a list")
    if isinstance(sampling.seed, Sequence) and len(sampling.seed) != len(texts):
        raise ValueError(f"expected a seed for each of {len(texts)} texts, or one for all, got {len(sampling.seed)}")


def vote_of(samples: Sequence[Solution]) -> Vote:
    """The answer that most samples agree on; abandoned samples have no vote."""
    return majority([sample.key for sample in samples if not sample.abandoned])


def calibrate(solver: Solver, problems: Sequence[str], guide: Guide, quantile: float = 0.9) -> float:
    """A value for `verify_above` [nats]: the `quantile` of the entropy at the sentence ends of unguided thinking.

    Raises:
        ValueError: the quantile is outside (0, 1), or no sentence of the model's thinking ended.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie in (0, 1), got {quantile}")
    plain = replace(guide, interventions=()).with_limits(minimum=0, probe_every=0, verify_above=math.inf)
    ends = [end for samples in solver.solve(problems, plain) for sample in samples for end in sample.sentences]
    if not ends:
        raise ValueError("no sentence of the model's thinking ended: give more problems or a larger budget")
    return float(np.quantile(ends, quantile))
