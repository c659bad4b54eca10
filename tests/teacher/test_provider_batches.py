"""Questions sent through Anthropic's and Gemini's batches: the replies of single requests, each paid for once."""

import json
import logging
import re
import time
from functools import partial

import pytest
from batch_api import assert_the_budget_holds
from fake_api import Answer, answering
from provider_batch_apis import KEY, THOUGHT, Claude, Gemini
from questions import QUESTIONS, solve

from rbfast.cli.main import main
from rbfast.teacher.client import ServerError
from rbfast.teacher.provider_batches import AnthropicBatches, GeminiBatches
from rbfast.teacher.providers import Provider
from rbfast.teacher.solutions import teach

pytestmark = pytest.mark.slow  # importing litellm takes seconds
litellm = pytest.importorskip("litellm", reason="needs the extra teachers")

NAMES = {Claude: "anthropic", Gemini: "gemini"}
BACKENDS = {Claude: AnthropicBatches, Gemini: GeminiBatches}
EACH = pytest.mark.parametrize("kind", [Claude, Gemini])
MOMENTS = [(kind, moment) for kind in NAMES for moment in kind.moments]


@pytest.fixture(autouse=True)
def keys_and_pauses(monkeypatch):
    """The requested pauses, which take no time."""
    monkeypatch.delenv("RBFAST_API_KEY", raising=False)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def solved(question, params):
    return solve(question)


def ask(api, folder, questions=QUESTIONS[:4], batch=True, options=None, **wanted):
    kind = type(api.answers[0])
    settings = {"timeout": 5, "seed": None, "temperature": 1.0, "retries": 3} | (options or {})
    teacher = Provider(NAMES[kind], kind.model, api.host + kind.url, **settings)
    return teach(teacher, questions, folder, batch=batch, **wanted)


def created(api):
    creation = type(api.answers[0]).creation
    return [request for request in api.requests if (request.method, request.path) == creation]


def replace_first_answer(api, moment, wrong):
    """Replace the first answer to a request that matches `moment`; the provider still handles the request."""
    answer = api.answer

    def answering_wrongly(request):
        reply = answer(request)
        if re.match(moment, f"{request.method} {request.path}"):
            api.answer = answer
            return wrong
        return reply

    api.answer = answering_wrongly


@EACH
def test_batch_stores_the_records_of_single_requests(tmp_path, kind):
    extra, messages = {"reasoning_effort": "low"}, []
    with answering(kind(solved)) as api:
        progress = lambda done, wanted, words: messages.append(words)  # noqa: E731
        taught = ask(api, tmp_path / "batch", extra=extra, progress=progress)
        assert len(created(api)) == 1
        single = ask(api, tmp_path / "single", batch=False, extra=extra)
    assert taught.traces == single.traces and taught.traces[0].reasoning == THOUGHT
    assert (taught.read, taught.written) == (single.read, single.written) == (12, 20)
    batch, lone = (sorted((tmp_path / name / "replies.jsonl").read_text().splitlines()) for name in ("batch", "single"))
    assert batch == lone
    assert re.match(r"batch \S+: \S*(in_progress|RUNNING), 0 of 4, 0 tokens read", messages[0])
    assert not (tmp_path / "batch" / "batch.json").exists()


@EACH
def test_batched_request_equals_a_single_one(tmp_path, kind):
    sent = []

    def recording(question, params):
        sent.append(params)
        return solve(question)

    with answering(kind(recording)) as api:
        ask(api, tmp_path / "batch", QUESTIONS[:1], extra={"reasoning_effort": "low"})
        ask(api, tmp_path / "single", QUESTIONS[:1], batch=False, extra={"reasoning_effort": "low"})
    assert sent[0] == sent[-1] and "think" in str(sent[0])


@EACH
def test_only_new_questions_are_sent_in_another_batch(tmp_path, kind):
    with answering(kind(solved)) as api:
        ask(api, tmp_path)
        ask(api, tmp_path)
        assert len(created(api)) == 1
        assert len(ask(api, tmp_path, QUESTIONS[:6]).traces) == 6 and len(created(api)) == 2


@pytest.mark.parametrize(("kind", "moment"), MOMENTS)
def test_killed_call_resumes_its_batch(tmp_path, kind, moment):
    """The provider has handled the request; the call dies before it reads the reply."""
    api_of = kind(solved)
    with answering(api_of) as api:
        replace_first_answer(api, moment, Answer("killed", 499))
        with pytest.raises(ServerError, match="returned 499"):
            ask(api, tmp_path)
        assert len(ask(api, tmp_path).traces) == 4
        assert len(created(api)) == len(api_of.batches) == 1


