"""Scoring traces with a local teacher: 24 short ones read together, and one at a time.

The teacher has the shape of Qwen2.5-0.5B and random weights; the tokenizer splits text into bytes. docs/gpu.md has the
times.
"""

import tempfile
from itertools import count
from pathlib import Path
from unittest.mock import patch

from harness import Step
from registry import Bar, Case, Contest, Place
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cases.models import qwen
from rbfast.data.signal_store import SignalStore
from rbfast.data.trace import Trace
from rbfast.teacher import logprobs
from rbfast.teacher.logprobs import add_local_logprobs

TRACES, K = 24, 20


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def score(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, traces: list[Trace], together: bool) -> Step:
    folders, number = Path(tempfile.mkdtemp()), count()
    limits = {name: getattr(logprobs, name) if together else 1 for name in ("_TOKENS", "_TOKENS_ON_GPU")}

    def step() -> None:
        folder = folders / str(next(number))
        with patch.multiple(logprobs, **limits), SignalStore(folder, "bench", K, len(tokenizer)) as store:
            refused = add_local_logprobs(teacher, tokenizer, traces, tokenizer, store)
        assert not refused, refused[0][1]

    return step


def make(place: Place) -> Contest:
    teacher, tokenizer = qwen("0.5B", place), byte_tokenizer()
    lines = place.size(4, 1)
    traces = [Trace(f"What is {n} + 1?", f"Add one: {n} + 1 = {n + 1}.\n" * lines, str(n + 1)) for n in range(TRACES)]
    return Contest(
        f"scoring {TRACES} short traces, a teacher of 0.5B",
        {
            "rbfast": score(teacher, tokenizer, traces, together=True),
            "rbfast, one at a time": score(teacher, tokenizer, traces, together=False),
        },
        (Bar("rbfast ms", "<=", 1150),),
        rounds=3,
        is_host_bound=True,
    )


CASES = [Case("teacher", "24 traces", make, ("cuda",))]
