"""On-policy distillation in one call: in each round the student writes completions of problems, then learns what the
teacher would have written at each of their tokens.

```python
model, tokenizer = load_student("smollm2-135m")
teacher = load_teacher("their-model", tokenizer, model.dtype)
run = distill_on_policy(model, tokenizer, read_questions("problems.jsonl"), "runs/own", teacher=teacher, rounds=8)
```

A round is an epoch of one training, so AdamW and the schedule continue across rounds. The folder is that of
`distill`; `samples/` holds the completions.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rbfast.data.encoding import Example
from rbfast.data.instruction import saved_instruction
from rbfast.inference.cache import cache_bytes
from rbfast.on_policy.samples import Writer, Writing, example_of_sample, longest_example, write_samples
from rbfast.on_policy.served_teacher import ServedTeacher
from rbfast.teacher.jobs import Question
from rbfast.training.distill import (
    Run,
    TrainingData,
    plan_examples,
    shared_system_prompt,
    train_examples,
    with_instruction,
)
from rbfast.training.distill_config import DistillConfig
from rbfast.training.examples import check_items, instruction_of
from rbfast.training.objective import Objective
from rbfast.training.plan import Plan
from rbfast.training.resume import digest_records
from rbfast.training.training_bar import TrainingBar
from rbfast.utils.processes import is_first_process

SAMPLES, SIGNALS = "samples", "signals"
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
    teacher: PreTrainedModel | ServedTeacher,
    rounds: int = 8,
    writing: Writing = Writing(),
    adapter: str | Path | None = None,
    report_to: Sequence[str] = (),
) -> Run:
    """Trains an adapter of `model` on its own completions of `questions`, as `distill` trains one on traces: the same
    folder, the same resuming, the same state of the model afterwards.

    Args:
        config: `epochs` is the number of passes over the questions, which are divided evenly among the rounds. A
            remainder is left out, with a warning. The loss is the divergence alone (`ce_share` 0), by default the
            reverse KL.
        teacher: a model with the student's vocabulary that runs beside it, or on a server.
        rounds: how many times the student writes and is trained.
        adapter: the folder or hub id of a trained adapter of this model to continue from. Begin with a student that
            already solves some of the problems; otherwise the teacher sees only bad beginnings.

    Returns:
        The run; its `traces` are the completions of all rounds.

    Raises:
        ValueError: as `distill`, and: fewer questions than rounds, an option that only makes sense for traces, a
            tokenizer that is not fast; a server whose tokens are not the student's (TokenizersDiffer).
        TypeError: `questions` holds something other than Question, or is a file name.
        ServerError: the server of the teacher does not score prompts, or gives up. What was written is kept.
    """
    out, start = Path(out), time.monotonic()
    examples, data, config = _prepare(
        model, tokenizer, questions, out / SAMPLES, config, teacher, rounds, writing, adapter
    )
    if examples.teacher is not None and not (out / SAMPLES).exists():
        # Before the folder is tied to the settings.
        examples.teacher.check(examples.writer.prompt_ids(questions[0]), tokenizer)
    progress = TrainingBar(quiet or not is_first_process())
    run = train_examples(
        model,
        tokenizer,
        data,
        out,
        config,
        quiet,
        teacher=_beside(teacher),
        adapter=adapter,
        report_to=report_to,
        progress=progress,
        callbacks=[_RoundStarter(examples, progress)],
        start=start,
    )
    return replace(run, traces=rounds * len(examples))


def plan_on_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    config: DistillConfig = DEFAULTS,
    *,
    teacher: PreTrainedModel | ServedTeacher,
    rounds: int = 8,
    writing: Writing = Writing(),
    adapter: str | Path | None = None,
) -> Plan:
    """The resources that `distill_on_policy` would need with these arguments, if all completions were as long as they
    may be. Writes and trains nothing. Raises ValueError and TypeError as `distill_on_policy` does."""
    _, data, config = _prepare(model, tokenizer, questions, Path(SAMPLES), config, teacher, rounds, writing, adapter)
    return plan_examples(model, data, config, _beside(teacher), adapter)


def _beside(teacher: PreTrainedModel | ServedTeacher) -> PreTrainedModel | None:
    return None if isinstance(teacher, ServedTeacher) else teacher


def _prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    folder: Path,
    config: DistillConfig,
    teacher: PreTrainedModel | ServedTeacher,
    rounds: int,
    writing: Writing,
    adapter: str | Path | None,
) -> tuple[_Rounds, TrainingData, DistillConfig]:
    """The examples, which change with each round; and the data and the config of the training on them."""
    check_config(config)
    check_items(questions, Question, "rbfast.teacher.solutions.read_questions")
    former = saved_instruction(adapter, model.config.name_or_path) if config.instruction is None else None
    config = with_instruction(config, adapter, model)
    writer = Writer(model, tokenizer, former or instruction_of(tokenizer, config))
    served = teacher if isinstance(teacher, ServedTeacher) else None
    examples = _Rounds(writer, _deal(questions, rounds, config), writing, folder, config.seed, served)
    data = TrainingData(
        examples,
        [],
        [],
        _settings(writer, questions, rounds, config.epochs, writing, served),
        shared_system_prompt(map(writer.system, questions)),
        is_on_policy=True,
        cache=cache_bytes(model, min(writing.batch_size, len(examples)), len(examples[0].input_ids)),  # of the longest
    )
    return examples, data, replace(config, epochs=float(rounds))


def _settings(
    writer: Writer,
    questions: Sequence[Question],
    rounds: int,
    epochs: float,
    writing: Writing,
    served: ServedTeacher | None,
) -> dict[str, Any]:
    """The settings of a run for run.json, apart from those of its config."""
    asked = [{"problem": question.text, "system": writer.system(question)} for question in questions]
    on_policy = {"rounds": rounds, "epochs": epochs} | asdict(writing)
    del on_policy["batch_size"]  # it may differ when a run resumes
    settings = {"traces": len(questions), "traces_digest": digest_records(asked), "on_policy": on_policy}
    if served is not None:
        on_policy["top_k"] = served.k
        settings["teacher"] = served.server.model
    return settings


def check_config(config: DistillConfig) -> None:
    """Raises ValueError for settings that do not fit on-policy rounds."""
    if config.objective.ce_share > 0:
        raise ValueError(
            f"ce_share (--ce-weight) must be 0, got {config.objective.ce_share}: the text is the student's own, so "
            "training on it would teach nothing; Objective(beta=1.0, ce_share=0.0) is the default"
        )
    for name in _FOR_TRACES:
        if getattr(config, name) != getattr(DistillConfig, name):
            raise ValueError(f"{name} (--{name.replace('_', '-')}) is for traces: leave it out of on-policy rounds")


def _deal(questions: Sequence[Question], rounds: int, config: DistillConfig) -> list[list[Question]]:
    """The questions of each round, in equal numbers. Each pass over all questions has its own order."""
    wanted = round(len(questions) * config.epochs)
    if not 1 <= rounds <= wanted:
        raise ValueError(
            f"expected rounds from 1 to the number of questions ({len(questions)} x {config.epochs:g} epochs), "
            f"got {rounds}"
        )
    size = wanted // rounds
    if (left := wanted - size * rounds) and is_first_process():
        warnings.warn(f"{left} of {wanted} problems are left out: {rounds} rounds take {size} each", stacklevel=3)
    draw, order = random.Random(config.seed), list[Question]()
    while len(order) < size * rounds:
        order += draw.sample(questions, len(questions))
    return [order[size * number : size * (number + 1)] for number in range(rounds)]


class _Rounds(Sequence[Example]):
    """The examples of the current round, which `_RoundStarter` starts as an epoch begins. Before the first, the longest
    possible ones, for the plan of the memory."""

    def __init__(
        self,
        writer: Writer,
        rounds: Sequence[Sequence[Question]],
        writing: Writing,
        folder: Path,
        seed: int,
        teacher: ServedTeacher | None,
    ) -> None:
        self.writer, self.rounds, self.writing, self.folder, self.seed = writer, rounds, writing, folder, seed
        self.teacher = teacher
        self.number: int | None = None
        longest = longest_example(writer, list(chain.from_iterable(rounds)), writing)
        self.examples = [longest] * (len(rounds[0]) * writing.samples)

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        return self.examples[at]

    def start(self, number: int, show: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[str]]:
        """Starts a round: writes its completions, or reads those that are written, and makes them the examples.

        Returns:
            The records of the completions, and the reasons for which the teacher's server refused some.
        """
        self.number = number
        questions, path = self.rounds[number], self.folder / f"round-{number + 1:03}.jsonl"
        named, written = f"{self.seed}:{number}", partial(_show, show, "problems written")
        records = write_samples(self.writer, questions, self.writing, path, named, written)
        self.examples = [example_of_sample(self.writer, questions[record["number"]], record) for record in records]
        if self.teacher is None:
            return records, []
        signals, scored = self.folder / SIGNALS / path.stem, partial(_show, show, "completions scored")
        return records, self.teacher.correct(self.examples, self.writer.tokenizer, signals, scored)


def _show(show: Callable[[str], None], what: str, done: int, total: int) -> None:
    show(f"{what} {done}/{total}")


class _RoundStarter(TrainerCallback):
    """Starts a round at the beginning of each epoch, and reports what was written."""

    def __init__(self, rounds: _Rounds, progress: TrainingBar) -> None:
        self.rounds, self.progress = rounds, progress

    def on_epoch_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        count = len(self.rounds.rounds)
        number = state.global_step * count // state.max_steps
        name = f"round {number + 1} of {count}"
        records, refused = self.rounds.start(number, lambda what: self.progress.show(f"{name}:\n{what}"))
        if refused and is_first_process():
            warnings.warn(
                f"{name}: {len(refused)} of {len(records)} completions are not trained on, because the teacher's "
                f"server did not score them: {refused[0]}",
                stacklevel=2,
            )
        self.progress.print(f"{name}: {summary(records)}")

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        # A killed run must find the weights that write the next round.
        control.should_save = control.should_save or state.global_step < state.max_steps
        return control

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.rounds.number is None:  # the run resumed at its end, and its cost counts the tokens of a round
            self.rounds.start(len(self.rounds.rounds) - 1, lambda _: None)


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """A line about the completions of a round."""
    length = sum(len(record["ids"]) for record in records) / len(records)
    words = f"{len(records)} completions of {length:.0f} tokens, {_share(records, 'truncated')} cut off"
    graded = [record for record in records if "correct" in record]
    return f"{words}, {_share(graded, 'correct')} right" if graded else words


def _share(records: Sequence[Mapping[str, Any]], field: str) -> str:
    return f"{sum(record[field] for record in records) / len(records):.0%}"
