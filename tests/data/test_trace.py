"""Trace fields: accepted values, errors for the rest, and the roles of the parts of a trace."""

import math

import pytest
from traces import FULL, ROW, trace

from rbfast.data.spans import STRATEGIC, TACTICAL, Span, split_spans
from rbfast.data.trace import Trace, TraceError

# Schema


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": None}, "problem: expected a string, got null"),
        ({"answer": math.nan}, "answer: expected a string, got float nan"),
        ({"answer": True}, "answer: expected a string, got bool True"),
        ({"reasoning": ["a"]}, r"reasoning: expected a string, got list \['a'\]"),
        ({"reasoning": " \n"}, "reasoning: expected text, got an empty string"),
        ({"problem": "a\ud800"}, "problem: expected Unicode text, got half a surrogate pair at character 1"),
        ({"plan": 1}, "plan: expected a string, got int 1"),
        ({"id": [7]}, r"id: expected a string, got list \[7\]"),
        ({"domain": math.nan}, "domain: expected a string, got float nan"),
        ({"difficulty": math.nan}, "difficulty: expected a finite number or null, got float nan"),
        ({"difficulty": "hard"}, "difficulty: expected a finite number or null, got str 'hard'"),
        ({"difficulty": True}, "difficulty: expected a finite number or null, got bool True"),
        ({"verified": 1}, "verified: expected true, false or null, got int 1"),
        ({"spans": "all"}, "spans: expected"),
        ({"spans": [[0, 27, "tactics"]]}, "spans: expected .* with a role of strategic, tactical, answer"),
        ({"spans": [[0, 27]]}, "spans: expected"),
        ({"spans": [[0.0, 27, "tactical"]]}, "spans: expected integers"),
        ({"spans": []}, "spans: expected the last span to end with the reasoning at character 27, got 0"),
        ({"spans": [[1, 27, "tactical"]]}, "spans: expected a span that starts at character 0"),
        ({"spans": [[0, 9, "tactical"], [8, 27, "tactical"]]}, "spans: expected a span that starts at character 9"),
        ({"spans": [[0, 0, "tactical"], [0, 27, "tactical"]]}, "spans: expected a span that .* is not empty"),
        ({"signals": {"ids": [[1]], "logprobs": [[0.5]]}}, "signals.logprobs: .* of at most 0, got 0.5"),
        ({"turns": [{"role": "user", "content": "2+2?"}]}, "turns: expected a reply to every question"),
        ({"spans": [[0, 26, "tactical"]]}, "spans: .* at character 27, got 26"),
        ({"spans": [[0, 28, "tactical"]]}, "spans: .* at character 27, got 28"),
        ({"signals": [[1]]}, "signals: expected"),
        ({"signals": {"ids": [[1]]}}, "signals: expected"),
        ({"signals": {"ids": [1], "logprobs": [0.0]}}, "signals.ids: expected a list of lists"),
        ({"signals": {"ids": [["1"]], "logprobs": [[0.0]]}}, "signals.ids: expected numbers, got str"),
        ({"signals": {"ids": [[-1]], "logprobs": [[0.0]]}}, "signals.ids: .* negative"),
        ({"signals": {"ids": [[1]], "logprobs": [[None]]}}, "signals.logprobs: expected numbers, got NoneType"),
        ({"signals": {"ids": [[1]], "logprobs": [[math.nan]]}}, "signals.logprobs: expected finite .* got nan"),
        ({"signals": {"ids": [[1]], "logprobs": [[-math.inf]]}}, "signals.logprobs: expected finite .* got -inf"),
        ({"signals": {"ids": [[1]], "logprobs": [[-(10**400)]]}}, "signals.logprobs: expected finite .* got -1000"),
        ({"signals": {"ids": [[1]], "logprobs": [[12.5]]}}, "signals.logprobs: .* rather than logits"),
        ({"signals": {"ids": [[1, 2]], "logprobs": [[0.0]]}}, "signals: expected as many ids as logprobs"),
        ({"signals": {"ids": [[1], []], "logprobs": [[0.0], []]}}, "signals: .* got none in row 1"),
    ],
)
def test_error_names_the_wrong_field(changes: dict, message: str) -> None:
    with pytest.raises(TraceError, match=f"^{message}"):
        Trace.from_dict(ROW | changes)


def test_numbers_are_converted_to_text() -> None:
    trace = Trace.from_dict(ROW | {"answer": 5, "id": 7, "domain": 3, "source": 2024})
    assert (trace.domain, trace.source) == ("3", "2024")
    assert (trace.answer, trace.id) == ("5", "7")
    assert Trace.from_dict(ROW | {"answer": 0.5}).answer == "0.5"


@pytest.mark.parametrize("field", ["problem", "reasoning", "answer"])
def test_error_names_the_missing_field_and_the_present_ones(field: str) -> None:
    row = {("question" if name == field else name): text for name, text in ROW.items()}
    with pytest.raises(TraceError, match=f"^{field}: expected this field, got .*question"):
        Trace.from_dict(row)


def test_trace_made_in_code_is_checked_too() -> None:
    with pytest.raises(TraceError, match=r"^spans: "):
        Trace("p", "reasoning", "a", spans=(Span(0, 3, TACTICAL),))


def test_dict_round_trip() -> None:
    assert Trace.from_dict(FULL).to_dict() == FULL
    assert trace(plan="", extra="ignored").to_dict() == ROW


def test_error_shortens_a_long_value() -> None:
    with pytest.raises(TraceError) as raised:
        trace(plan=list(range(10**6)))
    assert len(str(raised.value)) < 200


# Roles of a trace


def test_spans_tile_the_thought() -> None:
    planned = trace(plan="Add them.")
    assert planned.completion() == "Add them.\n\nFirst, add them.\n2 + 3 = 5.\n\n<answer>5</answer>"
    assert planned.thought_spans() == [Span(0, 11, STRATEGIC), Span(11, 28, STRATEGIC), Span(28, 38, TACTICAL)]


def test_given_spans_take_precedence_over_the_splitter() -> None:
    marked = trace(spans=[[0, 20, "tactical"], [20, 27, "strategic"]])
    assert marked.thought_spans()[:2] == [Span(0, 20, TACTICAL), Span(20, 27, STRATEGIC)]
    assert marked.thought_spans()[:2] != split_spans(marked.reasoning)


def test_spans_may_be_objects_as_parquet_needs() -> None:
    objects = [{"start": 0, "end": 27, "role": "tactical"}]
    assert trace(spans=objects) == trace(spans=[[0, 27, "tactical"]])
