"""A closed teacher's completions, distilled: what the student learns from them, beside LoRA at an equal budget.

    python bench/experiments closed_teacher --data ../shared/data/reasoning_gym_claude35 --out runs/closed_teacher

The folder holds evaluation results of reasoning-gym tasks, one JSON file per task. The correct completions become
traces, which answer two questions:

1. How far does the loss of held-out traces fall, and how far with LoRA at no more trained values? Both see the same
   batches in the same order, with the same objective, schedule and trainer, each at the best of its rates. Several
   seeds draw the traces, their order and the initial values.
2. What share of freshly generated problems of these tasks does the student solve before and after training, by each
   task's own verifier?

Every finished part is kept in --out and read back, so an interrupted script resumes where it stopped. At the end the
tables are written between the markers of docs/results.md. See also docs/closed_teacher.md.
"""

import argparse
import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from publish import RESULTS, publish
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from experiments.closed_teacher_report import averaged, best, section
from experiments.options import add_options, read_options
from experiments.parts import digest, part
from experiments.teacher_results import one_per_problem, traces_from_results
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import Example, encode_all
from rbfast.data.readers import write_traces
from rbfast.data.trace import Trace
from rbfast.evaluation.evaluate import evaluate
from rbfast.grading.grade import Problem
from rbfast.grading.tasks import load_problems
from rbfast.models.student import SMOLLM2, load_student
from rbfast.training.distill import DistillConfig, distill, placement_scores, trace_loss
from rbfast.training.trainer import DistillTrainer
from rbfast.utils.files import write_text
from rbfast.utils.progress import counting

SECTION = "closed_teacher"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """The settings of the experiment."""

    student: str = _option(SMOLLM2, "hub id, local folder, or the student that installs from PyPI")
    teacher: str = _option("claude-3.5-sonnet", "who wrote the completions")
    held_out: int = _option(40, "traces the comparison measures the loss on")
    train: int = _option(160, "traces the comparison trains on")
    compare_tokens: int = _option(320, "longer traces stay out of the comparison")
    rates: tuple[float, ...] = _option((2e-2, 3e-2, 4e-2), "learning rates of the adapter")
    lora_rates: tuple[float, ...] = _option((2e-2, 3e-2, 4e-2), "learning rates of LoRA")
    lora_rank: int = _option(1, "rank of LoRA, on all linears")
    density: float = _option(0.003, "trained values / all parameters, at most")
    batch_size: int = _option(8, "traces per optimizer step")
    tokens: int = _option(512, "longer traces stay out of the run that is evaluated")
    epochs: float = _option(1.0, "passes of the run that is evaluated")
    problems: int = _option(16, "fresh problems per task")
    max_new_tokens: int = _option(320, "tokens of a completion, at most")
    seed: int = _option(0, "seed of everything random")
    compare_seeds: int = _option(3, "seeds of the comparison, from --seed on")

    def config(self, **more: Any) -> DistillConfig:
        return DistillConfig(density=self.density, batch_size=self.batch_size, seed=self.seed, **more)


# ---------------------------------------------------------------------------------------- held-out loss, beside LoRA


