r"""Whether two mathematical answers are equal, by math-verify in a process that can be killed.

```python
equal(r"\frac{14}{3}", "14/3")             # True
```

One process serves all answers; one that takes too long is killed with it, counts as wrong, and the next answer gets a
new process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

log = logging.getLogger(__name__)

TIME_LIMIT = 5.0  # seconds of processor time an answer
_PATIENCE = 24  # times as long by the wall clock: the machine may be busy
_START_LIMIT = 120.0  # seconds; importing sympy on a busy machine
_ROOT = re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\w+))")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")


def equal(expected: str, statement: str, time_limit: float = TIME_LIMIT) -> bool:
    """Whether a statement is the expected answer: the same words, or mathematics that math-verify finds equal.

    Raises:
        ImportError: math-verify is not installed.
    """
    expected, statement = _plain(expected), _plain(statement)
    if not expected or not statement:
        return False
    if _words(expected) == _words(statement):
        return True
    return _verifier().ask(f"${expected}$", [f"${statement}$", statement], time_limit)


def require() -> None:
    """Raises ImportError, with what to do, where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("mathematical answers are graded by the package math-verify: pip install math-verify")


def _plain(text: str) -> str:
    """Without dollars around it and a full stop behind it, and with roots that are signs as LaTeX."""
    text = re.sub(r"^[\s$*]+|[\s$*.]+$", "", text)
    return _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2] or match[3]}}}", text)


def _words(text: str) -> str:
    text = _TEXT.sub(r"\1", text).replace("\\left", "").replace("\\right", "").replace("dfrac", "frac")
    return re.sub(r"\\[ ,;!]|\s+", "", text).casefold()


class Verifier:
    """A worker process, started at the first question and again after every one that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        self.killed = 0

    def ask(self, expected: str, statements: list[str], time_limit: float) -> bool:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([expected, statements, time_limit]) + "\n")
                process.stdin.flush()
                answer = self._answers.get(timeout=_PATIENCE * time_limit)
            except (queue.Empty, BrokenPipeError):
                answer = ""
            if answer:
                return bool(json.loads(answer))
            log.warning(
                "no verdict on %.80r within %g s of processor time: counted as wrong", statements[-1], time_limit
            )
            self.close()
            self.killed += 1
            return False

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                self._process.stdin.close()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process, self._answers = _start()
            if self._answers.get(timeout=_START_LIMIT) == "":
                self.close()
                raise RuntimeError("the grading process ended as it started: does `import math_verify` work?")
        return self._process


def _start() -> tuple[subprocess.Popen[str], queue.Queue[str]]:
    home = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "rbfast.math_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": paths},
    )
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pump, args=(process, answers), daemon=True).start()
    return process, answers


def _pump(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    """Moves lines to where one can wait for them with a time limit; an empty one says that the process has ended."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")


_VERIFIERS: list[Verifier] = []


def _verifier() -> Verifier:
    if not _VERIFIERS:
        require()
        _VERIFIERS.append(Verifier())
        atexit.register(_VERIFIERS[0].close)
    return _VERIFIERS[0]
