"""A trace in its shortest and in its fullest form."""

from rbfast.data.trace import Trace

ROW = {"problem": "What is 2 + 3?", "reasoning": "First, add them.\n2 + 3 = 5.", "answer": "5"}
FULL = ROW | {
    "plan": "Add. \u2028 café 😀",
    "domain": "arithmetic",
    "source": "made",
    "teacher": "by hand",
    "id": "a/1",
    "difficulty": 0.25,
    "verified": True,
    "spans": [[0, 17, "strategic"], [17, 27, "tactical"]],
    "signals": {"ids": [[5, 7], [1]], "logprobs": [[-0.1, -3.0], [0.0]]},
}


def trace(**changes) -> Trace:
    """ROW as a trace, with these fields changed."""
    return Trace.from_dict(ROW | changes)
