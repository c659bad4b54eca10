"""The process that asks math-verify whether answers are equal: `python -m rbfast.math_worker`.

A line of JSON in, `[expected, [statement, ...], seconds]`, a line out, `true` or `false`; `"ready"` comes first. An
answer that takes more seconds of processor time ends the process, wherever it is; so a busy machine grades like an idle
one. Memory is limited too, for an answer may be a tower of powers.
"""

import contextlib
import json
import logging
import signal
import sys
from typing import Any

_MEMORY = 4 * 2**30  # bytes


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a parser prints is no answer
    _limit_memory()
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of every text it can not read
    _say(answers, "ready")
    for line in sys.stdin:
        expected, statements, seconds = json.loads(line)
        _end_after(seconds)
        gold = parse(expected, parsing_timeout=None)
        equal = any(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None) for text in statements)
        _end_after(0)
        _say(answers, equal)


def _say(answers: Any, value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)


def _end_after(seconds: float) -> None:
    """Of processor time, by the signal that nobody handles; 0 for never."""
    if hasattr(signal, "setitimer"):  # not on Windows, where the wall clock of whoever waits is the only limit
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # no such limits on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
