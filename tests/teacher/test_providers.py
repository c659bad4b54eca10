"""Providers with their own API, through litellm, against a server that imitates them."""

import logging
import time

import pytest
from fake_api import Answer, answering

from rbfast.cli.main import main
from rbfast.teacher.client import ServerError
from rbfast.teacher.jobs import Question
from rbfast.teacher.solutions import teach

pytestmark = pytest.mark.slow  # importing litellm takes seconds
litellm = pytest.importorskip("litellm", reason="needs the extra teachers")

KEY = "sk-ant-0123456789abcdef"
THOUGHT, ANSWER = "Two and two make four.", "<answer>4</answer>"
QUESTION = Question("What is 2 + 2?")
CLAUDE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5",
    "content": [
        {"type": "thinking", "thinking": THOUGHT, "signature": "s"},
        {"type": "text", "text": ANSWER},
    ],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 10, "output_tokens": 40},
}
GEMINI = {
    "candidates": [
        {
            "content": {"role": "model", "parts": [{"text": THOUGHT, "thought": True}, {"text": ANSWER}]},
            "finishReason": "STOP",
        }
    ],
    "usageMetadata": {
        "promptTokenCount": 5,
        "candidatesTokenCount": 7,
        "thoughtsTokenCount": 90,
        "totalTokenCount": 102,
    },
}


def refusal(kind, message):
    return {"type": "error", "error": {"type": kind, "message": message}}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.delenv("RBFAST_API_KEY", raising=False)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


def provider(name, model, api, **options):
    from rbfast.teacher.providers import Provider

    return Provider(name, model, api.host, **{"timeout": 5, "seed": None} | options)


def test_claude_uses_its_own_api_and_keeps_its_thinking(tmp_path):
    with answering(CLAUDE) as api:
        teacher = provider("anthropic", "claude-sonnet-4-5", api, temperature=1.0)
        extra = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
        taught = teach(teacher, [QUESTION], tmp_path, max_tokens=5000, extra=extra)
        [request] = api.requests
    assert request.path == "/v1/messages" and request.headers["X-Api-Key"] == KEY
    assert request.body["max_tokens"] == 5000 and request.body["thinking"]["budget_tokens"] == 2000
    [trace] = taught.traces
    assert (trace.reasoning, trace.answer, trace.teacher) == (THOUGHT, "4", "anthropic/claude-sonnet-4-5")
    assert (taught.read, taught.written) == (10, 40)
    assert THOUGHT in (tmp_path / "replies.jsonl").read_text() and KEY not in (tmp_path / "replies.jsonl").read_text()


def test_gemini_uses_its_own_api_and_counts_its_thinking(tmp_path):
    with answering(GEMINI) as api:
        teacher = provider("gemini", "gemini-2.5-pro", api)
        taught = teach(teacher, [QUESTION], tmp_path, max_tokens=5000, extra={"reasoning_effort": "high"})
        [request] = api.requests
    assert request.path.endswith("/models/gemini-2.5-pro:generateContent")
    config = request.body["generationConfig"]
    assert config["max_output_tokens"] == 5000 and config["thinkingConfig"]["includeThoughts"] is True
    assert [(trace.reasoning, trace.answer) for trace in taught.traces] == [(THOUGHT, "4")]
    assert (taught.read, taught.written) == (5, 97)


@pytest.mark.parametrize(("stop", "traces"), [("end_turn", 1), ("max_tokens", 0), ("refusal", 0)])
def test_unfinished_reply_is_no_trace(tmp_path, stop, traces):
    with answering(CLAUDE | {"stop_reason": stop}) as api:
        taught = teach(provider("anthropic", "claude-sonnet-4-5", api), [QUESTION], tmp_path, max_tokens=5000)
    assert (len(taught.traces), taught.failed) == (traces, 1 - traces)


def test_busy_provider_is_retried_after_the_requested_pause(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    busy = Answer(refusal("rate_limit_error", "slow down"), 429, {"Retry-After": "7"})
    with answering(busy, Answer(refusal("overloaded_error", "Overloaded"), 529), CLAUDE) as api:
        teacher = provider("anthropic", "claude-sonnet-4-5", api)
        assert len(teach(teacher, [QUESTION], tmp_path).traces) == 1
        assert len(api.requests) == 3 and teacher.retried.made == 2
    assert pauses[0] == 7 and len(pauses) == 2


def test_wrong_key_fails_at_once_and_is_not_shown(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with answering(Answer(refusal("authentication_error", f"invalid x-api-key {KEY}"), 401)) as api:
        with pytest.raises(ServerError, match="returned 401") as caught:
            teach(provider("anthropic", "claude-sonnet-4-5", api), [QUESTION] * 3, tmp_path, concurrency=1)
        assert len(api.requests) == 1
    printed = capfd.readouterr()
    for text in (str(caught.value), repr(caught.value), caplog.text, printed.out, printed.err):
        assert KEY not in text
    assert "Give Feedback" not in printed.out  # litellm prints it by default


@pytest.mark.parametrize("name", ["AIMLAPI_KEY", "SCW_SECRET_KEY", "AWS_BEARER_TOKEN_BEDROCK", "SNOWFLAKE_JWT"])
def test_key_of_every_provider_is_hidden(monkeypatch, name):
    from rbfast.teacher.providers import Provider

    monkeypatch.setenv(name, "another-0123456789")
    assert Provider("anthropic", "m").hide("bad key another-0123456789.") == f"bad key {'*' * 18}."


def test_refused_parameters_are_dropped_with_a_warning(tmp_path):
    """litellm knows that Claude has no seed. The provider itself refuses a temperature with thinking."""
    message = "`temperature` may only be set to 1 when thinking is enabled."
    with answering(Answer(refusal("invalid_request_error", message), 400), CLAUDE) as api:
        teacher = provider("anthropic", "claude-sonnet-4-5", api, temperature=0.7, seed=0)
        with pytest.warns(UserWarning) as warned:
            assert len(teach(teacher, [QUESTION], tmp_path).traces) == 1
        assert "temperature" not in api.bodies[-1]
    assert [str(w.message).split(":")[0] for w in warned if "refuses" in str(w.message)] == [
        "the server refuses seed",
        "the server refuses temperature",
    ]


def test_mistyped_provider_is_refused_with_a_suggestion(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"problem": "2 + 2?"}\n')
    command = ["teach", "m", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--provider", "antropic"]
    assert main(command) == 2
    assert "unknown provider 'antropic': use one that litellm knows, like anthropic" in capsys.readouterr().err


def test_command_line_queries_a_provider(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"problem": "2 + 2?", "answer": 4}\n')
    with answering(CLAUDE) as api:
        command = ["teach", "claude-sonnet-4-5", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--json"]
        assert main([*command, "--provider", "anthropic", "--server", api.host, "--reasoning-effort", "low"]) == 0
        assert api.bodies[0]["thinking"]["type"] == "enabled"
    assert '"traces": 1' in capsys.readouterr().out


def test_pause_in_a_gemini_error_is_honoured(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37.5s"}]
    error = {
        "code": 429,
        "message": "You exceeded your quota. " * 30,
        "status": "RESOURCE_EXHAUSTED",
        "details": details,
    }
    with answering(Answer({"error": error}, 429), GEMINI) as api:
        taught = teach(provider("gemini", "gemini-2.5-pro", api), [QUESTION], tmp_path)
    assert len(taught.traces) == 1 and pauses == [37.5]
