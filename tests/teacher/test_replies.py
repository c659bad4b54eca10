"""Replies in every shape that servers send: their thinking, finish reasons and token counts."""

import json
import re
import warnings

import pytest
from fake_api import answering, chat_reply

from rbfast.teacher.budget import Prices
from rbfast.teacher.jobs import Question
from rbfast.teacher.solutions import teach

QUESTION = Question("What is 2 + 2?")
THOUGHT, ANSWER = "Two and two make four.", "<answer>4</answer>"
HARMONY = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}"

SHAPES = {
    "reasoning": {"content": ANSWER, "reasoning": THOUGHT},
    "reasoning_content": {"content": ANSWER, "reasoning_content": THOUGHT},
    "both": {"content": ANSWER, "reasoning": THOUGHT, "reasoning_content": THOUGHT},
    "reasoning beside an empty field": {"content": ANSWER, "reasoning_content": None, "reasoning": THOUGHT},
    "details": {"content": ANSWER, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]},
    "a summary": {"content": ANSWER, "reasoning_details": [{"type": "reasoning.summary", "summary": THOUGHT}]},
    "blocks": {"content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": ANSWER}]},
    "nested blocks": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
            {"type": "text", "text": ANSWER},
        ]
    },
    "parts": {"content": [{"type": "reasoning", "text": THOUGHT}, {"type": "output_text", "text": ANSWER}]},
    "tags": {"content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"},
    "only a closing tag": {"content": f"{THOUGHT}\n</think>\n\n{ANSWER}"},
    "harmony": {"content": HARMONY},
    "harmony without its tokens": {"content": f"analysis{THOUGHT}assistantfinal{ANSWER}"},
    "blocks in their own field": {"content": ANSWER, "thinking_blocks": [{"type": "thinking", "thinking": THOUGHT}]},
    "a list in its own field": {"content": ANSWER, "reasoning": [{"type": "text", "text": THOUGHT}]},
    "a provider's fields": {"content": ANSWER, "provider_specific_fields": {"reasoning_content": THOUGHT}},
    "no role": {"role": None, "content": ANSWER, "thinking": THOUGHT},
}


def taught_by(tmp_path, *replies, questions=(QUESTION,), **options):
    with answering(*replies) as api:
        return teach(api.client(), questions, tmp_path, **{"concurrency": 1} | options)


def failures(tmp_path):
    return [json.loads(line)["reason"] for line in (tmp_path / "failed.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("message", SHAPES.values(), ids=SHAPES)
def test_thinking_is_found_in_every_shape_and_the_message_is_kept(tmp_path, message):
    message = {"role": "assistant"} | message
    [trace] = taught_by(tmp_path, chat_reply(message)).traces
    assert (trace.reasoning, trace.answer) == (THOUGHT, "4")
    [record] = map(json.loads, (tmp_path / "replies.jsonl").read_text().splitlines())
    assert record["message"] == message and record["usage"]["total_tokens"] == 8
    [again] = taught_by(tmp_path, chat_reply("never asked")).traces
    assert again == trace


def test_unclosed_thinking_is_no_trace(tmp_path):
    assert taught_by(tmp_path, chat_reply(f"<think>{THOUGHT} {ANSWER}")).failed == 1
    assert "never closed" in failures(tmp_path)[0]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("length", "cut at the token limit; raise max_tokens, or the server's context"),
        ("max_tokens", "cut at the token limit"),
        ("MAX_TOKENS", "cut at the token limit"),
        ("model_length", "the model's own limit"),
        ("content_filter", "finish_reason 'content_filter'"),
        ("error", "finish_reason 'error'"),
        ("abort", "finish_reason 'abort'"),
        ("tool_calls", "finish_reason 'tool_calls'"),
        ("insufficient_system_resource", "finish_reason 'insufficient_system_resource'"),
    ],
)
def test_unfinished_reply_is_no_trace(tmp_path, reason, message):
    taught = taught_by(tmp_path, chat_reply({"content": ANSWER, "reasoning": THOUGHT}, reason))
    assert (taught.traces, taught.failed) == ([], 1) and message in failures(tmp_path)[0]


@pytest.mark.parametrize("reason", ["stop", None, "", "STOP", "end_turn", "eos_token"])
def test_finished_reply_is_a_trace(tmp_path, reason):
    assert len(taught_by(tmp_path, chat_reply({"content": ANSWER, "reasoning": THOUGHT}, reason)).traces) == 1