@EACH
def test_batch_that_was_never_created_is_forgotten(tmp_path, kind):
    with answering(kind(solved)) as api:
        answer = api.answer
        api.answer = lambda request: Answer("killed", 499) if request.path == kind.creation[1] else answer(request)
        with pytest.raises(ServerError, match="returned 499"):
            ask(api, tmp_path)
        api.answer = answer
        assert json.loads((tmp_path / "batch.json").read_text())["batch"] == ""
        assert len(ask(api, tmp_path, QUESTIONS[4:6]).traces) == 2 and len(created(api)) == 1


@EACH
def test_unconfirmed_batch_is_not_created_again(tmp_path, kind):
    api_of = kind(solved)
    with answering(api_of) as api:
        replace_first_answer(api, kind.creation[0] + " " + kind.creation[1] + "$", Answer("lost", 503))
        assert len(ask(api, tmp_path).traces) == 4
        assert len(created(api)) == len(api_of.batches) == 1


@pytest.mark.parametrize(("kind", "moment"), MOMENTS)
def test_busy_provider_is_retried_after_the_requested_pause(tmp_path, kind, moment, keys_and_pauses):
    with answering(kind(solved)) as api:
        replace_first_answer(api, moment, Answer("slow down", 503, {"Retry-After": "7"}))
        assert len(ask(api, tmp_path).traces) == 4 and len(created(api)) == 1
    assert 7.0 in keys_and_pauses


@EACH
def test_batch_refused_with_429_is_created_without_a_search(tmp_path, kind):
    """429 means that nothing was created: a search could wait for the end of another call's batch."""
    api_of = kind(solved)
    with answering(api_of) as api:
        answer, refusals = api.answer, [Answer("slow down", 429)]

        def busy(request):
            is_creation = (request.method, request.path) == kind.creation
            return refusals.pop() if is_creation and refusals else answer(request)

        api.answer = busy
        assert len(ask(api, tmp_path).traces) == 4 and len(api_of.batches) == 1
        lists = [request for request in api.requests if re.search(r"batches\?(limit=1000|pageSize)", request.path)]
        assert lists == []


@EACH
def test_budget_holds_across_batches(tmp_path, kind):
    with answering(kind(solved)) as api:
        assert_the_budget_holds(partial(ask, api), partial(created, api), tmp_path)


@pytest.mark.parametrize(("name", "value", "batches"), [("most_requests", 3, 2), ("most_bytes", 1000, 4)])
@EACH
def test_batch_keeps_to_the_providers_limits(tmp_path, monkeypatch, kind, name, value, batches):
    monkeypatch.setattr(BACKENDS[kind], name, value)
    with answering(kind(solved)) as api:
        assert len(ask(api, tmp_path).traces) == 4 and len(created(api)) == batches


@EACH
def test_refused_parameter_is_dropped_in_another_batch(tmp_path, kind):
    def reply(question, params):
        refused = Answer("`temperature` may only be set to 1 when thinking is enabled.", 400)
        return refused if "temperature" in params else solve(question)

    with answering(kind(reply)) as api, pytest.warns(UserWarning, match="refuses temperature"):
        assert len(ask(api, tmp_path).traces) == 4 and len(created(api)) == 2


def test_parameter_that_litellm_refuses_never_reaches_a_batch(tmp_path):
    with answering(Claude(solved)) as api, pytest.warns(UserWarning, match="refuses seed"):
        assert len(ask(api, tmp_path, options={"seed": 3}).traces) == 4 and len(created(api)) == 1


@EACH
def test_failed_request_stays_open_with_its_reason(tmp_path, kind):
    def reply(question, params):
        return Answer("prompt is too long", 400) if " 2 " in question else solve(question)

    with answering(kind(reply)) as api:
        taught = ask(api, tmp_path)
        assert (len(taught.traces), taught.open, len(created(api))) == (3, 1, 1)
        assert "returned 400 in a batch" in taught.reason and "prompt is too long" in taught.reason


@pytest.mark.parametrize("end", ["expired", "canceled"])
def test_unprocessed_request_stays_open_for_the_next_call(tmp_path, end):
    api_of = Claude(solved)
    api_of.ends = {QUESTIONS[2].text: end}
    with answering(api_of) as api:
        taught = ask(api, tmp_path)
        assert (len(taught.traces), taught.open, len(created(api))) == (3, 1, 1)
        assert f"the request has the state {end}" in taught.reason
        api_of.ends = {}
        assert len(ask(api, tmp_path).traces) == 4
        assert [len(request.body["requests"]) for request in created(api)] == [4, 1]


@pytest.mark.parametrize("state", ["FAILED", "EXPIRED", "CANCELLED"])
def test_failed_batch_leaves_all_questions_open(tmp_path, state):
    api_of = Gemini(solved)
    api_of.state, api_of.error = f"BATCH_STATE_{state}", "the model is gone"
    with answering(api_of) as api:
        taught = ask(api, tmp_path)
        assert (taught.open, len(created(api))) == (4, 1) and not (tmp_path / "batch.json").exists()
    assert f"BATCH_STATE_{state}: the model is gone" in taught.reason


