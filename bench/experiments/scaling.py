"""Test-time scaling: the demo's student before and after distillation, under budgets, with and without interventions.

    make demo && python bench/experiments scaling --run runs/demo --out runs/scaling

The demo's held-out problems, the first of each family; greedy. A budget counts every token after the prompt, including
inserted and struck ones, so that a row of the table compares at equal cost. The settings:

- plain: generation up to the budget;
- wrap up: a quarter of the budget is reserved, and the answer is asked for once thinking has used the rest;
- wait, verify, other approach: one of these besides the wrap-up. `wait` keeps the thinking from ending before half of
  the budget; `verify` is inserted at sentence ends that are less certain than 9 of 10 of the same model's; `other
  approach` is inserted at loops, which the wrap-up alone does not stop;
- all: everything at once.

Every finished cell is kept in --out and read back. The table is written to docs/results.md, the picture beside it.
"""

import argparse
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from publish import RESULTS, cpu, publish
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.demo_student import held_out_problems, load_trained
from experiments.parts import digest, part
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.evaluation.evaluate import evaluate
from rbfast.evaluation.statistics import paired_difference, proportion
from rbfast.grading.grade import Problem
from rbfast.inference.guide import OTHER, VERIFY, WAIT, WRAP_UP, Guide, Limits
from rbfast.inference.local import LocalSolver
from rbfast.inference.solver import calibrate
from rbfast.inference.tokens import phrases_for
from rbfast.report.plots import save
from rbfast.utils.progress import counting

SECTION = "scaling"
SETTINGS = {
    "plain": (),
    "wrap up": (WRAP_UP,),
    "wait": (WAIT, WRAP_UP),
    "verify": (VERIFY, WRAP_UP),
    "other approach": (OTHER, WRAP_UP),
    "all": (WAIT, VERIFY, OTHER, WRAP_UP),
}
SIDES = ("before", "after")

Cell = dict[str, list[float]]  # `solved` and `tokens` of every problem, in order
Cells = dict[tuple[str, int, str], Cell]  # by side, budget and setting


def guide(tokenizer: PreTrainedTokenizerBase, budget: int, setting: str, verify_above: float) -> Guide:
    """The guide of a setting; `verify_above` applies if it verifies."""
    interventions = SETTINGS[setting]
    limits = Limits(
        budget,
        minimum=budget // 2 if WAIT in interventions else 0,
        verify_above=verify_above if VERIFY in interventions else None,
    )
    return Guide(limits, phrases_for(tokenizer), interventions)


