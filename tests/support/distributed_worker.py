"""The processes of tests/system/test_distributed.py: `distill` on a tiny model, one job after another.

    torchrun --nproc-per-node 2 tests/support/distributed_worker.py FOLDER '{"job": {"batch_size": 2}}'

A job is the name of a folder, with settings of DistillConfig or of `distill_tiny`. A failed job leaves error.txt there.
FOLDER/timeout.txt says how long the processes wait for each other.
"""

import gc
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny_models import llama
from tiny_tokenizers import byte_level

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.trace import Trace
from rbfast.on_policy.rounds import DEFAULTS, distill_on_policy
from rbfast.on_policy.samples import Writing
from rbfast.on_policy.served_teacher import ServedTeacher
from rbfast.teacher.client import Server
from rbfast.teacher.jobs import Question
from rbfast.training.distill import DistillConfig, distill
from rbfast.training.sharding import shard
from rbfast.training.trainer import DistillTrainer

TRACES = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}" + " ok" * (n % 4), str(n + 1)) for n in range(25)]


def tokenizer_and_size(untied=False):
    tokenizer = byte_level(*(trace.completion() for trace in TRACES))
    return tokenizer, dict(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=not untied)


def distill_tiny(
    out,
    stop_at=None,
    over=None,
    beside=False,
    taught=False,
    untied=False,
    held_out=None,
    rounds=None,
    server=None,
    **settings,
):
    """stop_at: the step that fails. over: the number of processes that share a sharded base. beside: deltas stay beside
    the weights, even for a whole base. taught: use a teacher model, sharded like the base. untied: the head is not tied
    to the embedding. held_out: the share of traces that selects the best adapter. rounds: the number of on-policy
    rounds. server: the URL of the teacher's server."""
    tokenizer, size = tokenizer_and_size(untied)
    model, teacher = llama(**size), llama(**size, num_hidden_layers=3) if taught else None
    for base in (model, teacher):
        if over and base is not None:
            shard(base, over)
    step = DistillTrainer.training_step

    def step_or_fail(self, *args, **kwargs):
        if self.state.global_step == stop_at:
            raise RuntimeError("power cut")
        return step(self, *args, **kwargs)

    config = DistillConfig(**dict(density=0.05, learning_rate=1e-2, save_steps=2) | settings)
    attach = partial(SparseAdapter.attach, mode="side" if beside else "auto")
    with patch.object(DistillTrainer, "training_step", step_or_fail), patch.object(SparseAdapter, "attach", attach):
        if rounds:
            config = replace(config, objective=DEFAULTS.objective)
            writing = dict(rounds=rounds, writing=Writing(max_new_tokens=6, batch_size=2))
            teacher = ServedTeacher(Server(server, "tiny"), k=len(tokenizer) - 1) if server else teacher
            questions = [Question(trace.problem) for trace in TRACES[:18]]
            distill_on_policy(model, tokenizer, questions, out, config, quiet=True, teacher=teacher, **writing)
            return
        measuring = dict(held_out=held_out, keep_best=held_out is not None)
        distill(model, tokenizer, TRACES, out, config, quiet=True, teacher=teacher, **measuring)


def main(folder, jobs):
    torch.set_num_threads(1)
    gc.freeze()  # every job collects garbage, which can skip the imported modules
    for name, settings in jobs.items():
        out = folder / name / os.environ["RANK"] if settings.pop("apart", False) else folder / name
        try:
            distill_tiny(out, **settings)
        except (RuntimeError, ValueError) as error:
            out.mkdir(parents=True, exist_ok=True)
            (out / "error.txt").write_text(str(error))


if __name__ == "__main__":
    with patch.object(dist, "init_process_group", wraps=dist.init_process_group) as connect:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    (Path(sys.argv[1]) / "timeout.txt").write_text(str(connect.call_args.kwargs.get("timeout")))
