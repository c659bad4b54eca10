"""Folders like those of finished runs, written by hand."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rbfast.adapter.adapter_files import FORMAT, VERSION, AdapterConfig, MatrixInfo

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NASTY = '</div></pre><script>alert("x")</script> \' &lt; $\\frac{<img src=x onerror=y> half a pair: \ud83d'
THOUGHT = "First, let us find the total of all legs.\n3 cows x4=12\n2 hens x2=4, 12+4=16\n\n<answer>16</answer>"


def record(number: int, correct: Any, task: str = "legs", **more: Any) -> dict[str, Any]:
    question = f"Problem {number} of {task}?"
    result = {"task": task, "problem": question, "answer": "16", "sample": 0, "completion": THOUGHT, "extracted": "16"}
    return result | {"score": float(correct), "correct": correct, "tokens": 40 + number, "truncated": False} | more


def results(solved: int, n: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [
        record(number, number < solved, task, **more) for task in ("legs", "reasoning-gym:sums") for number in range(n)
    ]


def matrix(support: int) -> MatrixInfo:
    return MatrixInfo(
        out_features=96, in_features=64, support=support, rank=2, group=0, fingerprint=None, score=0.5 * support
    )


ADAPTER = {"format": FORMAT, "version": VERSION} | asdict(
    AdapterConfig(
        "/home/somebody/models/tiny",
        "float32",
        0.003,
        1.0,
        0,
        "gradient",
        {f"model.layers.{layer}.mlp.{kind}": matrix(10 + layer) for layer in range(6) for kind in ("up", "down")},
    )
)
SHEET = {
    "stages": [
        {"stage": "clean", "in": 20, "dropped": {"truncated": 3, "loops": 1}, "out": 16},
        {"stage": "select", "in": 16, "dropped": {"not chosen": 4}, "out": 12},
    ],
    "domains": [{"domain": "algebra", "before": 20, "eligible": 16, "after": 12}],
}
SETTINGS = {
    "density": 0.003, "rank": None, "placement": "gradient", "epochs": 2.0, "batch_size": 4, "accumulation": 1,
    "learning_rate": 5e-3, "max_tokens": 4096, "seed": 0, "objective": {"strategic": 0.4, "tactical": 0.5},
    "base_model": "/home/somebody/models/tiny", "traces": 12, "traces_digest": "ab12",
    "trainable_percent": 0.2987, "tokens_per_epoch": 2345, "seconds": 150.0, "resumed": False,
}  # fmt: skip
LOGS = [
    {"step": step, "loss": 1.0, "loss_strategic": 2 / step, "loss_tactical": 1 / step, "loss_answer": 0.5}
    for step in range(1, 21)
]
SKIPPED = [{"problem": "A long one", "reason": "expected at most 4096 tokens, got 5000"}]
SUMMARY = {"seconds": 900.0, "training_seconds": 1.0, "peak_memory_mb": 2048.0}


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_run(folder: Path, **files: str) -> Path:
    """A finished run with everything in its folder; `files` replace some of its files."""
    whole = {
        "run.json": json.dumps(SETTINGS),
        "log.json": json.dumps(LOGS),
        "skipped.jsonl": lines(SKIPPED),
        "adapter_config.json": json.dumps(ADAPTER),
        "summary.json": json.dumps(SUMMARY),
        "datasheet.json": json.dumps(SHEET),
        "before.jsonl": lines(results(1)),
        "after.jsonl": lines(results(6)),
    }
    folder.mkdir(parents=True)
    for name, text in (whole | files).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
