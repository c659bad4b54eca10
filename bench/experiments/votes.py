"""Test-time scaling by votes: the demo's student samples each held-out problem several times, and the answers vote.

    make demo && python bench/experiments votes --run runs/demo --out runs/votes

Every problem is sampled --samples times. For n votes the samples form groups of n, and a problem's score is the share
of its groups whose vote is right. Greedy decoding of the same problems is the reference. The table is written to
docs/results.md, the picture beside it. Finished problems are kept in --out.
"""

import argparse
import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from publish import RESULTS, cpu, publish

from experiments.parts import digest
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.demo.run import FAMILIES, HELD_OUT, MAX_NEW_TOKENS, TRAIN
from rbfast.demo.worked_families import split
from rbfast.evaluation.evaluate import Result, by_problem, evaluate, majority_correct
from rbfast.evaluation.statistics import paired_difference, pass_at_k
from rbfast.models.student import SMOLLM2, load_student
from rbfast.utils.files import atomic_write
from rbfast.utils.progress import counting

SECTION = "votes"


def voted(items: Sequence[Sequence[Result]], n: int) -> list[float]:
    """For each problem the share of its groups of n samples whose vote is right."""
    groups = [[item[i : i + n] for i in range(0, len(item), n)] for item in items]
    return [sum(map(majority_correct, group)) / len(group) for group in groups]


def solvable(items: Sequence[Sequence[Result]], n: int) -> float:
    """The chance that at least one of n samples is right, over the problems."""
    return sum(pass_at_k(len(item), sum(r.correct for r in item), n) for item in items) / len(items)


def sizes(samples: int) -> list[int]:
    """The powers of two up to `samples`."""
    return [2**power for power in range(samples.bit_length())]


def tokens(items: Sequence[Sequence[Result]]) -> float:
    """The mean number of tokens of a completion."""
    counts = [result.completion.tokens for item in items for result in item]
    return sum(counts) / len(counts)


def table(greedy: Sequence[Sequence[Result]], sampled: Sequence[Sequence[Result]]) -> list[str]:
    """A row for greedy decoding and one for each number of votes."""
    reference = voted(greedy, 1)
    lines = [
        "| votes | tokens for each problem | one of them is right | the vote is right | over greedy, 95% interval |",
        "| --- | --- | --- | --- | --- |",
        f"| greedy | {tokens(greedy):.0f} | | {percent(reference):.1f}% | |",
    ]
    for n in sizes(len(sampled[0])):
        scores = voted(sampled, n)
        gain = paired_difference(reference, scores)
        lines.append(
            f"| {n} | {n * tokens(sampled):.0f} | {100 * solvable(sampled, n):.1f}% | {percent(scores):.1f}% "
            f"| {100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f}) |"
        )
    return lines


def percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)


def draw(greedy: Sequence[Sequence[Result]], sampled: Sequence[Sequence[Result]]) -> Figure:
    """The shares solved by votes, and by any of the samples, against the number of samples."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes, counts = figure.subplots(), sizes(len(sampled[0]))
    axes.plot(counts, [100 * solvable(sampled, n) for n in counts], marker="o", markersize=3, label="one is right")
    axes.plot(counts, [percent(voted(sampled, n)) for n in counts], marker="o", markersize=3, label="the vote is right")
    axes.axhline(percent(voted(greedy, 1)), color="gray", linestyle="--", linewidth=1, label="greedy")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="samples of each problem", ylabel="solved (%)", ylim=(0, None), xticks=counts)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure


def section(
    greedy: Sequence[Sequence[Result]], sampled: Sequence[Sequence[Result]], settings: dict[str, Any], command: str
) -> str:
    return "\n".join(
        [
            "## Accuracy against the number of votes",
            "",
            f"`{command}`",
            "",
            f"The demo's student on {len(greedy)} of the demo's held-out problems, {len(sampled[0])} samples of",
            f"each at temperature {settings['temperature']:g}, top-p {settings['top_p']:g}; at most "
            f"{MAX_NEW_TOKENS} tokens.",
            "",
            *table(greedy, sampled),
            "",
            f"![accuracy against the number of votes]({SECTION}.png)",
            "",
            f"{date.today()}; {cpu()}, {torch.get_num_threads()} threads; torch {torch.__version__}.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the demo's run, with its adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment; run again to resume")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file to put the section in")
    parser.add_argument("--samples", type=int, default=16, help="samples of a problem, a power of two (default: 16)")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--problems", type=int, default=24, help="problems per family, at most (default: 24)")
    args = parser.parse_args(argv)
    if args.samples < 2 or args.samples & (args.samples - 1):
        parser.error(f"--samples must be a power of two, at least 2, got {args.samples}")

    def make() -> str:
        model, tokenizer = load_student(SMOLLM2)
        adapter = SparseAdapter.from_pretrained(model, args.run)
        label = digest(parameter.tolist() for parameter in adapter.parameters())
        splits = [split(name, train=TRAIN, held_out=HELD_OUT, seed=0)[1] for name in FAMILIES]
        problems = [problem for family in splits for problem in family[: args.problems]]
        sampling = {"samples": args.samples, "temperature": args.temperature, "top_p": args.top_p}

        def measure(name: str, **decoding: Any) -> list[list[Result]]:
            keep = args.out / f"{name}.jsonl"
            with counting(name) as progress:
                found = evaluate(
                    model,
                    tokenizer,
                    problems,
                    batch_size=64,
                    keep=keep,
                    progress=progress,
                    max_new_tokens=MAX_NEW_TOKENS,
                    label=label,
                    **decoding,
                )
            return by_problem(found)

        args.out.mkdir(parents=True, exist_ok=True)
        greedy, sampled = measure("greedy"), measure("sampled", **sampling)
        picture = args.results.with_name(f"{SECTION}.png")
        with atomic_write(picture) as file:
            FigureCanvasAgg(draw(greedy, sampled)).print_png(file)
        command = shlex.join(["python", "bench/experiments", "votes", *argv])
        return section(greedy, sampled, sampling, command)

    return publish("votes", args.results, SECTION, make)
