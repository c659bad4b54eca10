"""Grade answers in a process that can be killed: by math-verify, or by a reasoning-gym task's own verifier.

```python
judge("math-verify").ask(["$1/2$", "$0.5$"], seconds=5)         # True; None if there is no verdict within the limit
```

Both evaluate an answer to read it, and an answer may be a tower of powers or code. One process serves all answers of a
kind. If an answer takes too long or acts on files, processes or the network, the process ends (`judge_worker`), and the
next answer starts a new one.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import Any, Literal

from rbfast.grading.judge_worker import READY

log = logging.getLogger(__name__)

Kind = Literal["math-verify", "reasoning-gym"]
TIME_LIMIT = 5.0  # seconds of CPU time per answer
_WALL_CLOCK_FACTOR = 24  # wall-clock limit as a multiple of the CPU limit: the machine may be busy
_START_LIMIT = 120.0  # seconds; importing sympy is slow on a busy machine


class Judge:
    """A worker process, started at the first question and restarted after it died."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        self.killed = 0

    def ask(self, question: Sequence[Any], seconds: float = TIME_LIMIT) -> Any:
        """The verdict; None, with a warning, if there is none within so many seconds of CPU time.

        Args:
            question: `[expected, statement]` for math-verify, `[task, entry, reading]` for reasoning-gym.

        Raises:
            ImportError: the package cannot be imported.
            TimeoutError: the process did not start in time.
        """
        with self._lock:
            try:
                answer = self._answer(question, seconds)
            except BaseException:  # after Ctrl-C the next question would get the answer to this one
                self.close()
                raise
            if answer:
                return loads(answer)
            log.warning(
                "no verdict on %.80r: it takes more than %g s of CPU time or too much memory, or it is code that acts "
                "on files, processes or the network; it counts as wrong",
                question[-1],
                seconds,
            )
            self.close()
            self.killed += 1
            return None

    def _answer(self, question: Sequence[Any], seconds: float) -> str:
        """A line of JSON; empty if there is none within the limit."""
        process = self._ensure_running()
        assert process.stdin is not None
        try:
            process.stdin.write(base64.b64encode(pickle.dumps((seconds, question))).decode() + "\n")
            process.stdin.flush()
            return self._answers.get(timeout=_WALL_CLOCK_FACTOR * seconds)
        except (queue.Empty, BrokenPipeError):
            return ""

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # flushes what the process did not read
                process.stdin.close()

    def _ensure_running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it was killed since its last answer, as the system does if memory is short
        if self._process is None:
            self._process, self._answers = _start(self._kind)
            try:
                first = self._answers.get(timeout=_START_LIMIT)
            except queue.Empty:
                raise TimeoutError(
                    f"the process that grades answers by {self._kind} did not start within {_START_LIMIT:g} s; the "
                    "machine is probably short of memory or very busy: grade again when other work has ended"
                ) from None
            if first == "" or loads(first) != READY:
                self.close()
                why = loads(first) if first else "the grading process exited on startup"
                raise ImportError(f"answers are graded by the package {self._kind}, which cannot be imported: {why}")
        return self._process


def _start(kind: Kind) -> tuple[subprocess.Popen[str], queue.Queue[str]]:
    home = str(Path(__file__).resolve().parents[2])  # the package's parent folder, so that `-m` finds it
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "rbfast.grading.judge_worker", kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": paths},
    )
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_forward_lines, args=(process, answers), daemon=True).start()
    return process, answers


def _forward_lines(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    """Move output lines to a queue, which can be read with a timeout. An empty line means that the process ended."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")


def judge(kind: Kind) -> Judge:
    """The judge of this kind, shared by the whole process. A forked process gets its own: two processes that share a
    worker would get each other's answers."""
    return _judge_of(os.getpid(), kind)


@functools.cache
def _judge_of(pid: int, kind: Kind) -> Judge:
    shared = Judge(kind)

    def close() -> None:
        if os.getpid() == pid:  # a forked process may exit before its parent
            shared.close()

    atexit.register(close)
    return shared
