"""What on-policy rounds add to a student trained on too few traces, against other ways to spend the same steps.

    python bench/experiments on_policy --out runs/on_policy

A teacher is trained on many of the demo's traces, a student on few. Then the student gets the same number of steps,

- on its few traces again;
- on completions that the teacher writes of other problems, with the teacher beside it (text and forward KL);
- on its own completions of the same problems, with the teacher beside it (reverse KL), in rounds.

Every finished part is kept in --out, so an interrupted script resumes. Accuracy is greedy, on held-out problems.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.options import add_options, read_options
from experiments.parts import digest, part
from rbfast.data.chat_template import default_instruction
from rbfast.data.trace import Trace
from rbfast.demo.worked_families import split
from rbfast.evaluation.evaluate import evaluate, summarize
from rbfast.grading.grade import Problem
from rbfast.models.student import SMOLLM2, fast_dtype, load_student
from rbfast.on_policy.rounds import DEFAULTS, distill_on_policy
from rbfast.on_policy.samples import Writer, Writing, example_of_sample, write_samples
from rbfast.teacher.jobs import Question
from rbfast.training.distill import Run, TrainingData, distill, train_examples
from rbfast.training.distill_config import DistillConfig

ARMS = ("the few traces again", "the teacher's text", "on-policy rounds")


@dataclass(frozen=True)
class Settings:
    """Numbers of traces and problems are per family."""

    families: tuple[str, ...] = ("aiw", "leg_counting")
    taught: int = 140
    taught_epochs: float = 2.0
    few: int = 16
    few_epochs: float = 3.0
    problems: int = 96
    rounds: int = 6
    held_out: int = 48
    max_new_tokens: int = 320
    batch_size: int = 4
    rate: float = 1e-2
    later_rate: float = 3e-3
    density: float = 0.003
    seed: int = 0

    def config(self, **more: Any) -> DistillConfig:
        return DistillConfig(batch_size=self.batch_size, seed=self.seed, save_steps=20, **more)


@dataclass(frozen=True)
class Data:
    """The traces that teacher and student are trained on, the problems of the rounds, and those of the evaluation."""

    taught: list[Trace]
    few: list[Trace]
    questions: list[Question]
    held_out: list[Problem]


def make_data(settings: Settings) -> Data:
    data = Data([], [], [], [])
    for family in settings.families:
        wanted = settings.taught + settings.few + settings.problems
        traces, problems = split(family, train=wanted, held_out=settings.held_out, seed=settings.seed)
        data.taught.extend(traces[: settings.taught])
        data.few.extend(traces[settings.taught : settings.taught + settings.few])
        data.questions.extend(Question(trace.problem) for trace in traces[settings.taught + settings.few :])
        data.held_out.extend(problems)
    return data


def run(
    out: Path, settings: Settings, load: Callable[[], tuple[Any, Any]], quiet: bool = False
) -> list[dict[str, Any]]:
    """A record of the teacher, of the initial student and of each arm: `who`, `n`, `accuracy` and its interval."""
    data, asked = make_data(settings), asdict(settings)
    teacher, tokenizer = load()
    student, _ = load()
    writing = Writing(max_new_tokens=settings.max_new_tokens)
    config = settings.config(learning_rate=settings.later_rate)
    steps = len(data.questions) // settings.batch_size
    if len(data.questions) % (settings.rounds * settings.batch_size):
        raise ValueError(
            "each round must be whole batches, so that the arms take the same steps: change problems, rounds or "
            "batch_size"
        )

    def measured(who: str, model: PreTrainedModel, trained: Run) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            results = evaluate(model, tokenizer, data.held_out, max_new_tokens=settings.max_new_tokens, batch_size=48)
            return summarize(results) | {"steps": len(trained.log_history)}

        return {"who": who} | part(out / f"{who}.json", asked, measure)["result"]

    first = settings.config(learning_rate=settings.rate, density=settings.density)
    long, short = (replace(first, epochs=epochs) for epochs in (settings.taught_epochs, settings.few_epochs))
    taught = distill(teacher, tokenizer, data.taught, out / "teacher", long, quiet)
    records = [measured("teacher", teacher, taught)]
    taught.adapter.merge()
    begun = distill(student, tokenizer, data.few, out / "student", short, quiet)
    records.append(measured("student", student, begun))
    begun.adapter.detach()

    def again(folder: Path) -> Run:
        repeated = replace(config, epochs=steps * settings.batch_size / len(data.few))
        return distill(student, tokenizer, data.few, folder, repeated, quiet, adapter=out / "student")

    def teachers_text(folder: Path) -> Run:
        writer = Writer(teacher, tokenizer, default_instruction(tokenizer))
        path = out / "teacher.samples.jsonl"
        written = write_samples(writer, data.questions, writing, path, f"{settings.seed}", lambda *_: None)
        examples = [example_of_sample(writer, data.questions[record["number"]], record) for record in written]
        described = {"traces": len(examples), "traces_digest": digest(written)}
        return train_examples(
            student,
            tokenizer,
            TrainingData(examples, [], [], described),
            folder,
            config,
            quiet,
            teacher=teacher,
            adapter=out / "student",
            start=time.monotonic(),
        )

    def rounds(folder: Path) -> Run:
        return distill_on_policy(
            student,
            tokenizer,
            data.questions,
            folder,
            replace(config, objective=DEFAULTS.objective),
            quiet,
            teacher=teacher,
            rounds=settings.rounds,
            writing=writing,
            adapter=out / "student",
        )

    for who, train in zip(ARMS, (again, teachers_text, rounds), strict=True):
        trained = train(out / who)
        records.append(measured(who, student, trained))
        trained.adapter.detach()
    return records


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment; run again to resume")
    parser.add_argument("--device", default="cpu")
    add_options(parser, Settings)
    args = parser.parse_args(argv)

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_student(SMOLLM2, fast_dtype(args.device))
        return model.to(torch.device(args.device)), tokenizer  # type: ignore[arg-type]

    for record in run(args.out, read_options(args, Settings), load):
        print(json.dumps(record))
    return 0
