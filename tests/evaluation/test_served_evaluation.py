"""Evaluations over a server, and under a guide from the command line."""

import io
import json
import sys
import threading
import time

import pytest
from tiny import tiny_tokenizer

from rbfast.cli.main import main
from rbfast.evaluation.evaluate import evaluate
from rbfast.grading.grade import Problem
from rbfast.inference.guide import Guide, Limits, Phrases
from rbfast.teacher.client import ServerError

pytestmark = pytest.mark.usefixtures("no_pauses")

PROBLEMS = [Problem("file", f"{a}+4?", str(a + 4), {}) for a in range(3)]
FOUR = "So |<answer>|4|</answer>"


@pytest.fixture
def rows(tmp_path):
    """A file of the problems."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": p.question, "answer": p.answer}) + "\n" for p in PROBLEMS))
    return path


def test_served_model_is_evaluated_and_graded(start):
    state, server = start(FOUR)
    results = evaluate(server, tiny_tokenizer(), PROBLEMS, max_new_tokens=50)
    assert [result.problem for result in results] == PROBLEMS
    assert [(result.correct, result.completion.text) for result in results] == [
        (correct, "So <answer>4</answer>") for correct in (True, False, False)
    ]
    assert {(request["max_tokens"], request["temperature"]) for request in state.requests} == {(50, 0.0)}


def test_interrupted_evaluation_of_a_server_resumes(start, tmp_path):
    state, server = start(FOUR, retries=0)
    keep, options = tmp_path / "results.jsonl", {"samples": 2, "temperature": 0.5, "batch_size": 1}
    state.faults = [None] * 3 + [500] + [None] * 2
    with pytest.raises(ServerError, match=r"problem '1\+4\?': .* 500"):
        evaluate(server, tiny_tokenizer(), PROBLEMS, keep=keep, **options)
    assert len(keep.read_text().splitlines()) == 4  # the samples of the other two problems
    seeds_of_second = lambda: {request["seed"] for request in state.requests if request["prompt"].startswith("1+4?")}  # noqa: E731
    seeds = seeds_of_second()
    state.requests.clear()
    results = evaluate(server, tiny_tokenizer(), PROBLEMS, keep=keep, **options)
    assert len(results) == 6 and len(state.requests) == 2
    assert len(seeds) == 2 and seeds_of_second() == seeds


class Chats:
    """A server whose chats end once they are released, and stderr, where the command says that it waits for them."""

    def __init__(self, start, monkeypatch):
        self.state, self.server = start(FOUR)
        self.asked, self.released = threading.Semaphore(0), threading.Event()
        self.told, self.when_told = io.StringIO(), lambda: None
        script = self.state.script

        def chat(body):
            self.asked.release()
            assert self.released.wait(10)
            return script(body)

        def tell(text):
            self.told.write(text)
            self.when_told()

        self.state.script = chat
        monkeypatch.setattr(sys.stderr, "write", tell)

    def press_after(self, requests, ctrl_c):
        """Press Ctrl-C once so many requests have come."""

        def press():
            for _ in range(requests):
                self.asked.acquire()
            ctrl_c()

        threading.Thread(target=press, daemon=True).start()


@pytest.fixture
def chats(start, monkeypatch):
    return Chats(start, monkeypatch)


def test_ctrl_c_keeps_the_replies_under_way(chats, tmp_path, ctrl_c):
    keep, problems = tmp_path / "results.jsonl", [Problem("file", f"{a}+4?", "4", {}) for a in range(9)]
    chats.press_after(3, ctrl_c)
    chats.when_told = chats.released.set
    with pytest.raises(KeyboardInterrupt):
        evaluate(chats.server, None, problems, keep=keep, batch_size=3)
    assert chats.told.getvalue() == "waiting for pending replies: 3; press Ctrl-C again to drop them\n"
    assert len(keep.read_text().splitlines()) == len(chats.state.requests) == 3
    assert len(evaluate(chats.server, None, problems, keep=keep)) == len(chats.state.requests) == 9


def test_second_ctrl_c_stops_at_once(chats, tmp_path, ctrl_c):
    keep, pressed = tmp_path / "results.jsonl", []

    def press_again():
        if not pressed:
            pressed.append(time.monotonic())
            ctrl_c()

    chats.press_after(3, ctrl_c)
    chats.when_told = press_again
    with pytest.raises(KeyboardInterrupt):
        evaluate(chats.server, None, PROBLEMS, keep=keep)
    assert not chats.released.is_set() and time.monotonic() - pressed[0] < 5
    chats.released.set()
    assert len(evaluate(chats.server, None, PROBLEMS, keep=keep)) == 3


def test_ctrl_c_abandons_requests_that_wait_for_a_retry(start, tmp_path, monkeypatch, ctrl_c):
    state, server = start(FOUR)
    state.faults, slept, pressed = [None, 429], threading.Event(), []

    def sleep(seconds):  # of this test's first retry alone: threads that were given up sleep on
        if server.retried.is_waiting(threading.current_thread()) and not pressed:
            pressed.append(seconds)
            ctrl_c()
            slept.wait(10)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        evaluate(server, None, PROBLEMS, keep=tmp_path / "results.jsonl", batch_size=1)
    slept.set()
    assert len(state.requests) == 2 and len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_refused_problem_does_not_stop_the_others(start, tmp_path):
    state, server = start(FOUR)
    keep, problems = tmp_path / "results.jsonl", [Problem("file", f"{a}+4?", "4", {}) for a in range(6)]
    state.faults = [400, None, None, 400]
    with pytest.raises(ServerError, match=r"problem '0\+4\?': .* 400.* \(and 1 more failed\)"):
        evaluate(server, tiny_tokenizer(), problems, keep=keep, batch_size=1)
    assert len(keep.read_text().splitlines()) == 4
    state.requests.clear()
    assert all(result.correct for result in evaluate(server, tiny_tokenizer(), problems, keep=keep))
    assert {request["prompt"][0] for request in state.requests} == {"0", "3"}


def test_many_refused_problems_do_not_stop_the_others(start, tmp_path):
    """Refusals come before anything is solved."""
    state, server = start(FOUR)
    keep, problems = tmp_path / "results.jsonl", [Problem("file", f"{a}+4?", "4", {}) for a in range(40)]
    state.faults = [422] * 20
    with pytest.raises(ServerError, match=r"\(and 19 more failed\)"):
        evaluate(server, tiny_tokenizer(), problems, keep=keep, batch_size=4)
    assert len(keep.read_text().splitlines()) == 20


def test_chat_only_server_cannot_be_guided(start):
    state, server = start(FOUR)
    state.completions = False
    guide = Guide(Limits(150, reserve=90), Phrases("<answer>", "</answer>"))
    with pytest.warns(UserWarning, match="only chats: it gets the budget, but no guidance"):
        evaluate(server, tiny_tokenizer(), PROBLEMS, guide=guide)


@pytest.mark.parametrize(("solved", "requests"), [(0, 8), (1, 9)], ids=["none solved", "one solved"])
def test_server_that_refuses_everything_ends_the_evaluation(start, solved, requests):
    state, server = start(FOUR)
    state.faults = [None] * solved + [401] * 40
    problems = [Problem("file", f"{a}+4?", "4", {}) for a in range(40)]
    with pytest.raises(ServerError, match="returned 401"):
        evaluate(server, tiny_tokenizer(), problems, batch_size=1)
    assert requests <= len(state.requests) < requests + 8  # those sent before the failures were seen


def test_served_model_is_evaluated_under_a_guide(start, tmp_path):
    _, server = start("|".join(["word "] * 200))
    guide, keep = Guide(Limits(150, reserve=90), Phrases("<answer>", "</answer>")), tmp_path / "results.jsonl"
    results = evaluate(server, tiny_tokenizer(), PROBLEMS, guide=guide, keep=keep)
    assert {event.kind for event in results[0].events} >= {"wrap up"}
    assert all(result.completion.tokens <= 150 for result in results)
    assert evaluate(server, tiny_tokenizer(), PROBLEMS, guide=guide, keep=keep) == results


def test_server_applies_its_template_without_a_tokenizer(start):
    state, server = start(FOUR)
    assert [result.correct for result in evaluate(server, None, PROBLEMS)] == [True, False, False]
    assert all("messages" in request for request in state.requests)


def test_local_model_needs_its_tokenizer():
    with pytest.raises(TypeError, match="a local model needs its tokenizer, got None"):
        evaluate(object(), None, PROBLEMS)


def test_command_evaluates_a_server_under_a_guide(start, rows, tmp_path, capsys):
    state, server = start("|".join(["word "] * 500))
    out = tmp_path / "results.jsonl"
    command = ["eval", "m", "--server", server.url, "--task", str(rows), "--budget", "400", "--minimum", "9", "--json"]
    assert main([*command, "-o", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)[str(rows)]["n"] == 3
    records = list(map(json.loads, out.read_text().splitlines()))
    assert {record["decoding"]["guide"]["limits"]["budget"] for record in records} == {400}
    assert {record["decoding"]["label"] for record in records} == {"m on a server"}
    assert all(record["events"] for record in records) and all("prompt" in request for request in state.requests)


def test_refused_problem_does_not_stop_the_other_tasks(start, rows, tmp_path, capsys):
    state, server = start(FOUR)
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps({"problem": "9+4?", "answer": "13"}) + "\n")
    state.faults = [400]
    tasks = ["--task", str(rows), "--task", str(others)]
    assert main(["eval", "m", "--server", server.url, *tasks, "--batch-size", "1", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)[str(others)]["n"] == 1 and str(rows) not in json.loads(printed.out)
    assert "returned 400" in printed.err


def test_server_that_refuses_everything_ends_the_other_tasks_too(start, tmp_path, capsys):
    """Even if a refusal of one problem came first."""
    state, server = start(FOUR)
    many, others = tmp_path / "many.jsonl", tmp_path / "others.jsonl"
    many.write_text("".join(json.dumps({"problem": f"{a}+4?", "answer": "4"}) + "\n" for a in range(20)))
    others.write_text(json.dumps({"problem": "never asked", "answer": "13"}) + "\n")
    state.faults = [400] + [401] * 99
    tasks = ["--task", str(many), "--task", str(others)]
    assert main(["eval", "m", "--server", server.url, *tasks, "--batch-size", "1", "--json"]) == 1
    assert capsys.readouterr().out == "" and "never asked" not in str(state.requests)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--minimum", "5"], "--minimum is for a guide, which needs a --budget in tokens"),
        (["--verify-above", "0"], "--verify-above is for a guide"),
        (["--budget", "500", "--max-new-tokens", "400"], "--budget limits the whole completion: leave out --max-new"),
        (["--server", "http://127.0.0.1:9/v1", "--adapter", "a"], "--adapter is for a local model"),
        (["--server", "http://127.0.0.1:9/v1", "--load-in", "4bit"], "--load-in is for a local model: a server has"),
        (["--tokenizer", "t"], "--tokenizer is for --server"),
        (["--server", "http://127.0.0.1:9/v1", "--timeout", "0"], "timeout must be finite and above 0 seconds"),
    ],
)
def test_options_that_cannot_be_used_are_refused(rows, capsys, options, complaint):
    assert main(["eval", "m", "--task", str(rows), *options]) == 2
    assert complaint in capsys.readouterr().err
