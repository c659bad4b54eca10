"""A student of real size on one GPU: three steps of a Qwen2.5-7B with random weights, on 16k tokens each.

    python bench/experiments real_size              # on cuda, in less than a minute: the plan, then a line of JSON
    python bench/experiments real_size --toy        # on the CPU, in seconds: does it work?

The weights are created on the device. Two of the three batches are one trace of 16k tokens, the third is eight of 2k;
layers are recomputed for their backward. The bar is a peak below 80 GB. `packed` compares eight traces attended to in
one call with one trace at a time: hidden states, and seconds of their forwards. For scale it also gives the effect of
rounding alone: one trace at a time, with its attention in fp32.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from cases.models import qwen
from harness import settle
from registry import Place
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, TrainerCallback

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import IGNORE, NO_ROLE, Example, collate, to_device
from rbfast.models import packed_attention
from rbfast.models.checkpointing import checkpointing
from rbfast.models.student import final_hidden
from rbfast.training.arguments import DeviceArguments
from rbfast.training.batches import batches_by_tokens
from rbfast.training.plan import make_plan
from rbfast.training.trainer import DistillTrainer

LIMIT_GB, PROMPT, PARTS = 80, 8, 8


def traces(vocabulary: int, tokens: int) -> list[Example]:
    """Two traces of `tokens` random tokens each, and eight that have as many together; each starts with a prompt."""
    draw = np.random.default_rng(0)
    return [trace(draw.integers(0, vocabulary, n)) for n in (tokens, tokens, *[tokens // PARTS] * PARTS)]


def trace(ids: np.ndarray) -> Example:
    labels = np.append(ids[1:], IGNORE)
    labels[: PROMPT - 1] = IGNORE
    roles = np.where(labels == IGNORE, NO_ROLE, np.minimum(np.arange(len(ids)) * 3 // len(ids), 2))
    return Example(ids, labels, roles)


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        settle()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        settle()
        self.seconds.append(time.perf_counter() - self.start)


def train(model: PreTrainedModel, adapter: SparseAdapter, examples: Sequence[Example], tokens: int) -> dict[str, Any]:
    arguments = DeviceArguments(
        output_dir=tempfile.mkdtemp(),
        train_device=str(model.device),
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock = Clock()
    trainer = DistillTrainer(model, adapter, arguments, examples, tokens_per_batch=tokens, callbacks=[clock])
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with checkpointing(model):
        trainer.train()
    found: dict[str, Any] = {"seconds": [round(x, 3) for x in clock.seconds], "tokens": tokens}
    found["tokens_per_second"] = round(tokens / min(clock.seconds))
    found["losses"] = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    if model.device.type == "cuda":
        found["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        found["reserved_GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        found["passes"] = found["reserved_GB"] < LIMIT_GB
    return found


@contextmanager
def one_at_a_time() -> Iterator[None]:
    with patch.object(packed_attention, "has_varlen_kernel", lambda device: False):
        yield


@torch.no_grad()
def compare_attention(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, Any]:
    """Seconds of both ways to attend to a packed row, and the relative difference of their hidden states."""
    batch = to_device(collate(examples), model.device)
    row = batch["input_ids"], batch["position_ids"], batch["lengths"]

    def forward() -> tuple[torch.Tensor, float]:
        final_hidden(model, *row)
        settle()
        start = time.perf_counter()
        hidden = final_hidden(model, *row)
        settle()
        return hidden.float(), time.perf_counter() - start

    at_once, seconds = forward()
    with one_at_a_time():
        apart, seconds_apart = forward()
        with patch.object(packed_attention, "scaled_dot_product_attention", attend_in_fp32):
            exact, _ = forward()
    return {
        "at_once": packed_attention.has_varlen_kernel(model.device),
        "seconds": round(seconds, 4),
        "seconds_one_at_a_time": round(seconds_apart, 4),
        "difference": float((at_once - apart).norm() / apart.norm()),
        "difference_of_rounding": float((exact - apart).norm() / apart.norm()),
    }


def attend_in_fp32(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return scaled_dot_product_attention(query.float(), key.float(), value.float(), **options).to(query.dtype)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per batch")
    args = parser.parse_args(argv)
    place = Place("cpu" if args.toy else args.device, args.toy)
    tokens, start = place.size(args.tokens, 256), time.perf_counter()
    model = qwen("7B", place)
    settle()
    examples = traces(model.config.vocab_size, tokens)
    found: dict[str, Any] = {"load_seconds": round(time.perf_counter() - start, 2)}
    adapter = SparseAdapter.attach(model, placement="random", **({"density": 0.05} if args.toy else {}))
    plan = make_plan(model, adapter, batches_by_tokens(examples, tokens, seed=0), is_checkpointed=True)
    print(plan, flush=True)
    found |= train(model, adapter, examples, tokens)
    found["packed"] = compare_attention(model, examples[2:])
    found |= {"planned_GB": round(plan.needed / 1e9, 2), "total_seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(found))
    return 0 if found.get("passes", True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
