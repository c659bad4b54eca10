"""What the demo reaches with another learning rate, batch size or number of epochs: accuracy after training, by seed.

    python bench/experiments demo_settings --rate 0.02 --epochs 1 --seeds 0 1 2 --out runs/settings.jsonl

It uses the demo's traces, problems and evaluation. docs/results.md has the accuracy before training.
Each training adds a line to --out. Several instances may run at a time, on a GPU or with one thread each.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rbfast.demo import run
from rbfast.demo.worked_families import split
from rbfast.evaluation.evaluate import evaluate
from rbfast.models.student import SMOLLM2, fast_dtype, load_student
from rbfast.training.distill import DistillConfig, distill


def measure(config: DistillConfig, device: str, batch_size: int = 60) -> dict[str, Any]:
    """The shares that the demo's student solves after training with `config`, its seed included."""
    start = time.monotonic()
    model, tokenizer = load_student(SMOLLM2, fast_dtype(device))
    model = model.to(torch.device(device))  # type: ignore[arg-type]
    splits = [split(name, train=run.TRAIN, held_out=run.HELD_OUT, seed=config.seed) for name in run.FAMILIES]
    with TemporaryDirectory() as folder:
        distill(model, tokenizer, [trace for family, _ in splits for trace in family], folder, config, quiet=True)
    solved = {}
    for name, (_, problems) in zip(run.FAMILIES, splits, strict=True):
        results = evaluate(model, tokenizer, problems, max_new_tokens=run.MAX_NEW_TOKENS, batch_size=batch_size)
        solved[name] = sum(result.correct for result in results) / len(results)
    mean = sum(solved.values()) / len(solved)
    return {"mean": mean, "families": solved, "seconds": time.monotonic() - start}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to add lines to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, default=run.CONFIG.learning_rate)
    parser.add_argument("--epochs", type=float, default=run.CONFIG.epochs)
    parser.add_argument("--batch-size", type=int, default=run.CONFIG.batch_size)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        settings = {"learning_rate": args.rate, "epochs": args.epochs, "batch_size": args.batch_size, "seed": seed}
        found = measure(replace(run.CONFIG, **settings), args.device)
        line = json.dumps(settings | found)
        print(line, flush=True)
        with args.out.open("a") as file:
            file.write(line + "\n")
    return 0
