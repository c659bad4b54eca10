"""The client against the replies that real servers send: busy, broken or oddly shaped."""

import json
import time
from email.utils import formatdate

import pytest
from fake_api import Answer, answering, chat_reply, events
from guides import make_guide

from rbfast.inference.remote import chat, write
from rbfast.teacher.client import IncompleteReply, Retries, ServerError, call_with_retries

REQUEST = {"messages": [{"role": "user", "content": "2 + 2?"}], "max_tokens": 50}
GOOD = chat_reply("4")


def ask(api, **options):
    return api.client(**options).ask("/chat/completions", REQUEST)


@pytest.fixture
def pauses(monkeypatch):
    """The requested pauses, which take no time."""
    made = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 520, 522, 524, 529])
def test_busy_server_is_retried(status, pauses):
    with answering(Answer({"error": {"message": "busy"}}, status), GOOD) as api:
        server = api.client()
        assert server.ask("/chat/completions", REQUEST) == GOOD
        assert len(api.requests) == 2 and (server.retried.made, server.retried.waiting) == (1, 0)
        assert len(pauses) == 1 and 0 < pauses[0] <= 1


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
def test_refusal_is_final_and_reported(status, pauses):
    with answering(Answer({"error": {"message": "no such thing"}}, status), GOOD) as api:
        with pytest.raises(ServerError, match=f"returned {status}: .*no such thing") as caught:
            ask(api)
        assert len(api.requests) == 1 and caught.value.status == status and pauses == []


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        (lambda: {"Retry-After": "7"}, 7),
        (lambda: {"Retry-After": "1.5"}, 1.5),
        (lambda: {"Retry-After-Ms": "2500"}, 2.5),
        (lambda: {"Retry-After": formatdate(time.time() + 20, usegmt=True)}, 20),
    ],
)
def test_requested_pause_is_honoured(headers, pause, pauses):
    with answering(Answer("busy", 429, headers()), GOOD) as api:
        assert ask(api) == GOOD
    assert pauses == [pytest.approx(pause, abs=2 if pause == 20 else 0.01)]


@pytest.mark.parametrize(("requested", "expected"), [(None, [0.5, 1, 2, 4, 8, 8]), (7, [7] * 6), (9999, [120] * 6)])
def test_pauses_grow_or_are_those_requested_up_to_a_limit(requested, expected, pauses):
    def attempt():
        raise IncompleteReply("busy", 503, requested)

    with pytest.raises(ServerError, match="busy"):
        call_with_retries(Retries(), 6, attempt)
    assert pauses == expected


def test_retries_are_limited(pauses):
    with answering(Answer("still busy", 503)) as api:
        with pytest.raises(ServerError, match="returned 503: still busy"):
            ask(api, retries=2)
        assert len(api.requests) == 3


@pytest.mark.parametrize("code", ["9" * 5000, -503, 2**63, "²²²", 400.5, True, []])
def test_invalid_error_code_still_raises(code):
    with answering({"error": {"code": code, "message": "too long"}}) as api:
        with pytest.raises(ServerError, match="sent an error: ") as caught:
            ask(api)
        assert caught.value.status is None


def test_error_in_a_reply_of_status_200_is_reported(pauses):
    with answering({"error": {"code": 400, "message": "Provider returned error: context too long"}}) as api:
        with pytest.raises(ServerError, match=r"sent an error: .*context too long") as caught:
            ask(api)
        assert len(api.requests) == 1 and caught.value.status == 400
    with answering({"error": "model overloaded"}) as api, pytest.raises(ServerError, match="error: model overloaded"):
        ask(api)


def test_busy_error_in_a_reply_of_status_200_is_retried(pauses):
    with answering({"error": {"code": 429, "message": "later"}}, {"error": {"code": "502"}}, GOOD) as api:
        server = api.client()
        assert server.ask("/chat/completions", REQUEST) == GOOD and server.retried.made == 2
    with answering({"error": {"code": 503, "message": "later"}}) as api:
        with pytest.raises(ServerError, match="later") as caught:
            ask(api, retries=1)
        assert len(api.requests) == 2 and caught.value.status == 503


def test_null_error_is_ignored():
    with answering(GOOD | {"error": None}) as api:
        assert ask(api)["choices"] == GOOD["choices"]


@pytest.mark.parametrize("garbage", ["<html>starting</html>", "[1]", "", '{"choices":'])
def test_reply_that_is_no_object_is_retried(garbage, pauses):
    with answering(Answer(garbage), GOOD) as api:
        assert ask(api) == GOOD and len(api.requests) == 2
    with answering(Answer(garbage)) as api, pytest.raises(ServerError, match="sent no JSON object"):
        ask(api, retries=1)


