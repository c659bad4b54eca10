"""What curation and hierarchy are worth: one student, trained on chosen traces, on random ones, and with flat weights.

    python bench/experiments evidence --data ../shared/data/reasoning_gym_claude35 --out runs/evidence

The folder holds evaluation results of reasoning-gym tasks with several completions per problem. Every completion that
reasons, tags an answer and fits becomes an item of the pool, right or wrong, except for some held-out problems.
The arms train the same student for the same steps at the same rate:

- curated: what `rbfast.curate` chooses from the pool with its defaults;
- random: as many items, drawn from the pool and exchanged at random until they have as many tokens;
- random, right: the same from the right items alone, to separate verification from the rest of the curation;
- curated, flat: the curated traces, with every token weighing the same.

Each is repeated for several seeds, which draw the held-out problems, the fresh problems, the random items and the order
of training. Measured: accuracy on fresh problems, by each task's own verifier, and the loss of right held-out traces.
Every finished part is kept in --out and read back. The tables are written to docs/results.md.
"""

import argparse
import random
import shlex
import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from publish import RESULTS, cpu, publish
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.parts import digest, part
from experiments.teacher_results import one_per_problem, traces_from_results
from rbfast.curation.curate import CurateConfig, curate
from rbfast.data.encoding import encode_all
from rbfast.data.readers import read_traces, write_traces
from rbfast.data.trace import Trace
from rbfast.evaluation.evaluate import evaluate
from rbfast.evaluation.statistics import paired_difference
from rbfast.grading.grade import Problem
from rbfast.grading.tasks import load_problems
from rbfast.models.student import SMOLLM2, load_student
from rbfast.training.distill import DistillConfig, distill, trace_loss
from rbfast.training.objective import Objective
from rbfast.utils.progress import counting

SECTION = "evidence"
TEACHER = "claude-3.5-sonnet"
ARMS = ("curated", "random", "curated, flat", "random, right")
SAME_TOKENS = 0.005  # relative


@dataclass(frozen=True)
class Settings:
    size: int  # traces of each arm
    held_out: int  # problems per task kept out of the pool
    problems: int  # fresh problems per task
    tokens: int  # longer traces are left out of the pool
    max_new_tokens: int
    rate: float
    tested: tuple[str, ...] = ()  # the tasks of the fresh problems; empty: all
    student: str = SMOLLM2
    density: float = 0.003


@dataclass(frozen=True)
class Split:
    """What the arms of one seed share."""

    pool: list[Trace]
    held_out: list[Trace]  # right ones, one per problem
    problems: list[Problem]
    lengths: dict[str, int]  # tokens of a trace, by its id

    def tokens(self, traces: Sequence[Trace]) -> int:
        return sum(self.lengths[str(trace.id)] for trace in traces)


def split(
    traces: Sequence[Trace], tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int, settings: Settings
) -> Split:
    """The pool, and the traces and problems to measure on; they share no problem."""
    rng = random.Random(seed)
    aside: set[str] = set()
    for task in tasks:
        mine = list(dict.fromkeys(trace.problem for trace in traces if trace.source == task))
        aside.update(rng.sample(mine, min(settings.held_out, len(mine))))
    examples, _ = encode_all(traces, tokenizer, max_tokens=settings.tokens)
    lengths = {str(example.id): len(example.input_ids) for example in examples}
    fitting = [trace for trace in traces if trace.id in lengths]
    pool = [trace for trace in fitting if trace.problem not in aside]
    held_out = one_per_problem(trace for trace in fitting if trace.problem in aside and trace.verified)
    seen = {trace.problem for trace in traces}
    tested = settings.tested or tasks
    problems = [p for task in tested for p in load_problems(task, settings.problems, 1000 + seed, exclude=seen)]
    return Split(pool, held_out, problems, lengths)


def curated(split: Split, seed: int, settings: Settings) -> list[Trace]:
    with TemporaryDirectory() as folder:
        write_traces(Path(folder) / "pool.jsonl", split.pool)
        chosen = curate([Path(folder) / "pool.jsonl"], folder, CurateConfig(size=settings.size, seed=seed))
        return read_traces(chosen.out / "reason1k.jsonl")


