"""The settings of guided inference: limits in tokens, the texts that are inserted, which interventions are on.

```python
guide = Guide(Limits(budget=2048, reserve=256, minimum=200))
guide = Guide(Limits(1024), phrases_for(tokenizer))        # the markers of a tokenizer: rbfast.inference.tokens
```

`state` applies a guide to one completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rbfast.utils.records import check_numbers

WAIT, VERIFY, OTHER, WRAP_UP = INTERVENTIONS = ("wait", "verify", "other approach", "wrap up")


@dataclass(frozen=True)
class Limits:
    """When to intervene, and how much may be written. Lengths are in tokens.

    Args:
        budget: the limit for everything after the prompt: thinking, interventions, struck text, probes, answer.
        reserve: kept for the wrap-up and the answer (default: a quarter of the budget, at most 256).
        minimum: an end of thinking before this many tokens is struck and replaced by `wait`.
        maximum: the limit of the thinking (default: the budget less the reserve).
        cap: the most interventions in a completion, not counting the wrap-up.
        cooldown: the least number of tokens between an intervention and a `verify` or `other approach`.
        verify_above: nats; insert `verify` at the end of a sentence if the moving average of the entropy exceeds this.
            Choose a high quantile of the model's own entropy with `calibrate`; None turns `verify` off.
        loop_length, loop_times: a run of `loop_length` tokens that occurs `loop_times` times is a loop, which triggers
            `other approach`.
        probe_every: tokens between probes of the answer; 0 for no probes.
        probe_agree: this many equal probed answers in a row end the thinking.
        probe_tokens: the limit of a probed answer.

    Raises:
        ValueError: a number out of its range.
        TypeError: something other than a number.
    """

    budget: int
    reserve: int | None = None
    minimum: int = 0
    maximum: int | None = None
    cap: int = 4
    cooldown: int = 64
    verify_above: float | None = None
    loop_length: int = 24
    loop_times: int = 3
    probe_every: int = 0
    probe_agree: int = 3
    probe_tokens: int = 16

    def __post_init__(self) -> None:
        check_numbers(self)
        least = {"budget": 1, "minimum": 0, "cap": 0, "cooldown": 0, "loop_length": 1, "loop_times": 2}
        least |= {"probe_every": 0, "probe_agree": 2, "probe_tokens": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.maximum is not None and self.maximum < max(1, self.minimum):
            raise ValueError(f"maximum must be at least {max(1, self.minimum)}, got {self.maximum}")
        if self.reserve is not None and not 0 < self.reserve <= self.budget:
            raise ValueError(f"reserve must lie in 1 .. budget ({self.budget}), got {self.reserve}")

    @property
    def kept_back(self) -> int:
        """The reserve, or its default."""
        return self.reserve if self.reserve is not None else min(256, max(1, self.budget // 4))


@dataclass(frozen=True)
class Phrases:
    """The texts of a guide: the model's markers, and what is inserted.

    Args:
        close: the marker that ends the thinking and begins the answer.
        open: the marker that begins the thinking, if the model writes it; a wrap-up before any thinking starts with it.
        finish: the text that ends the answer; empty if only the end of turn ends it.
        probe: the text that a probe inserts after the close marker to get the answer at once.
        wait, verify, other, wrap_up: the text of each intervention.

    Raises:
        ValueError: an empty `close`.
    """

    close: str = "</think>"
    finish: str = ""
    probe: str = ""
    wait: str = "Wait, let me check that again."
    verify: str = "Let me verify this step before going on."
    other: str = "I am going in circles. Let me try another approach."
    wrap_up: str = "I have to stop here and give my best answer."
    open: str = ""

    def __post_init__(self) -> None:
        if not self.close:
            raise ValueError("close must be the text that ends the thinking, got an empty text")


@dataclass(frozen=True)
class Guide:
    """Limits, texts, and which interventions are on. Without interventions and probes it is plain generation.

    Raises:
        ValueError: an unknown intervention.
        TypeError: a string in place of a sequence of interventions.
    """

    limits: Limits
    phrases: Phrases = field(default_factory=Phrases)
    interventions: Sequence[str] = INTERVENTIONS

    def __post_init__(self) -> None:
        if isinstance(self.interventions, str):
            raise TypeError(f"interventions must be a sequence of names, got {self.interventions!r}")
        if unknown := set(self.interventions) - set(INTERVENTIONS):
            raise ValueError(f"unknown interventions {', '.join(sorted(unknown))}: use {', '.join(INTERVENTIONS)}")

    @property
    def passive(self) -> bool:
        """Whether nothing is ever inserted: plain generation."""
        return not self.interventions and not self.limits.probe_every

    @classmethod
    def plain(cls, budget: int) -> Guide:
        """The guide that inserts nothing and cuts off a completion at the budget."""
        return cls(Limits(budget), interventions=())

    def with_limits(self, **changes: Any) -> Guide:
        """This guide with other limits: `guide.with_limits(verify_above=calibrate(solver, problems, guide))`."""
        return replace(self, limits=replace(self.limits, **changes))
