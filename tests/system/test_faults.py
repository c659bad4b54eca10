"""Jobs under faults: kills, full disks, unwritable folders, broken files and a clock that jumps."""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from openai_server import serving
from questions import QUESTIONS, solve
from real_inputs import ROOT
from tiny_models import llama
from tiny_runs import TOKENIZER, TRACES, run

from rbfast.data.signal_store import SignalStore
from rbfast.evaluation.decoding import Decoding
from rbfast.evaluation.evaluate import Result, _ResultsFile
from rbfast.grading.grade import Problem
from rbfast.inference.decoding import Completion
from rbfast.teacher.solutions import teach
from rbfast.training.checkpoints import last_checkpoint
from rbfast.training.distill import distill
from rbfast.utils.files import Journal, atomic_write

pytestmark = pytest.mark.slow

KILLS = 50


@pytest.mark.long
@pytest.mark.parametrize("job", ["training", "curation", "evaluation"])
def test_job_resumes_to_the_same_bytes_after_a_kill_or_a_full_disk(tmp_path, job):
    """Half of the kills come just before a file operation, the others anywhere. Then file sizes are limited."""
    worker = [sys.executable, str(ROOT / "tests" / "support" / "faults_worker.py"), job, str(tmp_path), str(KILLS)]
    home = {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(worker, env=os.environ | home, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["whole"] == 0 and report["left"], report["error"]
    killed = [trial for trial in report["trials"] if trial["kind"] != "bytes"]
    assert len(killed) == KILLS and all(trial["code"] < 0 for trial in killed)
    for trial in report["trials"]:
        assert trial["resumed"] == 0, (trial["kind"], trial["point"], trial["error"])
        assert trial["left"] == report["left"], (trial["kind"], trial["point"])
        if trial["kind"] == "bytes":
            assert trial["code"] == 3 and trial["out"] in trial["said"] and "too large" in trial["said"], trial


# --------------------------------------------------------------------------------------------------- unwritable folders


@pytest.fixture(params=["under a file", "read-only"])
def closed(request, tmp_path):
    """A folder that cannot be created. Root may write to a read-only folder, but not to the kernel's."""
    if request.param == "under a file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "out"
    if os.geteuid() == 0:
        if not Path("/sys/kernel").is_dir():
            pytest.skip("root may write everywhere here")
        return Path("/sys/kernel/out")
    (tmp_path / "closed").mkdir(mode=0o555)
    return tmp_path / "closed" / "out"


def test_unwritable_folder_is_refused_before_any_work(closed, monkeypatch):
    monkeypatch.setattr(
        "rbfast.training.distill._attach_adapter", lambda *args: pytest.fail("columns were placed first")
    )
    model = llama(vocab_size=len(TOKENIZER), max_position_embeddings=256)
    calls = [
        lambda: distill(model, TOKENIZER, TRACES, closed, quiet=True),
        lambda: Journal(closed / "file").append([1]),
        lambda: SignalStore(closed, "teacher", 4, 100),
        lambda: atomic_write(closed / "file").__enter__(),
    ]
    for call in calls:
        with pytest.raises(OSError) as caught:
            call()
        assert str(closed.parent) in str(caught.value)


# ------------------------------------------------------------------------------------------------------- broken files


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that was interrupted after its second checkpoint, and the result of an uninterrupted one."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        whole = run(folder / "whole", patch, placement="random")
        with pytest.raises(RuntimeError, match="power cut"):
            run(folder / "cut", patch, cut_at=5, placement="random")
    assert last_checkpoint(folder / "cut" / "checkpoints").endswith("checkpoint-4")
    return folder / "cut", whole


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
    "emptied": lambda path, rng: path.write_bytes(b""),
    "removed": lambda path, rng: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_checkpoint_is_reported_and_the_one_before_is_used(cut, tmp_path, damage):
    rng, source = random.Random(damage), cut[0] / "checkpoints"
    names = sorted(path.name for path in (source / "checkpoint-4").iterdir())
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "digests.json"} <= set(names)
    for name in names:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        DAMAGE[damage](folder / "checkpoint-4" / name, rng)
        with pytest.warns(
            UserWarning, match="(has changed since it was written|missing or broken); resuming from"
        ) as caught:
            assert last_checkpoint(folder) == str(folder / "checkpoint-2")
        assert name in str(caught[0].message) or name == "digests.json"
        DAMAGE[damage](folder / "checkpoint-2" / name, rng)
        with pytest.raises(ValueError, match=rf"checkpoint-4.*no other checkpoint is intact; remove {folder}"):
            last_checkpoint(folder)


def test_run_resumes_bitwise_from_the_checkpoint_before(cut, tmp_path, monkeypatch):
    shutil.copytree(cut[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="optimizer.pt has changed since it was written"):
        resumed = run(tmp_path / "run", monkeypatch, placement="random")
    assert all(np.array_equal(resumed[name], value) for name, value in cut[1].items())


@pytest.mark.parametrize("text", ["", "3", "{", "[" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["run.json", "log.json"])
def test_broken_run_file_is_refused(cut, tmp_path, monkeypatch, name, text):
    shutil.copytree(cut[0], tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    place = f"{name}, column {len(text.strip(chr(0))) + 1}" if text in ("", "{", "\x00") else name
    with pytest.raises(ValueError, match=f"{place}: expected"):
        run(tmp_path / "run", monkeypatch, placement="random")


def test_incomplete_results_of_a_problem_are_removed(tmp_path):
    decoding = Decoding(samples=2, temperature=1.0)
    problems = [Problem("t", name, "1", {}) for name in "ab"]
    store = _ResultsFile(tmp_path / "results.jsonl", decoding)
    results = [Result(problem, Completion("1", 1, False), 1.0, sample) for problem in problems for sample in (0, 1)]
    store.add(results)
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert [result.problem for found in store.read(problems).values() for result in found] == problems[:1] * 2
    store.add(results[2:])
    assert (tmp_path / "results.jsonl").read_bytes() == whole


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftovers = [tmp_path / f".file.{number}.tmp" for number in (int(dead.stdout), os.getppid())]
    for path in leftovers:
        path.write_text("half")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert [path.exists() for path in leftovers] == [False, True]


# ------------------------------------------------------------------------------------------------------------- clocks


def test_no_module_reads_the_wall_clock():
    """Durations come from a monotonic clock, so a wall clock that jumps changes nothing."""
    for path in Path(sys.modules["rbfast"].__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("time", "time"), ("datetime", "now")}, path


@pytest.fixture
def jumping_clock(monkeypatch):
    """A wall clock that jumps by up to an hour. Returns the requested pauses."""
    rng, real, pauses = random.Random(0), time.time, []
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-3600, 3600))
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_training_does_not_depend_on_the_wall_clock(cut, tmp_path, monkeypatch, jumping_clock):
    trained = run(tmp_path / "run", monkeypatch, placement="random")
    assert all(np.array_equal(trained[name], value) for name, value in cut[1].items())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] > 0


@pytest.mark.parametrize("wait", ["0", "-5", "1e9", "²", "9" * 400, "", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_busy_server_is_never_waited_for_long(tmp_path, jumping_clock, wait):
    with serving(llama(vocab_size=len(TOKENIZER)), TOKENIZER, script=solve) as server:
        server.faults, server.retry_after = [429, None, 503], wait
        taught = teach(server.client(), QUESTIONS[:3], tmp_path, concurrency=1)
    too_long = wait in ("1e9", "9" * 400)  # the question stays open for the next call
    assert (len(taught.traces), taught.open) == ((1, 2) if too_long else (3, 0))
    assert all(0 <= pause <= 120 for pause in jumping_clock) and len(jumping_clock) == (0 if too_long else 2)
