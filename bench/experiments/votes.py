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
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from publish import RESULTS, cpu, publish

from experiments.demo_student import held_out_problems, load_trained
from experiments.scaling import percent
from rbfast.adapter.adapter_files import adapter_digest
from rbfast.demo.run import MAX_NEW_TOKENS
from rbfast.evaluation.evaluate import Result, by_problem, evaluate, majority_correct, summarize, summarize_samples
from rbfast.evaluation.statistics import paired_difference
from rbfast.report.plots import save
from rbfast.utils.progress import counting

SECTION = "votes"


def voted(results: Sequence[Result], n: int) -> list[float]:
    """For each problem the share of its groups of n samples whose vote is right."""
    groups = [[item[i : i + n] for i in range(0, len(item), n)] for item in by_problem(results)]
    return [sum(map(majority_correct, group)) / len(group) for group in groups]


def sizes(results: Sequence[Result]) -> list[int]:
    """The powers of two up to the number of samples."""
    return [2**power for power in range(len(by_problem(results)[0]).bit_length())]


def table(greedy: Sequence[Result], sampled: Sequence[Result]) -> list[str]:
    """A row for greedy decoding and one for each number of votes."""
    reference, summary = voted(greedy, 1), summarize_samples(sampled)
    lines = [
        "| votes | tokens for each problem | one of them is right | the vote is right | over greedy, 95% interval |",
        "| --- | --- | --- | --- | --- |",
        f"| greedy | {summarize(greedy)['tokens']:.0f} | | {percent(reference):.1f}% | |",
    ]
    for n in sizes(sampled):
        scores = voted(sampled, n)
        gain = paired_difference(reference, scores)
        lines.append(
            f"| {n} | {n * summary['tokens']:.0f} | {100 * summary[f'pass@{n}']:.1f}% | {percent(scores):.1f}% "
            f"| {100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f}) |"
        )
    return lines


def draw(greedy: Sequence[Result], sampled: Sequence[Result]) -> Figure:
    """The shares solved by votes, and by any of the samples, against the number of samples."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes, counts, summary = figure.subplots(), sizes(sampled), summarize_samples(sampled)
    any_is_right = [100 * summary[f"pass@{n}"] for n in counts]
    axes.plot(counts, any_is_right, marker="o", markersize=3, label="one is right")
    axes.plot(counts, [percent(voted(sampled, n)) for n in counts], marker="o", markersize=3, label="the vote is right")
    axes.axhline(percent(voted(greedy, 1)), color="gray", linestyle="--", linewidth=1, label="greedy")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="samples of each problem", ylabel="solved (%)", ylim=(0, None), xticks=counts)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure


def section(greedy: Sequence[Result], sampled: Sequence[Result], settings: dict[str, Any], command: str) -> str:
    return "\n".join(
        [
            "## Accuracy against the number of votes",
            "",
            f"`{command}`",
            "",
            f"The demo's student on {len(greedy)} of the demo's held-out problems, {settings['samples']} samples of",
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
        model, tokenizer, _ = load_trained(args.run)
        problems, label = held_out_problems(args.problems), adapter_digest(args.run)
        sampling = {"samples": args.samples, "temperature": args.temperature, "top_p": args.top_p}

        def measure(name: str, **decoding: Any) -> list[Result]:
            settings = {"max_new_tokens": MAX_NEW_TOKENS, "label": label, **decoding}
            keep = args.out / f"{name}.jsonl"
            with counting(name) as progress:
                return evaluate(model, tokenizer, problems, batch_size=64, keep=keep, progress=progress, **settings)

        args.out.mkdir(parents=True, exist_ok=True)
        greedy, sampled = measure("greedy"), measure("sampled", **sampling)
        picture = args.results.with_name(f"{SECTION}.png")
        save(draw(greedy, sampled), picture)
        command = shlex.join(["python", "bench/experiments", "votes", *argv])
        return section(greedy, sampled, sampling, command)

    return publish("votes", args.results, SECTION, make)
