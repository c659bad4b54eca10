"""What one process of tests/test_distributed.py runs: `distill` on a tiny model, with what the command line says."""

import json
import sys

import torch
from tiny_models import llama
from tiny_tokenizers import byte_level

from rbfast.run import DistillConfig, distill
from rbfast.trace import Trace
from rbfast.trainer import DistillTrainer

TRACES = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}" + " ok" * (n % 4), str(n + 1)) for n in range(24)]


def main(out, settings, stop_at=None):
    torch.set_num_threads(1)
    tokenizer = byte_level(*(trace.completion() for trace in TRACES))
    if stop_at is not None:
        step = DistillTrainer.training_step

        def failing(self, *args, **kwargs):
            if self.state.global_step == stop_at:
                raise RuntimeError("power cut")
            return step(self, *args, **kwargs)

        DistillTrainer.training_step = failing
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    distill(
        model,
        tokenizer,
        TRACES,
        out,
        DistillConfig(density=0.05, learning_rate=1e-2, **settings),
        quiet=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