@pytest.mark.parametrize(
    ("reply", "pattern"),
    [
        (chat_reply({"content": None, "refusal": "I cannot help with that."}), "refused: I cannot help"),
        (chat_reply({"content": ANSWER, "reasoning": THOUGHT}, error={"code": 502}), "with an error: .*502"),
        (chat_reply({"content": [{"type": "tool_use", "id": "x"}]}), "got tool_use"),
        (chat_reply({"content": None}), "no answer"),
    ],
)
def test_paid_reply_without_a_solution_is_kept_with_the_reason(tmp_path, reply, pattern):
    taught = taught_by(tmp_path, reply)
    assert (taught.failed, taught.open, taught.written) == (1, 0, 5)
    assert re.search(pattern, failures(tmp_path)[0])


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": [{}]}, {"choices": 3}, {"choices": [{"message": 1}]}]
)
def test_reply_that_is_no_chat_completion_stays_open(tmp_path, reply):
    taught = taught_by(tmp_path, reply)
    assert taught.open == 1 and "no chat completion" in taught.reason


def reasoned(tokens):
    return {"completion_tokens_details": {"reasoning_tokens": tokens}}


@pytest.mark.filterwarnings("ignore:the teacher counts thinking tokens")
@pytest.mark.parametrize(
    ("usage", "read", "written"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}, 10, 20),
        ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 530}, 10, 520),
        ({"prompt_tokens": 10, "completion_tokens": 20}, 10, 20),
        ({"prompt_tokens": 10, "completion_tokens": 20, "completion_tokens_details": None}, 10, 20),
        ({"prompt_tokens": 10, "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 15}}, 10, 20),
        (
            {"prompt_tokens": 10, "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 90}},
            10,
            110,
        ),
        ({"completion_tokens": 20, "total_tokens": 30}, 10, 20),
        ({"prompt_tokens": 10, "total_tokens": 70}, 10, 60),
        ({"prompt_tokens": "10", "completion_tokens": -5}, None, 300),
        ({}, None, 300),
    ],
)
def test_larger_token_count_is_used(tmp_path, usage, read, written):
    taught = taught_by(tmp_path, chat_reply(ANSWER, usage=usage), max_tokens=300, system="")
    worst = len(QUESTION.text) + 64
    assert (taught.read, taught.written) == (worst if read is None else read, written)


def test_budget_holds_when_a_server_exceeds_max_tokens(tmp_path):
    """Each reply takes 500 tokens of hidden thinking, although 100 are allowed: the next one needs 500 left."""
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 510}
    questions = [Question(f"What is {n} + 2?") for n in range(9)]
    reply = chat_reply({"content": ANSWER, "reasoning": THOUGHT}, usage=usage)
    options = {"max_tokens": 100, "prices": Prices(0, 1000), "max_cost": 1.2}
    taught = taught_by(tmp_path, reply, questions=questions, concurrency=8, **options)
    assert (len(taught.traces), taught.open, taught.cost) == (2, 7, 1.0) and "budget" in taught.reason
    again = taught_by(tmp_path, reply, questions=questions, **options)
    assert again.cost == 1.0


def test_hidden_thinking_warns_once(tmp_path):
    usage = {"prompt_tokens": 10, "completion_tokens": 80, **reasoned(60)}
    questions = [Question(f"What is {n} + 2?") for n in range(3)]
    with pytest.warns(UserWarning, match="counts thinking tokens but sends no thinking") as warned:
        taught_by(tmp_path / "hidden", chat_reply(f"So.\n{ANSWER}", usage=usage), questions=questions)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taught_by(tmp_path / "sent", chat_reply({"content": ANSWER, "reasoning": THOUGHT}, usage=usage))
        taught_by(tmp_path / "tagged", chat_reply(f"<think>{THOUGHT}</think>{ANSWER}", usage=usage))


def test_logprobs_without_candidates_keep_the_text(tmp_path):
    tokens = [{"token": "<answer>4", "bytes": None, "logprob": -0.1, "top_logprobs": None}, {"token": "</answer>"}]
    huge = [{"token": "a", "top_logprobs": [{"token": "a", "logprob": 10**400}]}]
    for number, content in enumerate([tokens, None, [{"logprob": "?"}], "?", [{"token": "a", "bytes": 2**63}], huge]):
        reply = chat_reply({"content": ANSWER, "reasoning": THOUGHT}, logprobs={"content": content})
        taught = taught_by(tmp_path / str(number), reply, top_logprobs=5)
        assert len(taught.traces) == 1, content
    assert len(taught_by(tmp_path / "null", chat_reply(f"So.\n{ANSWER}", logprobs=None)).traces) == 1
