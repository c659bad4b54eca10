"""How an evaluation completes its problems: by a local model or a server, with a guide or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.data.chat_template import format_prompt
from rbfast.data.instruction import Instruction
from rbfast.grading.grade import Problem
from rbfast.inference.decoding import Completion, batches_by_length, complete
from rbfast.inference.guide import Guide
from rbfast.inference.local import guided
from rbfast.inference.remote import ServerSolver
from rbfast.inference.solver import Sampling, Solution, seed_named
from rbfast.inference.state import Event
from rbfast.teacher.client import Server
from rbfast.utils.memory import trim_memory
from rbfast.utils.records import check_numbers

Generated = tuple[Completion, tuple[Event, ...]]
Model = PreTrainedModel | Server


@dataclass(frozen=True)
class Decoding:
    """How completions are generated; a results file resumes only if these settings agree.

    Args:
        max_new_tokens: the limit of a completion; with a guide, its budget applies instead.
        samples: completions of each problem.
        temperature, top_p: of the distribution that tokens are drawn from; temperature 0 is greedy.
        seed: of the draws; those of a problem depend on this and on its text alone.
        label: a name for the model and its adapter.
        instruction: the text after a problem; None for the tokenizer's default.
    """

    max_new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    guide: Guide | None = None
    label: str = ""
    instruction: Instruction | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        Sampling(self.samples, self.temperature, self.top_p)  # raises ValueError if one is out of range

    def write(
        self, model: Model, tokenizer: PreTrainedTokenizerBase | None, problems: Sequence[Problem], batch_size: int
    ) -> Iterator[tuple[Problem, list[Generated]]]:
        """Yields each problem, in any order, with its completions and the interventions of a guide."""
        if isinstance(model, Server):
            yield from self._ask(model, tokenizer, problems, batch_size)
            return
        if tokenizer is None:
            raise TypeError("a local model needs its tokenizer, got None")
        lengths = [range(len(problem.question)) for problem in problems]
        for rows in batches_by_length(lengths, max(1, batch_size // self.samples)):
            batch = [problems[i] for i in rows]
            yield from zip(batch, self._complete(model, tokenizer, batch, batch_size), strict=True)
            trim_memory()

    def _ask(
        self, server: Server, tokenizer: PreTrainedTokenizerBase | None, problems: Sequence[Problem], concurrency: int
    ) -> Iterator[tuple[Problem, list[Generated]]]:
        solver = ServerSolver(server, tokenizer, concurrency, self.instruction)
        questions, systems = [p.question for p in problems], [p.system for p in problems]
        for i, solutions in solver.solve_each(questions, *self._guidance(problems), systems=systems):
            yield problems[i], list(map(_generated, solutions))

    def _complete(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int
    ) -> list[list[Generated]]:
        prompts = [format_prompt(p.question, tokenizer, self.instruction, system=p.system) for p in problems]
        if self.guide is None and self.temperature == 0 and self.samples == 1:
            greedy = complete(model, tokenizer, prompts, max_new_tokens=self.max_new_tokens, batch_size=batch_size)
            return [[(completion, ())] for completion in greedy]
        solved = guided(model, tokenizer, prompts, *self._guidance(problems), batch_size=batch_size)
        return [list(map(_generated, solutions)) for solutions in solved]

    def _guidance(self, problems: Sequence[Problem]) -> tuple[Guide, Sampling]:
        # A resumed run draws the same: a problem's draws do not depend on which others are left.
        seeds = [seed_named(f"{self.seed}:{problem.question}") for problem in problems]
        sampling = Sampling(self.samples, self.temperature, self.top_p, seeds, early_stop=False)
        return self.guide or Guide.plain(self.max_new_tokens), sampling


def _generated(solution: Solution) -> Generated:
    return Completion(solution.text, solution.tokens, solution.truncated), solution.events
