"""The process that asks math-verify whether answers are equal: `python -m rbfast.math_worker`.

A line of JSON in, `[expected, [statement, ...]]`, a line out, `true` or `false`; `"ready"` comes first. It has no time
limit of its own: whoever started it kills it. Memory is limited, for an answer may be a tower of powers.
"""

import contextlib
import json
import logging
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
        expected, statements = json.loads(line)
        gold = parse(expected, parsing_timeout=None)
        _say(answers, any(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None) for text in statements))


def _say(answers: Any, value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # no such limits on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
