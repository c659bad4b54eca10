"""What an adapter costs in generation: the base, the folded adapter, and the merged model; one row, greedily.

    OMP_NUM_THREADS=1 pytest bench/cases/test_decode.py -s

The folded model is timed within `evaluating`, as rbfast decodes, and with its hooks on, as a plain `generate` runs it.
The four take turns, so that a machine that slows down slows all of them. A ratio is the median, over the rounds, of a
model's CPU time divided by the base's in the same round.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from registry import Place
from transformers import PreTrainedModel

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.inference.decoding import evaluating
from rbfast.models.student import SMOLLM2, load_student

Block = Callable[[PreTrainedModel], AbstractContextManager[None]]


def write(model: PreTrainedModel, block: Block, ids: torch.Tensor, tokens: int) -> float:
    """Seconds of CPU time to generate this many tokens, including entering and leaving the block."""
    begun = time.process_time()
    with block(model):
        model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)  # type: ignore[operator]
    return time.process_time() - begun


def test_decoding(benchmark: BenchmarkFixture, place: Place) -> None:
    tokens = place.size(64, 2)
    base, tokenizer = load_student(SMOLLM2, torch.float32)
    ids = tokenizer("A farm has 3 cows and 2 hens. How many legs?", return_tensors="pt").input_ids
    folded, merged = deepcopy(base), deepcopy(base)
    SparseAdapter.attach(folded, placement="random")
    SparseAdapter.attach(merged, placement="random").merge()
    models: dict[str, tuple[PreTrainedModel, Block]] = {
        "base": (base, evaluating),
        "folded": (folded, evaluating),
        "folded, hooks on": (folded, nullcontext),
        "merged": (merged, evaluating),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}

    def turn() -> None:
        for name, (model, block) in models.items():
            seconds[name].append(write(model, block, ids, tokens))

    turn()  # warm
    for times in seconds.values():
        times.clear()
    benchmark.group = f"{tokens} tokens, {torch.get_num_threads()} threads"
    benchmark.pedantic(turn, rounds=place.size(9, 2))
    for name in list(models)[1:]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["base"], strict=True)]
        benchmark.extra_info[name] = statistics.median(ratios)
        print(f"\n{name}: {statistics.median(ratios):.3f} of the base ({min(ratios):.3f} .. {max(ratios):.3f})")
    assert place.is_toy or statistics.median(seconds["base"]) == pytest.approx(
        statistics.median(seconds["merged"]), rel=0.1
    )