def drawn(items: Sequence[Trace], lengths: Mapping[str, int], size: int, tokens: int, seed: int) -> list[Trace]:
    """`size` random items, then random swaps that move towards `tokens`, until they have that many.

    Raises:
        ValueError: too few items, or no swap reaches `tokens`.
    """
    if len(items) < size:
        raise ValueError(f"expected at least {size} items to draw from, got {len(items)}; lower --size")
    rng = random.Random(seed)
    shuffled = rng.sample(list(items), len(items))
    inside, outside = shuffled[:size], shuffled[size:]
    total = sum(lengths[str(trace.id)] for trace in inside)
    for _ in range(100_000):
        if abs(total - tokens) <= SAME_TOKENS * tokens:
            return inside
        if not outside:
            break
        i, j = rng.randrange(len(inside)), rng.randrange(len(outside))
        change = lengths[str(outside[j].id)] - lengths[str(inside[i].id)]
        if abs(total + change - tokens) < abs(total - tokens):
            inside[i], outside[j] = outside[j], inside[i]
            total += change
    raise ValueError(f"{size} of these {len(items)} items cannot have {tokens} tokens: the nearest found is {total}")


def flat(traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Objective:
    """An objective that weighs roles by their share of the tokens, without annealing: every token counts the same."""
    examples, _ = encode_all(traces, tokenizer, max_tokens=settings.tokens)
    roles = np.concatenate([example.roles for example in examples])
    strategic, tactical, answer = (np.bincount(roles[roles >= 0], minlength=3) / np.sum(roles >= 0)).tolist()
    return Objective(strategic, tactical, answer, anneal=0.0)


def arms(split: Split, tokenizer: PreTrainedTokenizerBase, seed: int, settings: Settings) -> dict[str, list[Trace]]:
    """The traces of every arm."""
    chosen = curated(split, seed, settings)
    draw = partial(drawn, lengths=split.lengths, size=len(chosen), tokens=split.tokens(chosen), seed=seed)
    right = [trace for trace in split.pool if trace.verified]
    return {
        "curated": chosen,
        "random": draw(split.pool),
        "curated, flat": chosen,
        "random, right": draw(right),
    }


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    settings: Settings,
    title: str,
    quiet: bool,
) -> dict[str, Any]:
    """The loss of the held-out traces, and for each problem whether it is solved."""
    examples, _ = encode_all(split.held_out, tokenizer, max_tokens=settings.tokens)
    with counting(title, quiet) as progress:
        results = evaluate(
            model, tokenizer, split.problems, max_new_tokens=settings.max_new_tokens, batch_size=80, progress=progress
        )
    return {"loss": trace_loss(model, examples), "solved": [result.correct for result in results]}


def train_and_measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    split: Split,
    objective: Objective,
    seed: int,
    settings: Settings,
    title: str,
    quiet: bool,
) -> dict[str, Any]:
    student = deepcopy(model)
    config = DistillConfig(
        settings.density, learning_rate=settings.rate, max_tokens=settings.tokens, seed=seed, objective=objective
    )
    with TemporaryDirectory() as folder:
        run = distill(student, tokenizer, traces, folder, config, quiet=quiet)
    measured = measure(student, tokenizer, split, settings, f"evaluating {title}", quiet)
    return measured | {
        "traces": len(traces),
        "right": sum(trace.verified is True for trace in traces),
        "tokens": split.tokens(traces),
        "steps": len(run.log_history),
    }


def run_seed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    tasks: Sequence[str],
    seed: int,
    out: Path,
    settings: Settings,
    names: Sequence[str] = ARMS,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measurements before training, and after training each of the arms named."""
    shared = split(traces, tasks, tokenizer, seed, settings)
    asked = asdict(settings) | {"dtype": str(model.dtype), "problems": digest(p.question for p in shared.problems)}
    found = {
        "before": part(
            out / f"{seed}-before.json",
            asked,
            lambda: measure(model, tokenizer, shared, settings, "evaluating before training", quiet),
        )["result"]
    }
    chosen_by = arms(shared, tokenizer, seed, settings)
    for name in names:
        chosen = chosen_by[name]
        objective = flat(chosen, tokenizer, settings) if name == "curated, flat" else Objective()
        found[name] = part(
            out / f"{seed}-{name.replace(', ', '-')}.json",
            asked | {"objective": asdict(objective), "traces": digest(trace.to_dict() for trace in chosen)},
            partial(
                train_and_measure, model, tokenizer, chosen, shared, objective, seed, settings, f"{name}, {seed}", quiet
            ),
        )["result"]
    return found


# ---------------------------------------------------------------------------------------------------------- the section


def _spread(values: Sequence[float]) -> str:
    """The mean, and each seed's value."""
    return f"{statistics.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def _gain(first: Sequence[bool], second: Sequence[bool]) -> str:
    gain = paired_difference([float(x) for x in first], [float(x) for x in second])
    return f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f})"


