"""How wide a support must be: held-out loss by width, at equal trained values and each at the best of its rates.

    python bench/experiments support_width --data ../shared/data/reasoning_gym_claude35 --out runs/width.jsonl

A closed teacher's right completions are the traces; every training sees the same 160 in the same order and is measured
on 40 others (closed_teacher). A seed draws the traces, their order, the columns and the start of A. For each
width the rank is the one whose trained values are nearest to the budget; widths are shares of the student's usual
inputs. Each training adds a line to --out, from which the script resumes. The table has means over the seeds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.closed_teacher import Recipe, split_examples, train_adapter
from experiments.teacher_results import one_per_problem, traces_from_results
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import encode_all
from rbfast.models.linears import count_parameters, group_siblings, select_linears
from rbfast.models.student import load_student
from rbfast.training.distill import trace_loss


@dataclass(frozen=True)
class Arm:
    """One training."""

    seed: int
    density: float
    support: int
    rank: int
    rate: float


def arms(model: Any, args: argparse.Namespace) -> Iterator[Arm]:
    shapes = group_siblings(select_linears(model))
    usual = statistics.mode(shape.in_features for shape in shapes.values())
    for seed in range(args.seeds):
        for density in args.densities:
            for share in args.shares:
                support = round(share * usual / 16) * 16
                cost = sum(shape.out_features + min(support, shape.in_features) for shape in shapes.values())
                rank = max(1, round(density * count_parameters(model) / cost))
                for rate in args.rates:
                    yield Arm(seed, density, support, rank, rate)


def measure(model: Any, examples: Sequence[Any], arm: Arm, recipe: Recipe) -> dict[str, Any]:
    recipe, start = replace(recipe, seed=arm.seed), time.monotonic()
    held_out, train = split_examples(examples, recipe)
    student = deepcopy(model)
    adapter = SparseAdapter.attach(student, 2 * arm.density, support=arm.support, rank=arm.rank, seed=arm.seed)
    train_adapter(student, adapter, train, recipe, arm.rate, lambda done, of: None)
    values = sum(row.values for row in adapter.summary())
    return vars(arm) | {"values": values} | trace_loss(student, held_out) | {"seconds": time.monotonic() - start}


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row per budget and width, at the best of its rates, by the mean over the seeds that all of its rates have."""
    lines = ["| density | support | rank | trained values | rate | mean loss | each seed |", "|" + " --- |" * 7]
    for density, support in sorted({(r["density"], r["support"]) for r in records}):
        found = [r for r in records if (r["density"], r["support"]) == (density, support)]
        by_rate = {rate: [r for r in found if r["rate"] == rate] for rate in {r["rate"] for r in found}}
        whole = min(len(rows) for rows in by_rate.values())
        rate, rows = min(by_rate.items(), key=lambda item: statistics.mean(r["mean"] for r in item[1][:whole]))
        losses = [r["mean"] for r in rows]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(
            f"| {density:.1%} | {support} | {rows[0]['rank']} | {rows[0]['values']:,} | {rate:g} "
            f"| {statistics.mean(losses):.4f} | {each} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of results, one JSON file for each task")
    parser.add_argument("--out", type=Path, required=True, help="file of finished trainings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.003, 0.011])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0625, 0.125, 0.25, 0.5])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.03])
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = Recipe(train=args.train)
    model, tokenizer = load_student(recipe.student, torch.bfloat16)
    model = model.to(torch.device(args.device))
    traces, _ = traces_from_results(args.data, recipe.teacher)
    examples, _ = encode_all(one_per_problem(traces), tokenizer, max_tokens=recipe.compare_tokens)
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = [{name: record[name] for name in Arm.__dataclass_fields__} for record in records]
    for arm in arms(model, args):
        if vars(arm) not in done:
            records.append(measure(model, examples, arm, recipe))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(json.dumps(records[-1]), flush=True)
    print(table(records))
    return 0