def compare(
    model: PreTrainedModel, examples: Sequence[Example], out: Path, recipe: Recipe, quiet: bool = False
) -> list[dict[str, Any]]:
    """Held-out loss of the untrained student, then of each method at each of its rates; `model` is not changed.

    Returns:
        entries with `method`, `rate` and `values` (trained ones), the losses by role and as `mean`, and `seconds`.
    """
    held_out, train = split_examples(examples, recipe)
    data = digest((example.id, example.input_ids.tolist()) for example in (*held_out, *train))

    @cache
    def scores() -> Any:
        return placement_scores(model, train, recipe.config())

    def sparse(student: PreTrainedModel) -> Any:
        return SparseAdapter.attach(student, recipe.density, seed=recipe.seed)

    def by_gradient(student: PreTrainedModel) -> Any:
        return SparseAdapter.attach(student, recipe.density, placement=scores(), seed=recipe.seed)

    def lora(student: PreTrainedModel) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(recipe.seed)
        rank = recipe.lora_rank  # alpha = rank is a scale of 1, as the adapter's
        return get_peft_model(student, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))

    def entry(name: str, asked: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        record = part(
            out / "compare" / str(recipe.seed) / f"{name}.json",
            {"student": recipe.student, "dtype": str(model.dtype), "data": data, **asked},
            measure,
        )
        return record["result"] | {"seconds": record["seconds"]}

    def before() -> dict[str, Any]:
        return {"method": "before", "rate": None, "values": 0, **trace_loss(model, held_out)}

    def trained(method: str, rate: float, attach: Callable[[PreTrainedModel], Any]) -> dict[str, Any]:
        student = deepcopy(model)
        adapter = attach(student)
        values = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
        with counting(f"{method} at {rate:g}", quiet) as progress:
            train_adapter(student, adapter, train, recipe, rate, progress)
        return {"method": method, "rate": rate, "values": values, **trace_loss(student, held_out)}

    asked = {"batch_size": recipe.batch_size, "seed": recipe.seed}
    density, rank = {"density": recipe.density}, {"rank": recipe.lora_rank}
    methods = (
        ("rbfast", recipe.rates, density, sparse),
        ("columns by gradient", recipe.rates, density, by_gradient),
        ("LoRA", recipe.lora_rates, rank, lora),
    )
    entries = [entry("before", {}, before)]
    for method, rates, budget, attach in methods:
        for rate in rates:
            name = f"{method.replace(' ', '-')}-{rate:g}"
            entries.append(entry(name, asked | budget, partial(trained, method, rate, attach)))
    return entries


def split_examples(examples: Sequence[Example], recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """(held out, trained on), drawn by the seed. Raises ValueError if there are too few."""
    wanted = recipe.held_out + recipe.train
    if len(examples) < wanted:
        raise ValueError(
            f"the comparison needs {wanted} traces of at most {recipe.compare_tokens} tokens, got {len(examples)}; "
            "lower --train or --held-out, or raise --compare-tokens"
        )
    drawn = random.Random(recipe.seed).sample(list(examples), wanted)
    return drawn[: recipe.held_out], drawn[recipe.held_out :]


def train_adapter(
    model: PreTrainedModel,
    adapter: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    rate: float,
    progress: Callable[[int, int], None],
) -> None:
    """Trains `adapter` for one epoch: a SparseAdapter attached to `model`, or a PEFT model made from it."""
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=rate,
            warmup_steps=recipe.config().warmup,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            save_strategy="no",
            logging_strategy="no",
            seed=recipe.seed,
            use_cpu=model.device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = DistillTrainer(model, adapter, arguments, examples, callbacks=[_Steps(progress)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


class _Steps(TrainerCallback):
    """Reports the steps done to a progress bar."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.progress(state.global_step, state.max_steps)


# ------------------------------------------------------------------------------------------- accuracy, before and after


def fresh_problems(tasks: Iterable[str], traces: Iterable[Trace], recipe: Recipe) -> list[Problem]:
    """Newly generated problems of each task; no question of a trace is among them."""
    seen = {trace.problem for trace in traces}
    return [p for task in tasks for p in load_problems(task, recipe.problems, recipe.seed, exclude=seen)]


def distil_and_evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    out: Path,
    recipe: Recipe,
    rate: float,
    quiet: bool = False,
) -> dict[str, Any]:
    """Solves the problems, trains on the traces, solves them again; `model` is left with the adapter attached.

    Returns:
        `before` and `after` (records of `Result.to_dict`, in the order of the problems), `trained` (traces, steps,
        rate, values, percent, seconds), `seconds`.
    """
    asked = {"student": recipe.student, "dtype": str(model.dtype), "max_new_tokens": recipe.max_new_tokens}
    asked |= {"problems": digest(problem.question for problem in problems)}

    def measure(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        def solve() -> list[dict[str, Any]]:
            with counting(f"evaluating {name} training", quiet) as progress:
                limit = recipe.max_new_tokens
                results = evaluate(model, tokenizer, problems, max_new_tokens=limit, progress=progress)
                return [result.to_dict() for result in results]

        return part(out / f"{name}.json", asked, solve)

    before = measure("before", asked)
    config = recipe.config(epochs=recipe.epochs, learning_rate=rate, max_tokens=recipe.tokens, save_steps=10)
    run = distill(model, tokenizer, traces, out / "adapter", config, quiet=quiet)
    asked |= {"training": asdict(config), "traces": digest(trace.to_dict() for trace in traces)}
    values = sum(parameter.numel() for parameter in run.adapter.parameters())
    trained = {"traces": len(traces) - len(run.skipped), "steps": len(run.log_history), "rate": rate, "values": values}
    trained |= {"percent": run.adapter.trainable_percent, "seconds": run.seconds}
    training = part(out / "training.json", asked, lambda: trained)["result"]  # keeps the seconds of the first run
    after = measure("after", asked)
    seconds = before["seconds"] + training["seconds"] + after["seconds"]
    return {"before": before["result"], "after": after["result"], "trained": training, "seconds": seconds}


# ---------------------------------------------------------------------------------------------------------- everything


def run_recipe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    out: Path,
    recipe: Recipe,
    command: str,
    quiet: bool = False,
) -> str:
    """Runs both experiments in the folder `out`, writes the section to `out/section.md` and returns it."""
    traces, fates = traces_from_results(data, recipe.teacher)
    write_traces(out / "traces.jsonl", traces)
    chosen = one_per_problem(traces)
    problems = fresh_problems(fates, traces, recipe)
    short, _ = encode_all(chosen, tokenizer, max_tokens=recipe.compare_tokens)
    seeds = range(recipe.seed, recipe.seed + recipe.compare_seeds)
    entries = averaged([compare(model, short, out, replace(recipe, seed=seed), quiet) for seed in seeds])
    rate = best(entries, "rbfast")["rate"]
    measured = distil_and_evaluate(model, tokenizer, chosen, problems, out, recipe, rate, quiet)
    trained, _ = encode_all(chosen, tokenizer, max_tokens=recipe.tokens)
    source = {trace.id: trace.source for trace in chosen}
    fitting = Counter(str(source[example.id]) for example in trained)
    text = section(recipe, model.dtype, fates, entries, measured, fitting, command)
    write_text(out / "section.md", text)
    return text


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of results, one JSON file for each task")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment; run again to resume")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file to put the section in")
    add_options(parser, Recipe)
    args = parser.parse_args(argv)
    recipe = read_options(args, Recipe)
    command = shlex.join(["python", "bench/experiments", "closed_teacher", *argv])

    def make() -> str:
        model, tokenizer = load_student(recipe.student)
        return run_recipe(model, tokenizer, args.data, args.out, recipe, command)

    return publish("closed_teacher", args.results, SECTION, make)
