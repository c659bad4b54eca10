"""For tests/system/test_faults.py: a warmed-up process that forks to run jobs, and kills them or fills their disk.

`python faults_worker.py JOB FOLDER KILLS` prints a JSON object: the files that the job leaves undisturbed and
after each fault.
"""

import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_models import llama
from tiny_tokenizers import byte_level

from rbfast.curation import datasheet
from rbfast.curation.curate import CurateConfig, curate
from rbfast.data.readers import write_traces
from rbfast.data.trace import Trace
from rbfast.evaluation.evaluate import evaluate
from rbfast.grading.grade import Problem
from rbfast.training.distill import DistillConfig, distill
from rbfast.utils.files import write_text

_KILLED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fsync"}


def training(folder):
    """A function that runs the job into a folder. Slow or shared parts are created here, once."""
    traces = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}", str(n + 1)) for n in range(12)]
    tokenizer = byte_level(*(trace.completion() for trace in traces))
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    config = DistillConfig(density=0.2, rank=3, batch_size=4, learning_rate=1e-2, save_steps=1)
    return lambda out: distill(model, tokenizer, traces, out, config, quiet=True)


def curation(folder):
    pool = folder / "pool.jsonl"
    steps = [f"Take {n} and {n * n}.\n{n} + {n * n} = {n + n * n}\nSo it is {n + n * n}." for n in range(40)]
    write_traces(pool, [Trace(f"Add {n} to its square.", step, str(n + n * n)) for n, step in enumerate(steps)])
    datasheet.picture = lambda figure, alt: alt  # drawing takes nine tenths of the time and touches no file
    return lambda out: curate([pool], out, CurateConfig(size=20))


def evaluation(folder):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    problems = [Problem("file", "x" * (3 + 7 * n % 41), "never", {}) for n in range(12)]
    options = dict(max_new_tokens=6, batch_size=4, samples=2, temperature=0.9, seed=4)

    def run(out):
        results = evaluate(model, tokenizer, problems, keep=out / "results.jsonl", **options)
        write_text(out / "table.json", json.dumps([result.to_dict() for result in results], indent=1))

    return run


JOBS = {"training": training, "curation": curation, "evaluation": evaluation}


def left_in(out):
    """The digest of every file of a folder, by name. Durations and the order of result lines are ignored."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == "run.json":
            data = json.dumps({name: v for name, v in json.loads(data).items() if name not in _OF_TIME}).encode()
        if path.name == "results.jsonl":
            data = b"".join(sorted(data.splitlines(keepends=True)))
        found[str(path.relative_to(out))] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


_OF_TIME = ("seconds", "resumed")


class Events:
    """Counts a process's operations on the files of a folder; the process kills itself before operation `at`."""

    def __init__(self, out, at=None, cut=0):
        self.out, self.at, self.cut, self.count = str(out), at, cut, 0
        sys.addaudithook(self.hear)
        fsync = os.fsync

        def cut_short(fd):
            if self.count == self.at:  # killed while it was being written
                os.ftruncate(fd, max(0, os.fstat(fd).st_size - self.cut))
            self.hear("fsync", (self.out,))
            fsync(fd)

        os.fsync = cut_short

    def hear(self, event, args):
        if event not in _KILLED or not str(args[0]).startswith(self.out):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def start(job, out, prepare=lambda: None, after=lambda prepared: None):
    """Forks a process that runs the job; returns its id. It exits with 0, 3 after an OSError, 1 after another error."""
    pid = os.fork()
    if pid:
        return pid
    code, said = 0, ""
    try:
        prepared = prepare()
        job(out)
        after(prepared)
    except OSError as error:
        code, said = 3, str(error)
    except BaseException:
        code, said = 1, traceback.format_exc()
    if said:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        out.with_suffix(".error").write_text(said)
    os._exit(code)


def finish(pid):
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_within(job, out, seconds):
    """Runs a job that a signal ends after `seconds` of its CPU time; returns its exit code and those seconds.

    CPU time, because other work on the machine hardly shifts that point. If the job ends earlier, it runs again with
    half the time.
    """
    # A process that does not handle this signal ends, as with SIGKILL.
    code = finish(start(job, out, lambda: signal.setitimer(signal.ITIMER_PROF, seconds)))
    if code:
        return code, seconds
    shutil.rmtree(out)
    return killed_within(job, out, seconds / 2)


def error_of(out):
    path = out.with_suffix(".error")
    return path.read_text() if path.exists() else None


def main(name, folder, kills):
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a file over the limit raises OSError
    JOBS[name](folder)(folder / "warm")  # so that no fork needs to import anything
    rng, job = random.Random(name), JOBS[name](folder)
    whole = folder / "whole"
    gc.collect()
    gc.freeze()  # otherwise garbage collection in a fork would copy the memory it shares with this process
    report = {"whole": finish(start(job, whole)), "error": error_of(whole), "trials": []}
    counted = folder / "events"
    keep = lambda events: counted.with_suffix(".count").write_text(f"{events.count} {time.process_time()}")  # noqa: E731
    finish(start(job, counted, lambda: Events(counted), keep))
    events, seconds = map(float, counted.with_suffix(".count").read_text().split())
    report |= {"left": left_in(whole), "events": events, "seconds": seconds}
    at_events = sorted(rng.sample(range(int(events)), min(int(events), kills // 2)))
    points = [("event", n) for n in at_events]
    points += [("second", rng.uniform(0.0, 0.95) * seconds) for _ in range(kills - len(points))]
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    points += [("bytes", int(largest * rng.random() ** 3)) for _ in range(8)]
    for number, (kind, point) in enumerate(points):
        out = folder / f"trial-{number}"
        if kind == "event":
            code = finish(start(job, out, lambda: Events(out, point, rng.randrange(150))))  # noqa: B023
        elif kind == "second":
            code, point = killed_within(job, out, point)
        else:
            limit = (point, resource.RLIM_INFINITY)
            code = finish(start(job, out, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)))  # noqa: B023
        trial = {"kind": kind, "point": point, "code": code, "said": error_of(out), "out": str(out)}
        out.with_suffix(".error").unlink(missing_ok=True)
        report["trials"].append(
            trial | {"resumed": finish(start(job, out)), "error": error_of(out), "left": left_in(out)}
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