def cell(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], chosen: Guide, title: str
) -> Cell:
    with counting(title) as progress:
        results = evaluate(model, tokenizer, problems, batch_size=60, progress=progress, guide=chosen)
    return {
        "solved": [float(result.correct) for result in results],
        "tokens": [float(result.completion.tokens) for result in results],
        "interventions": [float(len(result.events)) for result in results],
    }


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: SparseAdapter,
    problems: Sequence[Problem],
    budgets: Sequence[int],
    out: Path,
) -> Cells:
    questions = [problem.question for problem in problems[:: max(1, len(problems) // 40)]]
    asked = {"dtype": str(model.dtype), "problems": digest(problem.question for problem in problems)}
    found: Cells = {}
    for side in SIDES:
        with adapter.disabled() if side == "before" else nullcontext():
            plain = Guide(Limits(max(budgets)), phrases_for(tokenizer))
            threshold = partial(calibrate, LocalSolver(model, tokenizer), questions, plain)
            verify_above = part(out / f"{side}-threshold.json", asked, threshold)["result"]
            for budget in budgets:
                for setting in SETTINGS:
                    chosen = guide(tokenizer, budget, setting, verify_above)
                    title = f"{side}, {setting}, {budget}"
                    found[side, budget, setting] = part(
                        out / f"{side}-{budget}-{setting.replace(' ', '-')}.json",
                        asked | {"guide": repr(chosen)},
                        partial(cell, model, tokenizer, problems, chosen, title),
                    )["result"]
    return found


# ---------------------------------------------------------------------------------------------------------- the section


def percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def table(found: Cells, budgets: Sequence[int], side: str) -> list[str]:
    """A row per budget: the share solved by each setting, with the mean tokens written."""
    lines = [f"| budget, {side} | " + " | ".join(SETTINGS) + " |", "| --- " * (len(SETTINGS) + 1) + "|"]
    for budget in budgets:
        cells = [found[side, budget, setting] for setting in SETTINGS]
        shown = [f"{percent(c['solved']):.1f}% ({sum(c['tokens']) / len(c['tokens']):.0f})" for c in cells]
        lines.append(f"| {budget} | {' | '.join(shown)} |")
    return lines


def effects(found: Cells, budgets: Sequence[int], side: str) -> list[str]:
    """For every setting the paired difference to plain generation, all budgets together."""
    plain = [x for budget in budgets for x in found[side, budget, "plain"]["solved"]]
    lines = []
    for setting in list(SETTINGS)[1:]:
        guided = [x for budget in budgets for x in found[side, budget, setting]["solved"]]
        put_in = [x for budget in budgets for x in found[side, budget, setting]["interventions"]]
        gain = paired_difference(plain, guided)
        lines.append(
            f"| {side} | {setting} | {sum(put_in) / len(put_in):.2f} "
            f"| {100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f}) |"
        )
    return lines


def draw(found: Cells, budgets: Sequence[int]) -> Figure:
    """A panel for each side: the share solved against the budget, a line for each setting, plain's interval."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
        bands = [proportion(found[side, budget, "plain"]["solved"]) for budget in budgets]
        axes.fill_between(budgets, [100 * b.low for b in bands], [100 * b.high for b in bands], alpha=0.15, linewidth=0)
        for setting in SETTINGS:
            shares = [percent(found[side, budget, setting]["solved"]) for budget in budgets]
            axes.plot(budgets, shares, marker="o", markersize=3, linewidth=1.5, label=setting)
        axes.set(title=f"{side} distillation", xlabel="token budget")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="solved (%)", ylim=(0, None))  # after both sides are drawn, as they share it
    figure.axes[1].legend(frameon=False, fontsize="small")
    return figure


def section(found: Cells, budgets: Sequence[int], problems: int, command: str, dtype: Any, picture: str) -> str:
    return "\n".join(
        [
            "## Accuracy against the budget",
            "",
            f"`{command}`",
            "",
            f"The demo's student, {dtype}, on {problems} of the demo's held-out problems; greedy. In brackets: the",
            "mean number of tokens written, including interventions and struck tokens.",
            "",
            *table(found, budgets, "before"),
            "",
            *table(found, budgets, "after"),
            "",
            "Against plain generation at the same budget, all budgets together (95% intervals for paired proportions;",
            "a problem counts once for each budget, so the intervals are too narrow):",
            "",
            "| side | setting | interventions each | gain, points |",
            "| --- | --- | --- | --- |",
            *effects(found, budgets, "before"),
            *effects(found, budgets, "after"),
            "",
            f"![accuracy against the budget]({picture})",
            "",
            f"{date.today()}; {cpu()}, {torch.get_num_threads()} threads; torch {torch.__version__}.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the demo's run, with its adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment; run again to resume")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file to put the section in")
    parser.add_argument("--budgets", type=int, nargs="+", default=[48, 96, 192, 384])
    parser.add_argument("--problems", type=int, default=24, help="problems per family, at most (default: 24)")
    args = parser.parse_args(argv)

    def make() -> str:
        model, tokenizer, adapter = load_trained(args.run)
        problems = held_out_problems(args.problems)
        found = measure(model, tokenizer, adapter, problems, args.budgets, args.out)
        picture = args.results.with_name("scaling.png")
        save(draw(found, args.budgets), picture)
        command = shlex.join(["python", "bench/experiments", "scaling", *argv])
        return section(found, args.budgets, len(problems), command, model.dtype, picture.name)

    return publish("scaling", args.results, SECTION, make)