def test_missing_result_is_reported_and_not_retried_at_once(tmp_path):
    api_of = Claude(solved)
    results = api_of.results
    api_of.results = lambda name: list(results(name))[1:]
    with answering(api_of) as api:
        taught = ask(api, tmp_path)
        assert (len(taught.traces), taught.open, len(created(api))) == (3, 1, 1)
        assert "msgbatch_0" in taught.reason and "has no reply to this request" in taught.reason


def test_another_calls_batch_of_the_same_size_is_not_taken(tmp_path):
    """The call dies before its batch is created. Other calls create theirs: one before, two after."""
    api_of = Claude(solved)
    with answering(api_of) as api:
        ask(api, tmp_path / "before")
        answer = api.answer
        api.answer = lambda request: Answer("killed", 499) if request.path == Claude.creation[1] else answer(request)
        with pytest.raises(ServerError, match="returned 499"):
            ask(api, tmp_path / "ours", QUESTIONS[4:8])
        api.answer = answer
        ticket = json.loads((tmp_path / "ours" / "batch.json").read_text())["ticket"]
        assert (ticket["after"], ticket["requests"]) == ("msgbatch_0", 4)
        ask(api, tmp_path / "alike", QUESTIONS[8:12])
        ask(api, tmp_path / "shorter", QUESTIONS[:2])
        first = len(api.requests)
        taught = ask(api, tmp_path / "ours", QUESTIONS[4:8])
        assert [trace.problem for trace in taught.traces] == [question.text for question in QUESTIONS[4:8]]
        assert len((tmp_path / "ours" / "replies.jsonl").read_text().splitlines()) == 4 and taught.read == 12
        paths = [request.path for request in api.requests[first:]]
        assert "/v1/messages/batches/msgbatch_1/results" in paths and len(api_of.batches) == 4
        assert not any("msgbatch_0" in path or "msgbatch_2" in path for path in paths)


@EACH
def test_key_is_in_no_file_log_or_message(tmp_path, kind, caplog, capfd):
    caplog.set_level(logging.DEBUG)

    def reply(question, params):
        return Answer(f"not with {KEY}", 400) if " 2 " in question else solve(question)

    with answering(kind(reply)) as api:
        taught = ask(api, tmp_path)
        replace_first_answer(api, kind.moments[0], Answer(f"no such key: {KEY}", 403))
        with pytest.raises(ServerError, match="returned 403") as caught:
            ask(api, tmp_path)
    printed = capfd.readouterr()
    files = [path.read_text() for path in tmp_path.iterdir()]
    assert "not with ***" in taught.reason and len(files) >= 4
    for text in (taught.reason, str(caught.value), caplog.text, printed.out, printed.err, *files):
        assert KEY not in text


@pytest.mark.parametrize("place", ["https://127.0.0.1:{port}/", "http://localhost:{port}/", "http://127.0.0.1:1/"])
def test_key_is_sent_to_no_other_host(tmp_path, place):
    with answering(Gemini(solved)) as api:
        other = place.format(port=api.host.rpartition(":")[2])
        replace_first_answer(api, "POST /upload/", Answer({}, headers={"X-Goog-Upload-Url": other}))
        with pytest.raises(ServerError, match=r"/upload/v1beta/files sent an upload URL on another host, http"):
            ask(api, tmp_path)
        assert not any(request.path == "/" for request in api.requests)
        assert len(ask(api, tmp_path).traces) == 4


def test_wrong_key_fails_before_a_batch_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "another-key-than-theirs")
    with answering(Claude(solved)) as api, pytest.raises(ServerError, match=r"returned 401: .*who is it"):
        ask(api, tmp_path)
    assert not (tmp_path / "batch.json").exists()


def test_provider_without_batches_is_refused_with_a_hint(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"problem": "2 + 2?"}\n')
    command = ["teach", "m", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--provider", "mistral"]
    assert main([*command, "--batch"]) == 2
    error = capsys.readouterr().err
    assert "no batch API for the provider 'mistral'" in error and "anthropic or gemini, or a server" in error


@EACH
def test_command_line_sends_batches(tmp_path, capsys, kind):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"problem": q.text}) + "\n" for q in QUESTIONS[:3]))
    with answering(kind(solved)) as api:
        command = ["teach", kind.model, str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--batch", "--json"]
        assert main([*command, "--provider", NAMES[kind], "--server", api.host + kind.url]) == 0
        assert len(created(api)) == 1
    assert json.loads(capsys.readouterr().out)["traces"] == 3
