"""The command-line jobs that must run on every device, each in its own process.

    setup = Setup(folder, "cuda", hidden=576, layers=8)
    setup.prepare()                                      # a student and a teacher with random weights, traces, problems
    ended = run_jobs(setup)                              # exit code, seconds and output by job

A job leaves its files in folder/JOB. Jobs fork from this process, which should have imported everything and must not
have used a GPU.
"""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rbfast.cli.main import main as rbfast
from rbfast.data.readers import write_traces
from rbfast.data.trace import Trace
from rbfast.demo import run as demo
from rbfast.training.trainer import DistillTrainer

TRACES = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}", str(n + 1)) for n in range(12)]

_DISTILL = "distill {student} {folder}/traces.jsonl -o {out} --save-steps 1 --batch-size 4"
_TEACH = "teach {teacher} {folder}/traces.jsonl --score --student {student} -k 5 -o {out}"
_EVAL = "eval {student} --adapter {folder}/text --task {folder}/problems.jsonl -n 4 --max-new-tokens 5"
_SOLVE = "solve {student} 2+2? --adapter {folder}/text --budget 230"

# The command line of each job; `out` is the job's own folder in `folder`. Jobs in AFTERWARDS read the output of others.
JOBS = {
    "text": _DISTILL,
    "teach": _TEACH,
    "teacher": _DISTILL + " --teacher {teacher} --accumulation 2",
    "rounds": _DISTILL + " --teacher {teacher} --rounds 2 --max-new-tokens 4",
    "gradient": _DISTILL + " --placement gradient",
    "factored": _DISTILL + " --placement factored",
    "activation": _DISTILL + " --placement activation",
    "cut": _DISTILL + " --epochs 2",
    "whole": _DISTILL + " --epochs 2",
    "demo": "demo --out {out}",
}
AFTERWARDS = {
    "signals": _DISTILL + " --signals {folder}/teach/signals",
    "eval": _EVAL,
    "eval-samples": _EVAL + " --samples 2 -o {out}/results.jsonl",
    "solve": _SOLVE + " --probe-every 20 --verify-above 1",
    "solve-votes": _SOLVE + " --samples 3",
    "merge": "merge {student} {folder}/text -o {out}",
    "export-lora": "export-lora {student} {folder}/text -o {out}",
    "report": "report {folder}/text -o {out}/report.html",
}
_OF_ADAPTERS = [job for job, line in (JOBS | AFTERWARDS).items() if line.startswith("distill")]
_CUT_AT = 4


@dataclass(frozen=True)
class Setup:
    """Where and how jobs run.

    Attributes:
        vocabulary: the least vocabulary size of the models; the tokenizer has a few hundred tokens.
        options: the options of every job that loads a model; `adapter`: those of every job that creates an adapter.
        student: the name of a model to use instead of one with random weights.
    """

    folder: Path
    device: str
    hidden: int = 24
    layers: int = 2
    vocabulary: int = 0
    options: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    student: str | None = None

    def arguments(self, job: str) -> list[str]:
        names = {"folder": self.folder, "out": self.folder / job}
        names |= {who: self.student or self.folder / "models" / who for who in ("student", "teacher")}
        line = [part.format(**names) for part in (JOBS | AFTERWARDS)[job].split()] + ["--json"]
        if job != "report":
            line += ["--device", self.device]
        if job not in ("report", "demo"):
            line += self.options
        return line + list(self.adapter if job in _OF_ADAPTERS else ())

    def prepare(self) -> None:
        write_traces(self.folder / "traces.jsonl", TRACES)
        problems = [json.dumps({"problem": trace.problem, "answer": trace.answer}) + "\n" for trace in TRACES]
        (self.folder / "problems.jsonl").write_text("".join(problems))
        if self.student is None:
            for who, layers in (("student", self.layers), ("teacher", self.layers + 1)):
                model, tokenizer = self.random_model(layers)
                model.save_pretrained(self.folder / "models" / who)
                tokenizer.save_pretrained(self.folder / "models" / who)

    def random_model(self, layers: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
        tokenizer = byte_level(*(trace.completion() for trace in TRACES))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=max(len(tokenizer), self.vocabulary),
            hidden_size=self.hidden,
            intermediate_size=8 * self.hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
        )
        return LlamaForCausalLM(config).eval(), tokenizer

    def run(self, job: str) -> int:
        if job == "cut":
            with contextlib.suppress(_PowerCut), _training_cut():
                return rbfast(self.arguments(job))
        if job == "demo":
            with self._toy_demo():
                return rbfast(self.arguments(job))
        return rbfast(self.arguments(job))

    def _toy_demo(self) -> Any:
        """The demo with few problems and a tiny random student, whose adapter needs a higher density."""

        def load(name: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
            model, tokenizer = self.random_model(self.layers)
            return model.to(dtype), tokenizer

        config = replace(demo.CONFIG, density=0.2)
        return patch.multiple(demo, load_student=load, CONFIG=config, TRAIN=4, HELD_OUT=2, MAX_NEW_TOKENS=4)


class _PowerCut(RuntimeError):
    pass


@contextlib.contextmanager
def _training_cut() -> Iterator[None]:
    whole_step = DistillTrainer.training_step

    def step_or_fail(self: DistillTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == _CUT_AT:
            raise _PowerCut
        return whole_step(self, *args, **kwargs)

    with patch.object(DistillTrainer, "training_step", step_or_fail):
        yield


def run_jobs(setup: Setup, at_once: int = 1) -> dict[str, dict[str, Any]]:
    """Runs all jobs, `at_once` at a time."""
    return _run(setup, JOBS, at_once) | _run(setup, AFTERWARDS, at_once)


def _run(setup: Setup, jobs: Iterable[str], at_once: int) -> dict[str, dict[str, Any]]:
    waiting, running, ended = list(jobs), {}, {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            running[_start(setup, job)] = job, time.monotonic()
        pid, status = os.waitpid(-1, 0)
        job, start = running.pop(pid)
        said = (setup.folder / f"{job}.said").read_text(errors="replace")
        ended[job] = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start, "said": said}
    return ended


def _start(setup: Setup, job: str) -> int:
    """Forks a process that runs a job; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with (setup.folder / f"{job}.said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                # A fork's first use of torch's thread pool recreates it, which two threads must not do at once.
                torch.set_num_threads(torch.get_num_threads())
                code = setup.run(job)
            except BaseException:
                traceback.print_exc()
    os._exit(code)
