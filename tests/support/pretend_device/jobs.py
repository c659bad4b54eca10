"""The command line on the pretend accelerator, every job in a process of its own: for tests/system/test_pretend_device.py.

`python jobs.py FOLDER [JOB ...]` leaves each job's files in FOLDER/JOB, or those of the jobs they are made from, and
prints a JSON object: by job its exit code and what it said. A process that has imported everything forks for each job.
"""

import contextlib
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from pretend_device import install  # noqa: E402
from tiny_models import llama  # noqa: E402
from tiny_tokenizers import byte_level  # noqa: E402

from rbfast.cli.main import main as rbfast  # noqa: E402
from rbfast.data.readers import write_traces  # noqa: E402
from rbfast.data.trace import Trace  # noqa: E402
from rbfast.demo import run as demo  # noqa: E402
from rbfast.training.trainer import DistillTrainer  # noqa: E402

TRACES = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}", str(n + 1)) for n in range(12)]
DISTILL = "distill {0}/student {0}/traces.jsonl -o {1} --dtype float32 --density 0.2 --rank 3 --support 8 --save-steps 1 --json"
TEACH = "teach {0}/teacher {0}/traces.jsonl --score --student {0}/student -k 5 -o {1} --dtype float32 --json"
EVAL = "eval {0}/student --adapter {0}/text --task {0}/problems.jsonl -n 4 --max-new-tokens 5 --dtype float32 --json"
SOLVE = "solve {0}/student 2+2? --adapter {0}/text --budget 230 --dtype float32 --json"

# By job its command line: {0} is the folder of all jobs, {1} the job's own.
JOBS = {
    "text": DISTILL,
    "text-cpu": DISTILL,
    "teach": TEACH,
    "teach-cpu": TEACH,
    "signals": DISTILL + " --signals {0}/teach/signals",
    "teacher": DISTILL + " --teacher {0}/teacher --accumulation 2",
    "gradient": DISTILL + " --placement gradient",
    "factored": DISTILL + " --placement factored",
    "activation": DISTILL + " --placement activation",
    "cut": DISTILL + " --batch-size 4 --epochs 2",
    "whole": DISTILL + " --batch-size 4 --epochs 2",
    "eval": EVAL,
    "eval-samples": EVAL + " --samples 2 -o {1}/results.jsonl",
    "solve": SOLVE + " --probe-every 20 --verify-above 1",
    "solve-votes": SOLVE + " --samples 3",
    "merge": "merge {0}/student {0}/text -o {1} --dtype float32 --json",
    "export-lora": "export-lora {0}/student {0}/text -o {1} --json",
    "report": "report {0}/text -o {1}/report.html --json",
    "demo": "demo --out {1} --json",
}
_WITHOUT_DEVICE = ("report",)
_OTHER_DEVICE = {"text-cpu": "cpu", "teach-cpu": "cpu"}


def arguments(job: str, folder: Path) -> list[str]:
    device = [] if job in _WITHOUT_DEVICE else ["--device", _OTHER_DEVICE.get(job, "pretend")]
    return [part.format(folder, folder / job) for part in JOBS[job].split()] + device


def prepare(folder: Path) -> None:
    """A student, a teacher with its tokens, traces and problems."""
    write_traces(folder / "traces.jsonl", TRACES)
    problems = [json.dumps({"problem": trace.problem, "answer": trace.answer}) + "\n" for trace in TRACES]
    (folder / "problems.jsonl").write_text("".join(problems))
    tokenizer = tiny_tokenizer()
    for name, layers in (("student", 2), ("teacher", 3)):
        tiny(tokenizer, num_hidden_layers=layers).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def tiny_tokenizer():
    return byte_level(*(trace.completion() for trace in TRACES))


def tiny(tokenizer, **more):
    return llama(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=0, **more)


def run(job: str, folder: Path) -> int:
    if job == "cut":
        with contextlib.suppress(RuntimeError), training_cut_at(4):
            return rbfast(arguments(job, folder))
    if job == "demo":
        with toy_demo():
            return rbfast(arguments(job, folder))
    return rbfast(arguments(job, folder))


@contextlib.contextmanager
def training_cut_at(step: int):
    whole_step = DistillTrainer.training_step

    def step_or_fail(self, *args, **kwargs):
        if self.state.global_step == step:
            raise RuntimeError("power cut")
        return whole_step(self, *args, **kwargs)

    with patch.object(DistillTrainer, "training_step", step_or_fail):
        yield


def toy_demo():
    """The demo, with a tiny student and few problems."""

    def load(name, dtype):
        tokenizer = tiny_tokenizer()
        return tiny(tokenizer).to(dtype).eval(), tokenizer

    config = replace(demo.CONFIG, density=0.2)
    return patch.multiple(demo, load_student=load, CONFIG=config, TRAIN=4, HELD_OUT=2, MAX_NEW_TOKENS=4)


def in_a_process(job: str, folder: Path) -> dict:
    """The exit code of a job in a fork, and what it said to stdout and stderr."""
    path = folder / f"{job}.said"
    pid = os.fork()
    if not pid:
        code = 1
        with path.open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                code = run(job, folder)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "said": path.read_text()}


def main(folder: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)  # a fork has none of the threads that the process had before
    install()
    if not (folder / "student").exists():
        prepare(folder)
    print(json.dumps({job: in_a_process(job, folder) for job in jobs or JOBS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
