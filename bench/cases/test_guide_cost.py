"""What guidance costs: the demo's student decodes greedily, plain and guided; no watched value reaches a threshold.

    OMP_NUM_THREADS=1 pytest bench/cases/test_guide_cost.py --benchmark-columns=min,median,rounds

`share` in extra_info is the CPU time spent in guidance (the entropy, the state machines, choosing and watching tokens)
over that of the whole guided decoding; `plain_seconds` is that of one plain decoding. On one thread, other load on the
machine hardly changes the share. On several, threads that spin while they wait count as CPU time, so the share rises
with the load. So the bar, a share of at most 0.02, is judged on one thread only.
"""

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rbfast.data.chat_template import format_prompt
from rbfast.inference.decoding import complete
from rbfast.inference.guide import Guide, Limits, Phrases
from rbfast.inference.local import guided
from rbfast.inference.steering import GuidedSteering
from rbfast.models.student import SMOLLM2, load_student

TOKENS = 96


@pytest.fixture(scope="module")
def student() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_student(SMOLLM2, torch.float32)


class Clock:
    """Adds up the CPU time of the calls it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        return timed


@pytest.mark.parametrize("rows", [1, 8])
def test_guidance(
    benchmark: BenchmarkFixture,
    monkeypatch: pytest.MonkeyPatch,
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    rows: int,
) -> None:
    model, tokenizer = student
    prompts = [format_prompt(f"Explain at length how to add {n} and {n + 1}.", tokenizer) for n in range(rows)]
    # Everything is watched (entropies, loops, markers, boundaries), and nothing reaches a threshold.
    limits = Limits(4 * TOKENS, reserve=3 * TOKENS, verify_above=1e9, loop_times=10**6)
    guide = Guide(limits, Phrases(close="<answer>"))
    guide_time, seconds = Clock(), []
    monkeypatch.setattr(GuidedSteering, "choose", guide_time.around(GuidedSteering.choose))
    monkeypatch.setattr(GuidedSteering, "__call__", guide_time.around(GuidedSteering.__call__))

    def run() -> None:
        start = time.process_time()
        guided(model, tokenizer, prompts, guide)
        seconds.append(time.process_time() - start)

    benchmark.group = f"{rows} rows"
    benchmark.pedantic(run, rounds=2)
    plain = time.process_time()
    complete(model, tokenizer, prompts, max_new_tokens=TOKENS)
    share = guide_time.seconds / sum(seconds)
    benchmark.extra_info |= {
        "share": share,
        "plain_seconds": time.process_time() - plain,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(f"\n{rows} rows: guidance is {100 * share:.2f}% of the processor time")
    if torch.get_num_threads() == 1:
        assert share <= 0.02
