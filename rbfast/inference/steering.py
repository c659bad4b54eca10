"""Guide a batch: the state of each completion forces, strikes, probes and ends its own row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rbfast.inference.decoding import CachedBatch, Steering, continuation
from rbfast.inference.solver import Sampling, seed_named
from rbfast.inference.tokens import TokenState
from rbfast.inference.vote import decided

_LIKELIEST = 256  # tokens that hold the nucleus of most rows; sorting a whole vocabulary takes longer than the model


def draw(scores: torch.Tensor, sampling: Sampling, names: Sequence[str], steps: Sequence[int]) -> torch.Tensor:
    """Draw a token for each row of `scores` [rows, V]; returns [rows]. A draw depends only on its row's name, which
    contains the seed, and step: not on other rows."""
    chances = torch.softmax(scores.double() / sampling.temperature, dim=-1)
    # Uniform in [0, 1).
    uniform = [(seed_named(f"{name}:{step}") >> 11) / 2**53 for name, step in zip(names, steps, strict=True)]
    at = chances.new_tensor(uniform)[:, None]
    if sampling.top_p == 1:
        return _drawn(chances, at)[:, 0]
    tokens = chances.topk(min(_LIKELIEST, chances.shape[-1])).indices.sort().values
    likeliest = chances.gather(1, tokens)
    drawn = tokens.gather(1, _drawn_from_nucleus(likeliest, sampling.top_p, at))
    if len(flat := (likeliest.sum(-1) < sampling.top_p).nonzero()[:, 0]):
        drawn[flat] = _drawn_from_nucleus(chances[flat], sampling.top_p, at[flat])
    return drawn[:, 0]


def _drawn_from_nucleus(chances: torch.Tensor, top_p: float, at: torch.Tensor) -> torch.Tensor:
    """As `_drawn`, from the smallest set of the likeliest whose mass reaches top_p. Of equal chances the first counts
    as the likelier one."""
    ordered, order = chances.sort(descending=True, stable=True)
    nucleus = ordered.masked_fill((ordered.cumsum(-1) - ordered) >= top_p, 0.0)  # the first is always in it
    return order.gather(1, _drawn(nucleus, at))


def _drawn(chances: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The index [rows, 1] at which the mass of a row, summed from the left, exceeds the share `at` [rows, 1] of it."""
    mass = chances.cumsum(-1)
    return torch.searchsorted(mass, at * mass[:, -1:], right=True).clamp(max=mass.shape[1] - 1)


@dataclass
class SampleGroup:
    """The samples of one prompt. Once the running ones cannot change the majority, they are abandoned."""

    running: list[TokenState]
    answers: list[str | None] = field(default_factory=list)

    def take_answer(self, sample: TokenState) -> None:
        """Count the vote of a sample that has just ended."""
        self.running.remove(sample)
        self.answers.append(sample.key)
        if self.running and decided(self.answers, len(self.running)):
            for other in self.running:
                other.abandoned = True


class GuidedSteering(Steering):
    """Steers each row of a batch by its own `TokenState`.

    Args:
        names: the rows' names, which seed the draws.
        groups: for each row, the samples that it votes with; None for a row that is never abandoned.
        measures_entropy: whether to compute the entropy at each token, for `verify_above`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: dict[str, Any],
        states: Sequence[TokenState],
        *,
        names: Sequence[str],
        groups: Sequence[SampleGroup | None],
        sampling: Sampling,
        measures_entropy: bool,
    ):
        super().__init__(len(states), settings["eos_token_id"], model.device)
        self.model, self.settings = model, settings
        self.states, self.names, self.groups = list(states), list(names), list(groups)
        self.sampling, self.measures_entropy = sampling, measures_entropy
        self.entropies: list[float | None] = [None] * len(states)
        self.struck = [0] * len(states)
        self.ended = torch.tensor([state.done for state in states], device=model.device)

    def processors(self) -> LogitsProcessorList:
        return LogitsProcessorList([_ForceTokens(self)])

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Edit the logits [rows, V] in place, so that a forced or drawn token is the only possible one in its row."""
        if self.measures_entropy:
            self.entropies = list(entropy(scores).tolist())
        if self.sampling.temperature > 0:
            drawn = draw(scores, self.sampling, self.names, [state.written for state in self.states])
            scores.fill_(-math.inf).scatter_(1, drawn[:, None], 0.0)
        for i, state in enumerate(self.states):
            if state.queue:
                scores[i] = -math.inf
                scores[i, state.queue[0]] = 0.0
        return scores

    def see(self, tokens: torch.Tensor) -> None:
        for i, (state, token) in enumerate(zip(self.states, tokens.tolist(), strict=True)):
            if state.done:
                continue
            self.struck[i] = state.feed(token, self.entropies[i])
            group = self.groups[i]
            if state.done and group is not None:
                group.take_answer(state)
        self.ended = torch.tensor([state.done for state in self.states], device=tokens.device)

    def pausing(self) -> bool:
        return any(self.struck) or any(state.wants_probe for state in self.states) or super().pausing()

    def paused(self, batch: CachedBatch, new: torch.Tensor) -> None:
        self._strike(batch)
        asking = [i for i, state in enumerate(self.states) if state.wants_probe]
        if asking:
            self._probe(batch, asking)
            self._strike(batch)

    def _strike(self, batch: CachedBatch) -> None:
        """Mask the struck tokens."""
        for i, count in enumerate(self.struck):
            if count:
                batch.mask[i, -count:] = 0
                # Any token but padding: `generate` warns about rows that end in padding.
                batch.ids[i, -count:] = self.states[i].queue[0]
        self.struck = [0] * len(self.states)

    def _probe(self, batch: CachedBatch, asking: list[int]) -> None:
        vocabulary = self.states[0].vocabulary
        texts = {i: vocabulary.encode(self.states[i].state.probe_text) for i in asking}
        limit = self.states[0].state.limits.probe_tokens
        for length in sorted({len(text) for text in texts.values()}):
            rows = [i for i in asking if len(texts[i]) == length]
            written = continuation(self.model, batch, rows, [texts[i] for i in rows], self.settings, limit)
            for i, ids in zip(rows, written, strict=True):
                text = str(vocabulary.tokenizer.decode(ids, skip_special_tokens=True))
                self.struck[i] = self.states[i].probed(text, length + len(ids))

    def keep(self, rows: torch.Tensor) -> None:
        super().keep(rows)
        kept = set(rows.tolist())
        for name in ("states", "names", "groups", "entropies", "struck"):
            setattr(self, name, [item for i, item in enumerate(getattr(self, name)) if i in kept])


class _ForceTokens(LogitsProcessor):
    def __init__(self, steering: GuidedSteering):
        self.steering = steering

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:  # type: ignore[override]
        return self.steering.choose(scores)


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """The entropy [rows] in nats of the distributions with logits `scores` [rows, V]; a logit may be -inf."""
    normalizer = torch.logsumexp(scores, dim=-1, keepdim=True)
    chances = (scores - normalizer).exp_()
    # 0 * -inf would be NaN.
    return normalizer[:, 0] - torch.linalg.vecdot(chances, scores.clamp(min=torch.finfo(scores.dtype).min))