def section(found: Sequence[Mapping[str, Mapping[str, Any]]], settings: Settings, command: str, dtype: Any) -> str:
    """The measurements as Markdown; `found` has an entry for each seed."""
    solved = {name: [one for seed in found for one in seed[name]["solved"]] for name in found[0]}
    table = [
        "| trained on | of them right | tokens | loss of held-out traces, each seed | solved | gain over before |",
        "| --- " * 6 + "|",
    ]
    for name in found[0]:
        share = f"{100 * sum(solved[name]) / len(solved[name]):.1f}%"
        loss = _spread([seed[name]["loss"]["mean"] for seed in found])
        if name == "before":
            table.append(f"| nothing | | | {loss} | {share} | |")
            continue
        right = statistics.mean(seed[name]["right"] / seed[name]["traces"] for seed in found)
        tokens = statistics.mean(seed[name]["tokens"] for seed in found)
        gain = _gain(solved["before"], solved[name])
        table.append(f"| {name} | {100 * right:.0f}% | {tokens:,.0f} | {loss} | {share} | {gain} |")
    others = [name for name in found[0] if name not in ("before", "curated")]
    compared = [
        f"- curated against {other}: {_gain(solved[other], solved['curated'])} points of accuracy; loss "
        f"{_spread([seed['curated']['loss']['mean'] - seed[other]['loss']['mean'] for seed in found])}."
        for other in others
    ]
    one, fresh = found[0]["curated"], len(found[0]["before"]["solved"])
    return "\n".join(
        [
            "## What curation and hierarchy are worth",
            "",
            f"`{command}`",
            "",
            f"Student: {settings.student}, {dtype}; {one['traces']} traces of {TEACHER}, {one['steps']} steps of 8 at",
            f"{settings.rate:g}; {len(found)} seeds, {fresh} fresh problems each"
            f"{' of ' + ', '.join(settings.tested) if settings.tested else ''}; greedy, at most "
            f"{settings.max_new_tokens} tokens.",
            "95% intervals for paired proportions, all seeds together. The loss is in nats per token, on right traces",
            "of problems that no arm has seen.",
            "",
            *table,
            "",
            "The difference in accuracy with its interval, and in loss for each seed (below 0: curated is better):",
            "",
            *compared,
            "",
            f"{date.today()}; {cpu()}, {torch.get_num_threads()} threads; torch {torch.__version__}.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of results, one JSON file for each task")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment; run again to resume")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file to put the section in")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all")
    parser.add_argument("--size", type=int, default=400, help="traces of each arm (default: 400)")
    parser.add_argument("--held-out", type=int, default=4, help="problems per task kept out of the pool (default: 4)")
    parser.add_argument("--tested", nargs="+", default=[], help="tasks of the fresh problems (default: all)")
    parser.add_argument("--problems", type=int, default=16, help="fresh problems per task (default: 16)")
    parser.add_argument("--tokens", type=int, default=512, help="longer traces are left out (default: 512)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of a completion (default: 256)")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate (default: 0.01)")
    args = parser.parse_args(argv)
    settings = Settings(
        args.size, args.held_out, args.problems, args.tokens, args.max_new_tokens, args.rate, tuple(args.tested)
    )

    def make() -> str:
        model, tokenizer = load_student(settings.student)
        traces, fates = traces_from_results(args.data, TEACHER, incorrect=True)
        names = dict.fromkeys(["curated", *args.arms])
        found = [
            run_seed(model, tokenizer, traces, list(fates), seed, args.out, settings, list(names))
            for seed in range(args.seeds)
        ]
        return section(found, settings, shlex.join(["python", "bench/experiments", "evidence", *argv]), model.dtype)

    return publish("evidence", args.results, SECTION, make)
