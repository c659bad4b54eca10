"""Guided inference with a Hugging Face model: batched, the key-value cache kept across interventions.

```python
solver = LocalSolver(model, tokenizer)                          # solves problems; `guided` completes prompts
guide = Guide(Limits(1024), phrases_for(tokenizer))
[[solution]] = guided(model, tokenizer, [format_prompt(problem, tokenizer)], guide)
[samples] = guided(model, tokenizer, [prompt], guide, Sampling(samples=16, temperature=0.8, seed=1))
```

A text is inserted by forcing its tokens, one per step. Struck tokens stay in the cache, but they are masked and take up
no position. So nothing is read twice, and the rows of a batch are independent. Only a model with recurrent layers,
which cannot forget tokens, reads its rows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.data.chat_template import format_prompt
from rbfast.data.instruction import Instruction
from rbfast.inference.decoding import batches_by_length, decode, encode_prompts, evaluating, greedy_settings
from rbfast.inference.guide import Guide, Phrases
from rbfast.inference.solver import GREEDY, Listener, Sampling, Solution, check_texts
from rbfast.inference.steering import GuidedSteering, SampleGroup
from rbfast.inference.tokens import TokenState, Vocabulary, phrases_for


def guided(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    guide: Guide,
    sampling: Sampling = GREEDY,
    *,
    batch_size: int = 32,
    listen: Listener | None = None,
) -> list[list[Solution]]:
    """The guided samples of every prompt, in the order of `prompts`.

    Args:
        batch_size: the most completions at a time.
        listen: as in `Solver.solve`.

    Raises:
        ValueError: a batch size below 1, a prompt that would exceed the model's positions, a marker that the tokenizer
            cannot write, a budget too small for the wrap-up.
    """
    check_texts(prompts, sampling)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    settings = greedy_settings(model, tokenizer)
    vocabulary = Vocabulary(tokenizer, guide, settings["eos_token_id"])
    encoded = encode_prompts(model, tokenizer, prompts, guide.limits.budget)
    names, copies = _names(sampling, len(prompts)), sampling.samples
    states: dict[int, list[TokenState]] = {}
    with evaluating(model):
        for batch in batches_by_length(encoded, max(1, batch_size // copies)):
            for i in batch:
                states[i] = [TokenState(guide, vocabulary, listen and partial(listen, i)) for _ in range(copies)]
            groups = {i: SampleGroup(list(states[i])) if sampling.early_stop else None for i in batch}
            for start in range(0, copies, batch_size):  # once, unless a prompt has more samples than fit
                turn = range(copies)[start : start + batch_size]
                rows = [(i, copy) for i in batch for copy in turn if not states[i][copy].abandoned]
                if not rows:
                    break
                steering = GuidedSteering(
                    model,
                    settings,
                    [states[i][copy] for i, copy in rows],
                    names=[names[i][copy] for i, copy in rows],
                    groups=[groups[i] for i, _ in rows],
                    sampling=sampling,
                    measures_entropy=guide.limits.verify_above is not None,
                )
                ids = [encoded[i] for i in batch]
                decode(model, ids, settings, guide.limits.budget, steering, copies=len(rows) // len(batch))
    return [[state.solution() for state in states[i]] for i in range(len(prompts))]


def _names(sampling: Sampling, prompts: int) -> list[list[str]]:
    """The names that seed the draws of each sample of each prompt."""
    seed = sampling.seed
    seeds = list(map(str, seed)) if isinstance(seed, Sequence) else [f"{seed}:{i}" for i in range(prompts)]
    return [[f"{name}:{copy}" for copy in range(sampling.samples)] for name in seeds]


@dataclass(frozen=True)
class LocalSolver:
    """A Hugging Face model as a `Solver`.

    Args:
        batch_size: the most completions at a time.
        instruction: what follows a problem; None: the tokenizer's default.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    instruction: Instruction | None = None

    def phrases(self) -> Phrases:
        """The markers of this model."""
        return phrases_for(self.tokenizer, self.instruction)

    def solve(
        self, problems: Sequence[str], guide: Guide, sampling: Sampling = GREEDY, *, listen: Listener | None = None
    ) -> list[list[Solution]]:
        """The samples of every problem; see `Solver`. Raises ValueError as `guided` does."""
        check_texts(problems, sampling)
        prompts = [format_prompt(problem, self.tokenizer, self.instruction) for problem in problems]
        return guided(self.model, self.tokenizer, prompts, guide, sampling, batch_size=self.batch_size, listen=listen)
