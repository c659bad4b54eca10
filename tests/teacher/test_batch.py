"""Questions sent through a batch API: each reply is paid for once, despite kills, refusals and expiry."""

import json
import os
import threading
import time
import tracemalloc
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from batch_api import Batches, assert_the_budget_holds
from fake_api import Answer, answering, chat_reply
from questions import QUESTIONS, solve

from rbfast.cli.main import main
from rbfast.teacher.batch import batches_of
from rbfast.teacher.batch_api import BatchStatus
from rbfast.teacher.client import Server, ServerError
from rbfast.teacher.solutions import teach


def solved(body):
    return chat_reply(solve(body["messages"][-1]["content"]))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def in_batches(api, folder, questions=QUESTIONS[:4], **options):
    return teach(api.client(), questions, folder, batch=True, **options)


def created(api):
    return [request for request in api.requests if (request.method, request.path) == ("POST", "/v1/batches")]


def test_batch_gives_the_same_traces_as_single_requests(tmp_path):
    progress_calls = []
    with answering(Batches(solved)) as api:
        progress = lambda done, wanted, words: progress_calls.append((done, wanted, words))  # noqa: E731
        taught = in_batches(api, tmp_path / "batch", progress=progress)
        assert len(created(api)) == 1 and created(api)[0].body["completion_window"] == "24h"
    with answering(lambda request: solved(request.body)) as api:
        assert taught.traces == teach(api.client(), QUESTIONS[:4], tmp_path / "single").traces
    assert progress_calls[0] == (0, 4, "batch batch-0: in_progress, 0 tokens read, 0 written") and progress_calls[-1][
        :2
    ] == (4, 4)
    assert not (tmp_path / "batch" / "batch.json").exists()


def test_only_new_questions_are_sent_in_another_batch(tmp_path):
    with answering(Batches(solved)) as api:
        in_batches(api, tmp_path)
        in_batches(api, tmp_path)
        assert len(created(api)) == 1
        assert len(in_batches(api, tmp_path, QUESTIONS[:6]).traces) == 6
        files = [request.data for request in api.requests if request.path == "/v1/files"]
        assert [data.count(b'"custom_id"') for data in files] == [4, 2]


def test_unconfirmed_batch_is_not_created_again(tmp_path):
    batches = Batches(solved)
    with answering(batches) as api:
        answer, faults = api.answer, [503, 500]

        def losing(request):
            reply = answer(request)
            is_creation = (request.method, request.path) == ("POST", "/v1/batches")
            return Answer("lost", faults.pop()) if is_creation and faults else reply

        api.answer = losing
        assert len(in_batches(api, tmp_path).traces) == 4
        assert len(created(api)) == len(batches.batches) == 1


def failing_polls(api, status, times):
    """Make the polls after the first fail, up to `times` times."""
    answer, polls = api.answer, []

    def failing(request):
        if request.path.startswith("/v1/batches/"):
            polls.append(request)
            if 1 < len(polls) <= times + 1:
                return Answer("not now", status)
        return answer(request)

    api.answer = failing


@pytest.mark.parametrize("status", [500, 502, 529])
def test_wait_for_a_batch_survives_a_short_outage(tmp_path, status):
    messages = []
    with answering(Batches(solved)) as api:
        failing_polls(api, status, 40)
        taught = in_batches(api, tmp_path, progress=lambda done, wanted, words: messages.append(words))
        assert len(taught.traces) == 4 and len(created(api)) == 1
    assert any("batch-0: the teacher is busy or unreachable" in words for words in messages)