def test_proxy_from_the_environment_is_used(monkeypatch):
    with answering(GOOD) as api:
        monkeypatch.setenv("HTTP_PROXY", api.host)
        for name in ("NO_PROXY", "no_proxy", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        server = type(api.client())("http://teacher.invalid/v1", "m", timeout=5)
        assert server.ask("/chat/completions", REQUEST) == GOOD
        assert api.requests[0].path == "http://teacher.invalid/v1/chat/completions"


def test_no_key_sends_no_authorization(monkeypatch):
    for name in ("RBFAST_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with answering(GOOD) as api:
        ask(api)
        assert "Authorization" not in api.requests[0].headers


def test_rbfast_key_takes_precedence(monkeypatch):
    for name in ("RBFAST_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, f"of {name}")
    with answering(GOOD) as api:
        ask(api)
        assert api.requests[0].headers["Authorization"] == "Bearer of RBFAST_API_KEY"


# -------------------------------------------------------------------------------------------------------------- streams


def piece(text, reason=None, **fields):
    return {"choices": [{"text": text, "finish_reason": reason}], **fields}


def test_stream_with_a_finish_reason_needs_no_done():
    with answering(events(piece("So.</think>"), piece("4", "stop"), done=False)) as api:
        solution = write(api.client(), "Q", make_guide(budget=400))
        assert solution.answer == "4" and len(api.requests) == 1


def test_null_error_in_a_chunk_is_ignored():
    with answering(events(piece("So.</think>4", "stop", error=None))) as api:
        assert write(api.client(), "Q", make_guide(budget=400)).answer == "4"


def test_error_in_a_chunk_is_reported(monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", "sk-secret")
    with answering(events(piece("So."), {"error": {"message": "out of memory, sk-secret", "code": 500}})) as api:
        with pytest.raises(ServerError, match=r"broke off: .*out of memory") as caught:
            write(api.client(), "Q", make_guide(budget=400))
        assert caught.value.partial.text == "So." and "sk-secret" not in str(caught.value)


def test_error_instead_of_a_stream_is_reported():
    error = {"error": {"message": "no such model"}}
    with answering(error) as api, pytest.raises(ServerError, match="no such model"):
        write(api.client(), "Q", make_guide(budget=400))


@pytest.mark.parametrize("chunk", ["data: {broken\n\n", "data: [1]\n\n"])
def test_chunk_that_is_no_object_ends_the_stream(chunk):
    text = f"data: {json.dumps(piece('So.'))}\n\n{chunk}"
    with answering(Answer(text, headers={"Content-Type": "text/event-stream"})) as api:
        chunks = api.client().stream("/completions", {"prompt": "Q"})
        assert next(chunks) == piece("So.")
        with pytest.raises(IncompleteReply, match="expected JSON objects"):
            next(chunks)


def test_guided_chat_reads_thinking_in_any_field():
    with answering(chat_reply({"content": "4", "reasoning": "Two and two."})) as api:
        solution = chat(api.client(), "2 + 2?", make_guide(budget=400))
    assert (solution.to_dict()["thinking"], solution.answer, solution.tokens) == ("Two and two.", "4", 5)


@pytest.mark.parametrize(
    "thinking, reply",
    [(r"Is it \boxed{5}? No.", "The answer is **7**."), ("<answer>5</answer>? No.", r"\boxed{7}"), ("So 1", "7")],
)
def test_guided_chat_ignores_answers_in_the_thinking(thinking, reply):
    with answering(chat_reply({"content": reply, "reasoning_content": thinking})) as api:
        assert chat(api.client(), "3 + 4?", make_guide(budget=400)).key == "7"


@pytest.mark.parametrize("reason", ["abort", "content_filter", "insufficient_system_resource"])
def test_text_stopped_by_the_server_is_no_answer(reason):
    with answering(events(piece("So.</think>1"), piece("", reason))) as api:
        with pytest.raises(ServerError, match=f"finish_reason '{reason}'") as caught:
            write(api.client(), "Q", make_guide(budget=400))
        assert caught.value.partial.answer == "1" and caught.value.partial.truncated
    with answering(chat_reply("The answer is 1", reason)) as api:
        with pytest.raises(ServerError, match=f"finish_reason '{reason}'") as caught:
            chat(api.client(), "Q", make_guide(budget=400))
        assert caught.value.partial.text == "The answer is 1"
