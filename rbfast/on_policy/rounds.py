"""On-policy distillation in one call: in each round the student writes to problems, then learns what the teacher would
have written in every place of what it wrote.

```python
model, tokenizer = load_student("smollm2-135m")
teacher = load_teacher("their-model", tokenizer, model.dtype)
run = distill_on_policy(model, tokenizer, read_questions("problems.jsonl"), "runs/own", teacher=teacher, rounds=8)
```

A round is an epoch of one training, so AdamW and the schedule go on from round to round. The folder is that of
`distill`; `samples/` holds what was written.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.data.encoding import Example
from rbfast.data.instruction import saved_instruction
from rbfast.on_policy.samples import Writer, Writing, example_of_sample, longest_example, write_samples
from rbfast.teacher.jobs import Question
from rbfast.training.distill import Run, TrainingData, train_examples, with_instruction
from rbfast.training.distill_config import DistillConfig
from rbfast.training.examples import instruction_of
from rbfast.training.objective import Objective
from rbfast.training.resume import digest_records
from rbfast.training.training_bar import TrainingBar
from rbfast.utils.processes import is_first_process
from rbfast.utils.records import show

SAMPLES = "samples"
DEFAULTS = DistillConfig(objective=Objective(beta=1.0, ce_share=0.0))
_FOR_TRACES = ("placement", "placement_traces", "tokens_per_batch", "max_tokens", "turns")


def distill_on_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    out: str | Path,
    config: DistillConfig = DEFAULTS,
    quiet: bool = False,
    *,
    teacher: PreTrainedModel,
    rounds: int = 8,
    writing: Writing = Writing(),
    adapter: str | Path | None = None,
    report_to: Sequence[str] = (),
) -> Run:
    """Trains an adapter of `model` on its own completions of `questions`, as `distill` trains one on traces: the same
    folder, the same resuming, the same state of the model afterwards.

    Args:
        config: `epochs` are passes over the questions, dealt out evenly to the rounds. The loss is the divergence
            alone (`ce_share` 0); by default it is the reverse KL. The rounds are equally long, so a few questions may
            be left over, with a warning.
        teacher: a model with the student's vocabulary that runs beside it.
        rounds: how many times the student writes with what it has learnt.
        adapter: the folder of a trained adapter of this model to continue from. Begin with a student that can already
            solve some of the problems: of one that cannot, a teacher only sees bad starts.

    Returns:
        The run; its `traces` are the completions of all rounds.

    Raises:
        ValueError: as `distill`, and: fewer questions than rounds, an option that is for traces alone, a
            tokenizer that is not fast.
        TypeError: `questions` holds something other than Question, or is a file name.
    """
    out, start = Path(out), time.monotonic()
    check_config(config)
    for other in (question for question in questions if not isinstance(question, Question)):
        raise TypeError(f"expected a list of Question, got {show(other)}: read_questions(FILE) reads one from a file")
    asked = saved_instruction(adapter, model.config.name_or_path) if config.instruction is None else None
    config = with_instruction(config, adapter, model)
    writer = Writer(model, tokenizer, asked or instruction_of(tokenizer, config))  # as it was asked before
    examples = _Rounds(writer, _deal(questions, rounds, config), writing, out / SAMPLES, config.seed)
    how = {name: value for name, value in asdict(writing).items() if name != "batch_size"}
    systems = [writer.instruction.system if one.system is None else one.system for one in questions]
    asked_with = [{"problem": one.text, "system": system} for one, system in zip(questions, systems, strict=True)]
    settings: dict[str, Any] = {
        "traces": len(questions),
        "traces_digest": digest_records(asked_with),
        "on_policy": {"rounds": rounds, "epochs": config.epochs} | how,
    }
    shared = systems[0] if len(set(systems)) == 1 else ""
    run = train_examples(
        model,
        tokenizer,
        TrainingData(examples, [], [], settings, shared, is_on_policy=True),
        out,
        replace(config, epochs=float(rounds)),
        quiet,
        teacher=teacher,
        adapter=adapter,
        report_to=report_to,
        progress=_RoundsBar(quiet or not is_first_process(), examples),
        start=start,
    )
    return replace(run, traces=rounds * len(examples))


def check_config(config: DistillConfig) -> None:
    """Raises ValueError for settings with which a student cannot learn from what it writes."""
    if config.objective.ce_share > 0:
        raise ValueError(
            f"ce_share (--ce-weight) must be 0, got {config.objective.ce_share}: the text is the student's own, from "
            "which it would only learn to repeat itself; Objective(beta=1.0, ce_share=0.0) is the default"
        )
    for name in _FOR_TRACES:
        if getattr(config, name) != getattr(DistillConfig, name):
            raise ValueError(f"{name} (--{name.replace('_', '-')}) is for traces: leave it out of on-policy rounds")


def _deal(questions: Sequence[Question], rounds: int, config: DistillConfig) -> list[list[Question]]:
    """The questions of each round, equally many. A pass over all of them is shuffled by the seed."""
    wanted = round(len(questions) * config.epochs)
    if not 1 <= rounds <= wanted:
        raise ValueError(
            f"expected rounds from 1 to the number of questions ({len(questions)} x {config.epochs:g} epochs), "
            f"got {rounds}"
        )
    size = wanted // rounds
    if (left := wanted - size * rounds) and is_first_process():
        warnings.warn(f"{left} of {wanted} problems are left over: {rounds} rounds take {size} each", stacklevel=3)
    draw, order = random.Random(config.seed), list[Question]()
    while len(order) < size * rounds:
        order += draw.sample(questions, len(questions))
    return [order[size * number : size * (number + 1)] for number in range(rounds)]


class _Rounds(Sequence[Example]):
    """The examples of the current round, which `start` writes. Before the first, the one that takes the most memory."""

    def __init__(
        self, writer: Writer, rounds: Sequence[Sequence[Question]], how: Writing, folder: Path, seed: int
    ) -> None:
        self.writer, self.rounds, self.how, self.folder, self.seed = writer, rounds, how, folder, seed
        longest = longest_example(writer, list(chain.from_iterable(rounds)), how)
        self.examples = [longest] * (len(rounds[0]) * how.samples)

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        return self.examples[at]

    def start(self, number: int, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """Writes the completions of a round, or reads them if they are written; returns their records."""
        questions, path = self.rounds[number], self.folder / f"round-{number + 1:03}.jsonl"
        records = write_samples(self.writer, questions, self.how, path, f"{self.seed}:{number}", progress)
        self.examples = [example_of_sample(self.writer, questions[record["number"]], record) for record in records]
        return records


class _RoundsBar(TrainingBar):
    """Starts a round at the beginning of each epoch, and says what was written."""

    def __init__(self, quiet: bool, rounds: _Rounds) -> None:
        super().__init__(quiet)
        self.rounds = rounds

    def on_epoch_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        count = len(self.rounds.rounds)
        number = state.global_step * count // state.max_steps
        name = f"round {number + 1} of {count}"

        def show_written(done: int, total: int) -> None:
            self.bar.update(self.task, description=f"{name}:\nproblems written {done}/{total}")

        records = self.rounds.start(number, show_written)
        if not self.bar.disable:
            print(f"{name}: {summary(records)}", file=sys.stderr)

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        # The next round is written by these weights: a killed run must find them again.
        control.should_save = control.should_save or state.global_step < state.max_steps
        return control

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.rounds.start(len(self.rounds.rounds) - 1, lambda *_: None)  # a run that resumes at its end began no round


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """What was written in a round, in words."""
    length = sum(len(record["ids"]) for record in records) / len(records)
    words = f"{len(records)} completions of {length:.0f} tokens, {_share(records, 'truncated')} cut off"
    graded = [record for record in records if "correct" in record]
    return f"{words}, {_share(graded, 'correct')} right" if graded else words


def _share(records: Sequence[Mapping[str, Any]], field: str) -> str:
    return f"{sum(record[field] for record in records) / len(records):.0%}"