@pytest.mark.parametrize(("status", "least", "most"), [(502, 600, 1200), (404, 0, 60)])
def test_wait_for_a_batch_ends_after_ten_minutes_of_outage(tmp_path, monkeypatch, status, least, most):
    now = [0.0]
    sleep = lambda seconds: now.__setitem__(0, now[0] + seconds)  # noqa: E731
    monkeypatch.setattr("rbfast.teacher.batch_api.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with answering(Batches(solved)) as api:
        failing_polls(api, status, 10**6)
        with pytest.raises(ServerError, match=f"returned {status}"):
            in_batches(api, tmp_path)
    assert least <= now[0] < most and (tmp_path / "batch.json").exists()


def test_replies_of_a_batch_are_synced_together_before_it_is_forgotten(tmp_path, monkeypatch):
    replies, synced, fsync = tmp_path / "replies.jsonl", [], os.fsync

    def recording(file):
        if replies.exists() and os.path.samestat(os.fstat(file), replies.stat()):
            synced.append((replies.read_bytes(), (tmp_path / "batch.json").exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", recording)
    with answering(Batches(solved)) as api:
        in_batches(api, tmp_path, QUESTIONS[:6])
    assert synced == [(replies.read_bytes(), True)] and replies.read_bytes().count(b"\n") == 6


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["POST /v1/files", "POST /v1/batches", "GET /v1/batches/", "GET /v1/files/"])
def test_killed_call_resumes_its_batch(tmp_path, monkeypatch, moment):
    """The server has handled the request; the call dies before it reads the reply."""
    batches = Batches(solved)
    with answering(batches) as api:
        answer = api.answer

        def dying(request):
            sent_reply = answer(request)
            if f"{request.method} {request.path}".startswith(moment):
                api.answer = answer
                return Answer("killed", 499)
            return sent_reply

        api.answer = dying
        with pytest.raises(ServerError, match="returned 499"):
            in_batches(api, tmp_path)
        assert len(in_batches(api, tmp_path).traces) == 4
        assert len(created(api)) == 1 and len(batches.batches) == 1


def test_call_killed_while_writing_replies_resumes(tmp_path, monkeypatch):
    from rbfast.teacher.reply_store import ReplyStore

    add = ReplyStore.add

    def dying(store, *args, **options):
        if len(store) == 2:
            raise Killed
        add(store, *args, **options)

    with answering(Batches(solved)) as api:
        with monkeypatch.context() as patch:
            patch.setattr(ReplyStore, "add", dying)
            with pytest.raises(Killed):
                in_batches(api, tmp_path)
        assert json.loads((tmp_path / "batch.json").read_text())["batch"] == "batch-0"
        assert len(in_batches(api, tmp_path).traces) == 4 and len(created(api)) == 1
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 4


def test_replies_to_an_earlier_calls_questions_are_kept(tmp_path):
    with answering(Batches(solved)) as api:
        (tmp_path / "batch.json").write_text("{}")
        with pytest.raises(ValueError, match="url is missing"):
            in_batches(api, tmp_path)
        (tmp_path / "batch.json").unlink()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(time, "sleep", raising(Killed))
            in_batches(api, tmp_path, QUESTIONS[:3])
        with pytest.raises(ValueError, match="a batch is under way"):
            teach(api.client(), QUESTIONS[:3], tmp_path)
        assert len(in_batches(api, tmp_path, QUESTIONS[3:5]).traces) == 2
        assert len(in_batches(api, tmp_path, QUESTIONS[:5]).traces) == 5 and len(created(api)) == 2


def test_complete_replies_are_kept_when_the_token_limit_changes(tmp_path):
    def replies(body):
        text = solve(body["messages"][-1]["content"])
        return chat_reply(text, "length" if body["max_tokens"] == 100 and " 2 " in str(body) else "stop")

    with answering(Batches(replies)) as api:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(time, "sleep", raising(Killed))
            in_batches(api, tmp_path, max_tokens=100)
        with pytest.warns(UserWarning, match="cut at the token limit"):
            assert len(in_batches(api, tmp_path, max_tokens=200).traces) == 4
        files = [request.data for request in api.requests if request.path == "/v1/files"]
        assert [data.count(b'"custom_id"') for data in files] == [4, 1], "only the truncated reply is requested again"


def raising(kind):
    def fail(*args):
        raise kind

    return fail


def test_budget_holds_across_batches(tmp_path):
    with answering(Batches(solved)) as api:
        assert_the_budget_holds(partial(in_batches, api), partial(created, api), tmp_path)


def test_refused_parameter_is_dropped_in_another_batch(tmp_path):
    def reply(body):
        if "temperature" in body:
            return Answer({"error": {"message": "Unsupported parameter: 'temperature'"}}, 400)
        return solved(body)

    with answering(Batches(reply)) as api, pytest.warns(UserWarning, match="refuses temperature"):
        assert len(in_batches(api, tmp_path).traces) == 4 and len(created(api)) == 2


def test_failed_request_stays_open_with_its_reason(tmp_path):
    def reply(body):
        return Answer({"error": {"message": "too long"}}, 400) if " 2 " in str(body) else solved(body)

    with answering(Batches(reply)) as api:
        taught = in_batches(api, tmp_path)
        assert (len(taught.traces), taught.open) == (3, 1) and "returned 400 in a batch" in taught.reason
        assert "too long" in taught.reason and len(created(api)) == 1


@pytest.mark.parametrize("status", ["failed", "expired", "cancelled"])
def test_failed_batch_leaves_unanswered_questions_open(tmp_path, status):
    batches = Batches(lambda body: solved(body) if " 1 " in str(body) else Answer({"code": "batch_expired"}, 410))
    batches.status, batches.errors = status, {"object": "list", "data": [{"message": "the model is gone"}]}
    with answering(batches) as api:
        taught = in_batches(api, tmp_path)
        assert len(taught.traces) == (0 if status == "failed" else 1) and taught.open == 4 - len(taught.traces)
        assert len(created(api)) == 1 and not (tmp_path / "batch.json").exists()
    if status == "failed":
        assert "status failed: the model is gone" in taught.reason


def test_server_without_batches_is_reported(tmp_path):
    absent = Answer({"error": {"message": "no such path"}}, 404)
    with answering(absent) as api, pytest.raises(ServerError, match=r"/files returned 404: .*no such path"):
        in_batches(api, tmp_path)


def test_results_that_break_off_are_downloaded_again(tmp_path):
    with answering(Batches(solved)) as api:
        answer, faults = api.answer, [Answer, Answer]

        def breaking(request):
            found = answer(request)
            if request.path.endswith("/content") and faults:
                faults.pop()
                return Answer(found.content[: len(found.content) // 2], headers={"Content-Length": len(found.content)})
            return found

        api.answer = breaking
        assert len(in_batches(api, tmp_path).traces) == 4 and not faults and len(created(api)) == 1


def test_results_are_not_held_in_memory():
    line, count = json.dumps({"custom_id": "x" * 2**20}).encode() + b"\n", 64

    class Results(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(count * len(line)))
            self.end_headers()
            for _ in range(count):
                self.wfile.write(line)

    with ThreadingHTTPServer(("127.0.0.1", 0), Results) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        api = batches_of(Server(f"http://127.0.0.1:{http.server_port}/v1", "m"))
        ended = BatchStatus("b", "completed", True, response=SimpleNamespace(output_file_id="f", error_file_id=None))
        tracemalloc.start()
        try:
            assert sum(1 for _ in api.results(ended)) == count
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            http.shutdown()
    assert peak < count * len(line) / 4


def test_batch_of_another_server_is_refused(tmp_path):
    (tmp_path / "batch.json").write_text(json.dumps({"url": "http://other/v1", "ticket": {"file": "f"}, "batch": "b"}))
    with (
        answering(Batches(solved)) as api,
        pytest.raises(ValueError, match="is a batch of http://other/v1"),
    ):
        in_batches(api, tmp_path)


def test_command_line_sends_batches(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"problem": q.text}) + "\n" for q in QUESTIONS[:3]))
    with answering(Batches(solved)) as api:
        command = ["teach", "m", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--batch", "--json"]
        assert main([*command, "--server", f"{api.host}/v1"]) == 0
    assert json.loads(capsys.readouterr().out)["traces"] == 3
