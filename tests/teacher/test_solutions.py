"""Solutions from a teacher on a loopback server: traces, budgets, faults, and no request paid for twice."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_api import Answer, answering, chat_reply
from openai_server import serving
from questions import QUESTIONS, solve
from tiny_models import llama
from tiny_tokenizers import byte_level

from rbfast.cli.main import main
from rbfast.curation.curate import curate
from rbfast.data.readers import read_traces
from rbfast.data.trace import TraceError
from rbfast.teacher.budget import Budget
from rbfast.teacher.client import Server, ServerError
from rbfast.teacher.jobs import Job
from rbfast.teacher.reply_store import ReplyStore
from rbfast.teacher.solutions import Prices, Question, read_questions, teach, trace_of


@pytest.fixture
def server():
    tokenizer = byte_level(solve(QUESTIONS[0].text))
    with serving(llama(vocab_size=len(tokenizer)), tokenizer, script=solve) as server:
        yield server


def sent_problems(server):
    return [body["messages"][-1]["content"] for body in server.requests]


def test_replies_become_traces_with_a_plan(server, tmp_path):
    taught = teach(server.client(), QUESTIONS, tmp_path)
    traces = read_traces(tmp_path / "traces.jsonl")
    assert traces == taught.traces and len(traces) == 12
    first = traces[0]
    assert (first.plan, first.reasoning, first.answer) == ("Add one to 0.", "Start at 0.\n0 + 1 = 1", "1")
    assert (first.teacher, first.domain, first.id, first.verified) == ("tiny", "sums", "q0/0", None)
    summary = json.loads((tmp_path / "teach.json").read_text())
    assert summary["traces"] == 12 and summary["open"] == summary["failed"] == 0 and summary["reason"] is None
    assert server.requests[0]["messages"][0]["role"] == "system"


def test_repeated_call_sends_nothing_twice(server, tmp_path):
    teach(server.client(), QUESTIONS[:5], tmp_path)
    first = (tmp_path / "traces.jsonl").read_bytes()
    taught = teach(server.client(), QUESTIONS[:5], tmp_path)
    assert len(server.requests) == 5 and (tmp_path / "traces.jsonl").read_bytes() == first
    more = teach(server.client(), QUESTIONS, tmp_path)
    assert sorted(sent_problems(server)) == sorted(question.text for question in QUESTIONS)
    assert more.written > taught.written


def test_equal_questions_are_sent_once(server, tmp_path):
    taught = teach(server.client(), [*QUESTIONS[:2], QUESTIONS[0]], tmp_path)
    assert len(server.requests) == 2 and [trace.id for trace in taught.traces] == ["q0/0", "q1/0", "q0/0"]


def test_samples_have_their_own_seeds(server, tmp_path):
    taught = teach(server.client(temperature=0.7, seed=5), QUESTIONS[:2], tmp_path, samples=3)
    assert len(taught.traces) == 6 and {body["seed"] for body in server.requests} == {5, 6, 7}
    assert {body["temperature"] for body in server.requests} == {0.7}


@pytest.mark.parametrize(("seed", "extra"), [(None, {}), (5, {"seed": 7})], ids=["no seed", "a seed for all"])
def test_samples_without_their_own_seeds_are_kept_apart(server, tmp_path, seed, extra):
    client, numbers = server.client(seed=seed), iter("1234")
    server.script = lambda problem: f"So it is {next(numbers)}.\n<answer>1</answer>"
    teach(client, QUESTIONS[:1], tmp_path, extra=extra)
    taught = teach(client, QUESTIONS[:1], tmp_path, samples=3, extra=extra)
    assert sorted(trace.reasoning for trace in taught.traces) == ["So it is 1.", "So it is 2.", "So it is 3."]
    assert teach(client, QUESTIONS[:1], tmp_path, samples=3, extra=extra).traces == taught.traces
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "changes", [{"model": "other"}, {"temperature": 0.7}, {"top_p": 0.9}, {"seed": 1}], ids=lambda s: next(iter(s))
)
def test_changed_model_or_sampling_sends_a_new_request(server, tmp_path, changes):
    teach(server.client(), QUESTIONS[:1], tmp_path)
    teach(replace(server.client(), **changes), QUESTIONS[:1], tmp_path)
    assert len(server.requests) == 2 and changes.items() <= server.requests[1].items()


def test_concurrency_is_used_and_not_exceeded(server, tmp_path):
    server.pause = 0.05
    teach(server.client(), QUESTIONS, tmp_path, concurrency=3)
    assert server.most_active == 3


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "kill", "hang"])
def test_faults_are_retried_without_a_trace(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.faults = [fault, None, fault]
    taught = teach(server.client(timeout=0.3), QUESTIONS[:4], tmp_path, concurrency=1)
    assert len(taught.traces) == 4 and len(server.requests) == 6
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 4


def test_wait_for_a_busy_server_is_reported(server, tmp_path, monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", "sk-secret")
    monkeypatch.setattr("rbfast.teacher.asking._LONGEST_SILENCE", 0.01)
    server.faults, server.refusal_body, server.retry_after = [429, 503], b"not yet, sk-secret", "7"
    calls, reported, pauses = [], threading.Event(), []
    pause = lambda seconds: pauses.append(seconds) or reported.wait(10)  # noqa: E731
    monkeypatch.setattr(time, "sleep", pause)

    def progress(done, wanted, words):
        calls.append((done, wanted, words))
        if "waiting" in words:
            reported.set()  # end the pause once the wait was reported

    teach(server.client(), QUESTIONS[:3], tmp_path, concurrency=1, progress=progress)
    assert reported.is_set() and pauses == [7.0, 7.0]
    assert any((done, wanted) == (0, 3) and words.endswith(", retries: 0 (1 waiting)") for done, wanted, words in calls)
    assert calls[-1][:2] == (3, 3) and calls[-1][2].endswith("written, retries: 2 (0 waiting)")
    assert not any("secret" in words for _, _, words in calls)


def test_ctrl_c_keeps_pending_replies_and_sends_no_more(server, tmp_path, capsys, ctrl_c):
    interrupted, released = threading.Event(), threading.Event()
    server.script = lambda problem: released.wait(10) and solve(problem)

    def progress(done, wanted, words):
        if interrupted.is_set():
            released.set()
        elif len(server.requests) == 3:
            interrupted.set()
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=3, progress=progress)
    assert capsys.readouterr().err == "waiting for pending replies: 3; press Ctrl-C again to drop them\n"
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == len(server.requests) == 3
    assert len(teach(server.client(), QUESTIONS, tmp_path).traces) == len(server.requests) == 12


def test_second_ctrl_c_stops_at_once_and_keeps_finished_replies(server, tmp_path, ctrl_c):
    released = threading.Event()
    server.script = lambda problem: solve(problem) if problem == QUESTIONS[0].text else released.wait(10) and ""
    pressed = []

    def progress(done, wanted, words):
        if done == 1:
            pressed.append(time.monotonic())
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=3, progress=progress)
    assert not released.is_set() and time.monotonic() - pressed[0] < 5
    released.set()
    [reply] = map(json.loads, (tmp_path / "replies.jsonl").read_text().splitlines())
    assert reply["problem"] == QUESTIONS[0].text


@pytest.mark.parametrize("failures", [1, 99])
def test_full_disk_stops_and_keeps_the_pending_replies_that_fit(server, tmp_path, monkeypatch, failures):
    add, tries, server.pause = ReplyStore.add, [], 0.3

    def full(store, record, *args):
        tries.append(record["key"])
        if len(tries) <= failures:
            raise OSError(28, "No space left on device", str(tmp_path / "replies.jsonl"))
        add(store, record, *args)

    monkeypatch.setattr(ReplyStore, "add", full)
    with pytest.raises(OSError, match=r"No space left on device: .*replies\.jsonl"):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=3)
    assert len(server.requests) == len(set(tries)) == 3, "all paid replies arrived, and no more were requested"
    if failures == 1:
        monkeypatch.undo()
        assert len(teach(server.client(), QUESTIONS[:3], tmp_path).traces) == 3 and len(server.requests) == 3


@pytest.mark.parametrize("fault", [503, 200])
def test_ctrl_c_ends_retries(server, tmp_path, monkeypatch, capsys, ctrl_c, fault):
    woken, client = threading.Event(), server.client()
    monkeypatch.setattr(time, "sleep", lambda seconds: woken.wait(10))
    server.faults, server.refusal_body = [fault], b"no JSON"
    with pytest.raises(KeyboardInterrupt):
        teach(
            client,
            QUESTIONS,
            tmp_path,
            concurrency=1,
            progress=lambda done, wanted, words: ctrl_c() if "(1 waiting)" in words else None,
        )
    assert not woken.is_set() and capsys.readouterr().err == ""  # no reply was pending
    woken.set()
    while client.retried.waiting:
        threading.Event().wait(0.01)
    assert len(server.requests) == 1 and client.retried.made == 0


def test_refused_question_stays_open(server, tmp_path):
    server.faults = [None, 400]
    taught = teach(server.client(), QUESTIONS[:4], tmp_path, concurrency=1)
    assert (len(taught.traces), taught.open) == (3, 1) and "returned 400" in taught.reason
    assert teach(server.client(), QUESTIONS[:4], tmp_path).open == 0
    assert len(server.requests) == 5


@pytest.mark.parametrize(("faults", "concurrency"), [([None, 400] * 10, 1), ([400] * 10, 12)])
def test_scattered_or_simultaneous_refusals_do_not_stop_the_call(server, tmp_path, faults, concurrency):
    server.faults = faults
    taught = teach(server.client(), QUESTIONS, tmp_path, samples=2, concurrency=concurrency)
    assert (len(taught.traces), taught.open) == (14, 10)


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_leading_refusals_do_not_stop_the_other_questions(tmp_path, status, concurrency):
    def answer(request):
        number = int(request.body["messages"][-1]["content"].split()[-1])
        if number < 12:
            return Answer({"error": "flagged"}, status)
        time.sleep(0.05)  # a refusal arrives before a reply
        return chat_reply("Add.\n<answer>2</answer>")

    with answering(answer) as api:
        questions = [Question(f"What is {number}") for number in range(30)]
        taught = teach(api.client(), questions, tmp_path, concurrency=concurrency)
    assert (len(taught.traces), taught.open) == (18, 12) and len(api.requests) == 30


def test_eight_consecutive_refusals_stop_the_call(server, tmp_path):
    server.faults = [400] * 7 + [None] + [400] * 8
    with pytest.raises(ServerError, match="returned 400"):
        teach(server.client(), QUESTIONS, tmp_path, samples=2, concurrency=1)
    assert len(server.requests) == 16


def test_wrong_key_stops_the_call_at_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", "sk-secret")
    server.faults = [None, 401]
    with pytest.raises(ServerError, match="returned 401"):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=1)
    assert len(server.requests) == 2
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert all("sk-secret" not in path.read_text() for path in tmp_path.iterdir())


def test_slow_server_is_reported_with_what_to_raise(server):
    server.faults = ["hang"]
    with pytest.raises(ServerError, match=r"did not answer: ReadTimeout.*; raise the timeout"):
        server.client(timeout=0.3, retries=0).ask("/chat/completions", {"messages": []})


def test_call_resumes_after_a_server_restart(server, tmp_path):
    client = server.client(retries=0)
    teach(client, QUESTIONS[:3], tmp_path)
    server.stop()
    with pytest.raises(ServerError, match="did not answer"):
        teach(client, QUESTIONS, tmp_path)
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 3
    server.start()
    assert len(teach(client, QUESTIONS, tmp_path).traces) == 12
    assert sorted(sent_problems(server)) == sorted(question.text for question in QUESTIONS)


def test_torn_line_of_a_killed_call_is_requested_again(server, tmp_path):
    teach(server.client(), QUESTIONS[:3], tmp_path)
    replies = tmp_path / "replies.jsonl"
    replies.write_bytes(replies.read_bytes()[:-9])
    assert len(teach(server.client(), QUESTIONS[:3], tmp_path).traces) == 3
    assert len(server.requests) == 4


def test_budget_holds_whatever_the_replies_cost(server, tmp_path):
    prices = Prices(read=1.0, written=100.0)
    options = dict(max_tokens=200, prices=prices, max_cost=0.05, concurrency=4)
    taught = teach(server.client(), QUESTIONS, tmp_path, **options)
    assert 0 < len(taught.traces) < 12 and taught.open == 12 - len(taught.traces)
    assert taught.cost <= 0.05 and "budget" in taught.reason
    # One more reply could have exceeded it.
    assert taught.cost + prices.cost(len(QUESTIONS[0].text.encode()), 200) > 0.05
    again = teach(server.client(), QUESTIONS, tmp_path, **options)
    assert again.cost == taught.cost and len(server.requests) == len(taught.traces)


def test_budget_may_be_used_up_to_its_limits():
    prices = Prices(read=1.0, written=3.0)
    for limits in ({"max_cost": prices.cost(50, 50), "max_tokens": None}, {"max_cost": None, "max_tokens": 100}):
        budget = Budget(prices, **limits)
        assert budget.can_afford([(50, 50)]) and not budget.can_afford([(50, 51)])
        assert budget.max_concurrency(4) == 1  # until the first reply
    assert Budget(prices, None, None).max_concurrency(4) == 4


def test_stored_reply_shows_how_far_a_teacher_exceeds_its_limit(tmp_path):
    prices, job = Prices(), Job(QUESTIONS[0], 0, Server("http://localhost/v1", "m"), "", {"max_tokens": 5})
    record = job.record(chat_reply("1", usage={"prompt_tokens": 1, "completion_tokens": 9}))
    ReplyStore(tmp_path / "replies.jsonl", Budget(prices, None, 99), []).add(record)
    ReplyStore(tmp_path / "replies.jsonl", budget := Budget(prices, None, 99), [job])
    assert budget.max_concurrency(4) == 4 and (budget.read, budget.written) == (1, 9)
    assert budget.can_afford([(0, 85)]) and not budget.can_afford([(0, 86)])  # it exceeded its limit by 4 tokens


def test_missing_token_counts_are_taken_at_their_maximum(server, tmp_path):
    server.reports_usage, server.script = False, lambda problem: "So it is 1.\n<answer>1</answer>"
    questions = [Question("a" * 300)], [Question("五" * 100)]  # the same number of bytes
    latin, chinese = (teach(server.client(), q, tmp_path / q[0].text[0], max_tokens=500) for q in questions)
    assert latin.written == chinese.written == 500 and latin.read == chinese.read > 300


def test_total_tokens_can_be_capped(server, tmp_path):
    taught = teach(server.client(), QUESTIONS, tmp_path, max_tokens=100, max_total_tokens=800, concurrency=1)
    assert taught.read + taught.written <= 800 and taught.open > 0


def test_failed_replies_are_listed_with_reasons(server, tmp_path):
    server.script = lambda problem: "I do not know." if " 1 " in problem else solve(problem)
    taught = teach(server.client(), QUESTIONS[:3], tmp_path)
    assert (len(taught.traces), taught.failed) == (2, 1)
    [failed] = map(json.loads, (tmp_path / "failed.jsonl").read_text().splitlines())
    assert failed["problem"] == "What is 1 + 1?" and "no answer" in failed["reason"]
    cut = teach(server.client(), QUESTIONS[:3], tmp_path / "short", max_tokens=5)
    assert cut.failed == 3 and "cut at the token limit" in (tmp_path / "short" / "failed.jsonl").read_text()


def test_known_answers_verify_the_traces(server, tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"problem": "What is 3 + 1?", "answer": 4}, {"question": "What is 5 + 1?", "answer": "#### 7"}]
    rows += [{"problem": "What is 7 + 1?"}, {"problem": "What is 3 + 1?", "answer": 4}]
    rows += [{"problem": "What is 9 + 1?", "answer": "We add 1 to the 9.\nSo that is how we get 10 in the end."}]
    rows += [{"problem": "What is 11 + 1?", "answer": "notfound"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught = teach(server.client(), read_questions(file), tmp_path / "out")
    assert [trace.verified for trace in taught.traces] == [True, False, None, None, None]
    assert taught.verdicts == {"right": 1, "wrong": 1, "unverified": 3}
    assert taught.verdicts.items() <= json.loads((tmp_path / "out" / "teach.json").read_text()).items()
    curate([tmp_path / "out"], tmp_path / "kept")
    assert [trace.verified for trace in read_traces(tmp_path / "kept")] == [True, None, None, None]


def test_command_reports_wrong_answers_and_failed_replies(server, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"problem": "What is 5 + 1?", "answer": "7"}')
    command = [
        "teach",
        "tiny",
        str(tmp_path / "p.jsonl"),
        "-o",
        str(tmp_path / "out"),
        "--server",
        f"http://127.0.0.1:{server.port}/v1",
    ]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "right: 0\nwrong: 1\nunverified: 0\n" in output and "rbfast curate leaves those out" in output
    assert "failed, and why" not in output and "None" not in output
    command[4] = str(tmp_path / "short")
    assert main([*command, "--max-tokens", "5"]) == 0
    output = capsys.readouterr().out
    failed = tmp_path / "short" / "failed.jsonl"
    assert f"listed, with reasons, in {failed}; the first: the reply was cut at the token limit" in output


def test_thinking_becomes_the_reasoning():
    reply = {"text": "So it is \\boxed{4}.", "thinking": " Two and two. ", "finish_reason": "stop", "key": "k"}
    trace = trace_of(Question("2 + 2?"), reply, "t")
    assert (trace.reasoning, trace.answer, trace.plan) == ("Two and two.", "4", None)
    tagged = reply | {"text": "<think>\nHm.\n</think>\n<plan>Add.</plan><answer>4</answer>", "thinking": ""}
    trace = trace_of(Question("2 + 2?"), tagged, "t")
    assert (trace.reasoning, trace.answer, trace.plan) == ("Hm.", "4", "Add.")
    twice = reply | {"text": "<plan> </plan>Is it <answer>3</answer>?\n<answer>4</answer>", "thinking": ""}
    trace = trace_of(Question("2 + 2?"), twice, "t")
    assert (trace.reasoning, trace.answer, trace.plan) == ("Is it <answer>3</answer>?", "4", None)
    for end in ("", "\n\nShall I go on?"):
        written = f"<think>Is it \\boxed{{3}}?</think>Two and two.\nThe answer is **4**.{end}"
        assert trace_of(Question("2 + 2?"), reply | {"text": written, "thinking": ""}, "t").answer == "4"
    with pytest.raises(TraceError, match="reasoning"):
        trace_of(Question("2 + 2?"), reply | {"text": "<answer>4</answer>", "thinking": ""}, "t")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_cost": 1.0}, "max_cost needs prices per million tokens"),
        ({"max_cost": float("nan")}, "max_cost must be at least 0, got nan"),
        ({"max_total_tokens": -1}, "max_total_tokens must be at least 0, got -1"),
    ],
)
def test_invalid_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        teach(Server("http://127.0.0.1:9/v1", "m"), QUESTIONS, tmp_path, **options)


def test_invalid_prices_and_timeouts_are_refused():
    for prices in ((-1.0, 1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="prices must be finite and at least 0"):
            Prices(*prices)
    for timeout in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout must be finite and above 0"):
            Server("http://127.0.0.1:9/v1", "m", timeout=timeout)


def test_invalid_questions_are_refused(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"problem": "Why?"}\n{"problem": " "}\n')
    with pytest.raises(ValueError, match=r"problems\.jsonl:2: problem: expected text"):
        read_questions(file)
    for torn in ({"problem": "Why? \ud83d"}, {"problem": "Why?", "system": "\ud83d"}):
        file.write_text(json.dumps(torn))
        with pytest.raises(ValueError, match=r"problems\.jsonl:1: (problem|system): .* half a surrogate pair"):
            read_questions(file)
    file.write_text("")
    with pytest.raises(ValueError, match="at least one problem"):
        read_questions(file)
    assert len(read_questions("chain_sum", n=3)) == 3


def test_problem_is_sent_with_its_own_system_prompt(server, tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"problem": "What is 1 + 1?"}, {"problem": "What is 1 + 1?", "system": "A dozen is 12."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught = teach(server.client(), read_questions(file), tmp_path / "out", system="Be brief.")
    prompts = sorted(body["messages"][0]["content"] for body in server.requests)
    assert prompts == ["Be brief.", "Be brief.\n\nA dozen is 12."]
    assert [trace.system for trace in read_traces(tmp_path / "out/traces.jsonl")] == [None, "A dozen is 12."]
    assert [trace.system for trace in taught.traces] == [None, "A dozen is 12."]
    teach(server.client(), read_questions(file)[1:], tmp_path / "bare", system="")
    assert server.requests[-1]["messages"][0] == {"role": "system", "content": "A dozen is 12."}


def test_all_questions_of_a_benchmark_are_read(monkeypatch):
    import datasets

    rows = [{"problem": f"Find {i}.", "answer": str(i)} for i in range(30)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **_: rows)
    assert [question.text for question in read_questions("aime24")] == [row["problem"] for row in rows]
    assert len(read_questions("aime24", n=3)) == 3


def test_foreign_replies_file_is_refused(tmp_path):
    (tmp_path / "replies.jsonl").write_text('{"text": "?"}\n')
    with pytest.raises(ValueError, match=r"replies\.jsonl:1: expected a teacher's reply"):
        teach(Server("http://127.0.0.1:9/v1", "m"), QUESTIONS, tmp_path)


@pytest.mark.parametrize("limits", [(300, 4000), (4000, 300)], ids=["raised", "lowered"])
@pytest.mark.filterwarnings("ignore:a reply was cut")
def test_changed_token_limit_repeats_only_truncated_replies(tmp_path, limits):
    def reply(request):
        text = request.body["messages"][-1]["content"]
        cut = text.startswith("Hard") and request.body["max_tokens"] < 1000
        return chat_reply("First," if cut else "0 + 1 = 1\n<answer>1</answer>", "length" if cut else "stop")

    questions = [Question("Hard: 0 + 1?"), *QUESTIONS[:3]]
    with answering(reply) as api:
        first, second = (teach(api.client(), questions, tmp_path, max_tokens=limit, samples=2) for limit in limits)
        repeated = [body["messages"][-1]["content"] for body in api.bodies[8:]]
    assert len(second.traces) == 8 and second.failed == 0
    assert repeated == (["Hard: 0 + 1?"] * 2 if limits[0] < limits[1] else [])
    assert second.read > first.read or not repeated


def test_truncated_reply_warns_once(tmp_path):
    with (
        answering(chat_reply("First,", "length")) as api,
        pytest.warns(UserWarning, match="cut .* raise max_tokens") as warned,
    ):
        teach(api.client(), QUESTIONS[:3], tmp_path)
    assert len(warned) == 1


@pytest.mark.parametrize("status", [401, 402])
def test_paid_replies_are_written_when_the_rest_is_refused(server, tmp_path, status):
    server.faults = [None, None, status]
    with pytest.raises(ServerError, match=f"returned {status}"):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=1)
    assert len(read_traces(tmp_path / "traces.jsonl")) == 2
    summary = json.loads((tmp_path / "teach.json").read_text())
    assert summary["open"] == 10 and f"returned {status}" in summary["reason"]


def test_paid_replies_are_written_after_ctrl_c(server, tmp_path, ctrl_c):
    pressed = []

    def progress(done, wanted, words):
        if done and not pressed:  # a second Ctrl-C would drop the pending replies
            pressed.append(done)
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=1, progress=progress)
    assert len(read_traces(tmp_path / "traces.jsonl")) == len(server.requests) == 2
    assert json.loads((tmp_path / "teach.json").read_text())["reason"] == "interrupted"


@pytest.fixture
def fake_clock(monkeypatch):
    """A clock that advances only in pauses."""
    now = [0.0]
    sleep = lambda seconds: now.__setitem__(0, now[0] + seconds)  # noqa: E731
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr("rbfast.teacher.asking.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


@pytest.mark.parametrize("status", [429, 502, 503, 504, 529])
def test_wait_for_a_busy_teacher_lasts_minutes(server, tmp_path, fake_clock, status):
    server.faults, messages = [None] + [status] * 60, []
    taught = teach(
        server.client(), QUESTIONS, tmp_path, concurrency=2, progress=lambda done, wanted, words: messages.append(words)
    )
    assert len(taught.traces) == 12 and taught.open == 0 and len(server.requests) == 72
    assert any(words.startswith("the teacher is busy or unreachable") for words in messages)


def test_wait_for_a_busy_teacher_is_limited(server, tmp_path, fake_clock):
    server.faults = [None] + [503] * 9999
    with pytest.raises(ServerError, match="returned 503"):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=2)
    assert 600 < fake_clock[0] < 1200 and len(read_traces(tmp_path / "traces.jsonl")) == 1


def test_unreachable_teacher_is_waited_for(server, tmp_path, fake_clock):
    stopped = []

    def progress(done, wanted, words):
        if done == 1 and not stopped:
            server.stop()
            stopped.append(True)
        elif "unreachable" in words and stopped == [True]:
            server.start()
            stopped.append(False)

    taught = teach(server.client(retries=1), QUESTIONS, tmp_path, concurrency=1, progress=progress)
    assert len(taught.traces) == 12 and stopped == [True, False]


def test_exhausted_quota_is_not_waited_for(server, tmp_path, fake_clock):
    server.faults, server.refusal_body = [None] + [429] * 99, b'{"error": {"code": "insufficient_quota"}}'
    with pytest.raises(ServerError, match="insufficient_quota"):
        teach(server.client(), QUESTIONS, tmp_path, concurrency=1)
    assert len(server.requests) == 5


def test_requested_pause_of_hours_is_not_waited_for(tmp_path, fake_clock):
    answers = chat_reply("Add.\n<answer>1</answer>"), Answer("come again tomorrow", 429, {"Retry-After": "86400"})
    with answering(*answers) as api, pytest.raises(ServerError, match="come again tomorrow"):
        teach(api.client(), QUESTIONS, tmp_path, concurrency=1)
    assert fake_clock[0] < 600


def test_requested_pause_of_minutes_is_kept(tmp_path, fake_clock):
    right, busy = chat_reply("Add.\n<answer>1</answer>"), Answer("come again", 429, {"Retry-After": "300"})
    with answering(right, busy, right) as api:
        taught = teach(api.client(retries=0), QUESTIONS, tmp_path, concurrency=1)
    assert taught.open == 0 and len(api.requests) == len(QUESTIONS) + 1
    assert 300 <= fake_clock[0] < 301


def test_second_simultaneous_call_is_refused(server, tmp_path):
    problems, second = tmp_path / "problems.jsonl", []
    problems.write_text(json.dumps({"problem": "What is 1 + 1?"}))
    command = [sys.executable, "-m", "rbfast", "teach", "tiny", str(problems), "-o", str(tmp_path)]
    command += ["--server", f"http://127.0.0.1:{server.port}/v1"]

    def progress(done, wanted, words):
        if not second:
            second.append(subprocess.run(command, capture_output=True, text=True))

    teach(server.client(), QUESTIONS[:3], tmp_path, progress=progress)
    assert second[0].returncode == 2 and f"another process is using {tmp_path}" in second[0].stderr
    assert len(server.requests) == 3
