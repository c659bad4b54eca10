"""The grading process: `python -m rbfast.grading.judge_worker math-verify|reasoning-gym`.

It reads a question per line from stdin (from `rbfast.grading.judge`) and writes a JSON verdict per line to stdout. The
first line is `"ready"`, or why a package could not be imported. An answer that exceeds its time limit ends the process.
The limit is CPU time, so that a busy machine grades like an idle one. Memory is limited too: an answer may be a tower
of powers.

Several verifiers of reasoning-gym evaluate an answer as Python. So an answer that writes a file, starts a process or
opens a connection ends the process too. This guards against what a model happens to write; it is not a sandbox.
"""

import base64
import contextlib
import functools
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any

from rbfast.utils.packages import error_line

READY = "ready"
_MEMORY = 4 * 2**30  # bytes
# Prefixes of the audit events that end the process.
_ACTS = (
    *("os.", "shutil.", "subprocess.", "pty.", "socket.", "ctypes.", "fcntl.", "mmap.", "sqlite3.", "signal."),
    *("builtins.input", "builtins.breakpoint", "time.sleep"),
)
_READS = ("os.listdir", "os.scandir", "os.walk", "os.putenv")  # allowed: a late import raises them
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent handles it
    answers = sys.stdout
    sys.stdout = sys.stderr  # keeps a parser's prints out of the verdicts
    _limit_memory()
    try:
        judge = _JUDGES[sys.argv[1]]()
    except Exception as error:  # an import may raise anything
        _write_verdict(answers, error_line(error))
        return
    _forbid_acts()
    _write_verdict(answers, READY)
    for line in sys.stdin:
        seconds, question = pickle.loads(base64.b64decode(line))  # from the process that started this one
        _set_time_limit(seconds)
        verdict = judge(*question)
        _set_time_limit(0)
        _write_verdict(answers, verdict)


def _math_verify() -> Callable[[str, str], bool]:
    from rbfast.grading.expressions import same_value  # imports sympy

    def is_equal(expected: str, statement: str) -> bool:
        try:
            return same_value(expected, statement)
        except _UNREADABLE:
            return False

    return is_equal


# What parsing a malformed answer may raise. Anything else is a bug and ends the process.
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, RecursionError)


def _reasoning_gym() -> Callable[[str, dict[str, Any], str], float]:
    import reasoning_gym

    verifier_of = functools.cache(reasoning_gym.get_score_answer_fn)

    def score(task: str, entry: dict[str, Any], reading: str) -> float:
        try:
            return float(verifier_of(task)(reading, entry))
        except _UNREADABLE:
            return 0.0

    return score


_JUDGES: dict[str, Callable[[], Callable[..., Any]]] = {"math-verify": _math_verify, "reasoning-gym": _reasoning_gym}


def _write_verdict(answers: Any, value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)


def _set_time_limit(seconds: float) -> None:
    """End the process after so many seconds of CPU time, by a signal without a handler; 0 cancels."""
    if hasattr(signal, "setitimer"):  # not on Windows, where only the wall-clock limit of `Judge` applies
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _forbid_acts() -> None:
    """From now on, end the process if it acts on anything outside itself: a verifier could catch an exception."""

    def check(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & _WRITES
        if writes or (event.startswith(_ACTS) and event not in _READS):
            os._exit(1)

    sys.dont_write_bytecode = True  # a late import would write it
    sys.addaudithook(check)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # no such limits on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
