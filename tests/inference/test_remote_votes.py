"""Prompts, samples and votes from a server, in Python and from the command line."""

import json
import threading
from collections import Counter
from dataclasses import replace
from queue import SimpleQueue

import pytest
from fake_api import answering, events
from guides import make_guide
from scripted_server import samples_of
from thinking_templates import tokenizer_of
from tiny import tiny_tokenizer

from rbfast.cli.main import main
from rbfast.data.instruction import ANSWER
from rbfast.inference.guide import Guide, Limits
from rbfast.inference.remote import ServerSolver, prompt_for
from rbfast.inference.solver import Sampling
from rbfast.inference.tokens import phrases_for
from rbfast.inference.vote import majority
from rbfast.teacher.client import ServerError

pytestmark = pytest.mark.usefixtures("no_pauses")

# ---------------------------------------------------------------------------------------------------------- the prompt


def test_prompt_follows_the_models_chat_template():
    tokenizer = tiny_tokenizer()
    assert prompt_for("2+2?", tokenizer).startswith("2+2?\n\n")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
    tokenizer.bos_token = "<end>"
    assert prompt_for("2+2?", tokenizer).startswith("<end><u>2+2?\n\n")
    # Servers add the BOS token themselves, as this tokenizer does: the prompt must not add another.
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    assert prompt_for("2+2?", tokenizer).startswith("<u>2+2?\n\n")


def test_solve_reads_the_tokenizer_from_the_command_line(start, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</u>"
        "{% else %}{{ m.reasoning or '' }}</think>{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    state, server = start("So.|</think>|<answer>4</answer>")
    common = ["solve", "m", "2+2?", "--server", server.url, "--json", "--budget", "400"]
    assert main([*common, "--tokenizer", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == "4" and result["solutions"][0]["thinking"] == "So."
    assert result["solutions"][0]["tokens"] == len("So.</think><answer>4</answer>")  # one token per byte
    assert state.requests[0]["prompt"].startswith("<u>2+2?\n\n")
    state, server = start("So <answer>|4|</answer>")
    assert main(["solve", "m", "2+2?", "--server", server.url, "--json"]) == 0
    assert "the prompt is plain text, not the model's chat template" in capsys.readouterr().err
    assert state.requests[0]["prompt"].startswith("2+2?\n\n")


@pytest.mark.parametrize("name", ["gpt-oss", "magistral", "gemma-4", "cohere", "qwen3", "r1-distill"])
def test_special_token_markers_are_requested(name):
    tokenizer = tokenizer_of(name)
    phrases = phrases_for(tokenizer)
    is_special = any(token in phrases.close for token in tokenizer.all_special_tokens)
    assert is_special == (name not in ("qwen3", "r1-distill"))

    def vllm(request):
        leaves_out = tokenizer.all_special_tokens if request.body.get("skip_special_tokens", True) else []
        written = ["So.", phrases.close, "4"]
        for token in leaves_out:
            written = [text.replace(token, "") for text in written]
        return events(*({"choices": [{"text": text}]} for text in written), {"choices": [{"finish_reason": "stop"}]})

    with answering(vllm) as api:
        [[solution]] = ServerSolver(api.client(), tokenizer).solve(["2+2?"], Guide(Limits(800), phrases))
        assert ("skip_special_tokens" in api.bodies[0]) == is_special
    assert (solution.answer, solution.events) == ("4", ())


def test_solve_shows_the_text_of_a_chat_only_server(start, capsys):
    state, server = start("It is |<answer>4</answer>")
    state.completions = False
    assert main(["solve", "m", "2+2?", "--server", server.url]) == 0
    assert "It is <answer>4</answer>\nanswer: 4" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- votes


def plain(**options):
    return make_guide(**{"budget": 10**6, "close": "<answer>", "finish": "</answer>"} | options)


def answer_script(answer):
    return f"So |<answer>|{answer}|</answer>"


ENDLESS = "|".join(["word "] * 200_000)


def test_samples_vote_with_their_own_seeds(start):
    state, server = start(answer_script(4), answer_script(5), answer_script(5), answer_script(6))
    solutions = samples_of(server, plain(), samples=4, seed=4)
    assert [solution.answer for solution in solutions] == ["4</answer>", "5</answer>", "5</answer>", "6</answer>"]
    assert sorted(request["seed"] for request in state.requests) == [4, 5, 6, 7]
    assert {request["temperature"] for request in state.requests} == {0.8}


def test_decided_vote_abandons_running_samples(start):
    _, server = start(answer_script(4), answer_script(4), ENDLESS)
    solutions = samples_of(server, plain(interventions=("wait",)), samples=3, concurrency=3)
    assert [solution.abandoned for solution in solutions] == [False, False, True]
    assert solutions[2].tokens < 200_000 and solutions[2].tokens == len(solutions[2].text.split())


def test_decided_vote_sends_no_more_requests(start):
    state, server = start(answer_script(4))
    solutions = samples_of(server, plain(), samples=9, concurrency=1)
    assert len(state.requests) == 5 and [solution.tokens for solution in solutions[5:]] == [0] * 4
    assert majority([solution.answer for solution in solutions if not solution.abandoned]).votes == 5
    state, server = start(answer_script(4))
    samples_of(server, plain(), samples=9, concurrency=1, early_stop=False)
    assert len(state.requests) == 9


def test_ctrl_c_prints_the_vote_of_the_samples_that_ended(start, monkeypatch, capsys, ctrl_c):
    state, server = start(answer_script(4))
    state.completions = False
    solve_sample, asked = ServerSolver._solve_sample, []

    def solve_third_after_ctrl_c(*args):
        asked.append(len(asked))
        if len(asked) == 3:
            monkeypatch.setattr("rbfast.teacher.workers.announce_wait", lambda replies: told.set())
            ctrl_c()
            assert told.wait(10)
        return solve_sample(*args[:-1], lambda: False)  # a chat is not abandoned

    told = threading.Event()
    monkeypatch.setattr(ServerSolver, "_solve_sample", solve_third_after_ctrl_c)
    command = ["solve", "m", "2+2?", "--server", server.url, "--samples", "8", "--concurrency", "1", "--json"]
    assert main(command) == 130
    printed = json.loads(capsys.readouterr().out)
    assert (printed["answer"], printed["votes"], len(printed["solutions"]), len(asked)) == ("4", 3, 3, 3)


def test_failed_sample_keeps_the_others(start):
    state, server = start(answer_script(4), answer_script(5), retries=0)
    state.faults = [None, 401]
    with pytest.raises(ServerError, match="returned 401") as caught:
        samples_of(server, plain(), samples=5, concurrency=1)
    assert caught.value.status == 401 and caught.value.partial[0].answer == "4</answer>"


def test_samples_may_come_from_chat(start):
    state, server = start(answer_script(4))
    state.completions = False
    solutions = samples_of(server, plain(budget=500), "2+2?", samples=3)
    assert "So <answer>4</answer>" in {solution.text for solution in solutions}


def test_problems_are_solved_in_order_from_their_own_seeds(start):
    state, server = start(*(answer_script(number) for number in range(8)))
    solver = ServerSolver(server, concurrency=1)
    solutions = solver.solve(["one?", "two?"], plain(), Sampling(2, 0.5, 0.9, seed=[2, 5]))
    assert [[sample.answer for sample in samples] for samples in solutions] == [
        [f"{number}</answer>" for number in seeds] for seeds in ((2, 3), (5, 6))
    ]
    assert [request["prompt"].split("\n")[0] for request in state.requests] == ["one?"] * 2 + ["two?"] * 2
    assert {(request["temperature"], request["top_p"]) for request in state.requests} == {(0.5, 0.9)}
    received = []
    solver.solve(["three?", "four?"], plain(), listen=lambda *event: received.append(event[0]))
    assert received == sorted(received) and set(received) == {0, 1}


def test_problems_are_solved_at_the_same_time(start, monkeypatch):
    _, server = start(answer_script(4), answer_script(5))
    both, solve_sample = threading.Barrier(2), ServerSolver._solve_sample
    monkeypatch.setattr(ServerSolver, "_solve_sample", lambda *args: (both.wait(timeout=10), solve_sample(*args))[1])
    [[first], [second]] = ServerSolver(server).solve(["one?", "two?"], plain(), Sampling(seed=[0, 1]))
    assert (first.answer, second.answer) == ("4</answer>", "5</answer>")


def test_solved_problem_is_given_before_the_others_end(start, monkeypatch):
    state, server = start(answer_script(4), ENDLESS)
    written, solve_sample = SimpleQueue(), ServerSolver._solve_sample

    def solve_and_tell(*args):
        written.put(solution := solve_sample(*args))
        return solution

    monkeypatch.setattr(ServerSolver, "_solve_sample", solve_and_tell)
    guide, sampling = plain(interventions=("wait",)), Sampling(seed=[1, 0, 1])
    solving = ServerSolver(server, concurrency=2).solve_each(["one?", "two?", "three?"], guide, sampling)
    i, [solution] = next(solving)
    assert (i, solution) == (1, written.get()) and solution.answer == "4</answer>"
    solving.close()  # ends the running sample, and sends no request for those not started
    assert written.get(timeout=20).abandoned and len(state.requests) <= 3


def test_seeds_fit_every_server(start):
    state, server = start(answer_script(4))
    ServerSolver(server).solve(["one?"], plain(), Sampling(seed=[2**64 - 1]))
    assert state.requests[0]["seed"] == 2**31 - 1


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), None], ids=["template", "plain"])
def test_problem_may_have_its_own_system_prompt(start, tokenizer):
    state, server = start(answer_script(4), answer_script(5))
    systems, sampling = ["Be brief.", None], Sampling(seed=[0, 1])
    solver = ServerSolver(server, tokenizer, concurrency=1, instruction=replace(ANSWER, system="Be long."))
    dict(solver.solve_each(["one?", "two?"], plain(), sampling, systems=systems))
    assert ["Be brief." in request["prompt"] for request in state.requests] == [True, False]
    assert ["Be long." in request["prompt"] for request in state.requests] == [False, True]


def test_server_applies_its_template_if_there_is_nothing_to_insert(start):
    state, server = start(answer_script(4))
    [(_, [solution])] = ServerSolver(server).solve_each(["one?"], Guide.plain(500), systems=["Be brief."])
    assert solution.text == "So <answer>4</answer>"
    assert [message["content"].split("\n")[0] for message in state.requests[0]["messages"]] == ["Be brief.", "one?"]


def test_zero_concurrency_is_refused(start):
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        ServerSolver(start(answer_script(4))[1], concurrency=0)


def test_samples_vote_from_the_command_line(start, capsys):
    state, server = start(answer_script(4), answer_script(5), answer_script(4))
    common = ["solve", "m", "2+2?", "--server", server.url, "--samples", "3", "--json", "--concurrency", "1"]
    assert main(common) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["answer"], result["votes"], len(result["solutions"])) == ("4", 2, 3)
    assert {(request["temperature"], request.get("top_p")) for request in state.requests} == {(0.8, None)}
    state.requests.clear()
    state.delivered.clear()
    assert main([*common, "--temperature", "0.6", "--top-p", "0.95"]) == 0
    capsys.readouterr()
    assert {(request["temperature"], request["top_p"]) for request in state.requests} == {(0.6, 0.95)}
    state.faults, state.delivered = [None, 401], Counter()
    assert main(common) == 1
    printed = capsys.readouterr()
    assert "returned 401" in printed.err and json.loads(printed.out)["solutions"][0]["answer"] == "4"


@pytest.mark.parametrize("written", ["New Delhi", "B", r"\frac{1}{2}"])
def test_command_line_shows_a_voted_answer_as_written(start, capsys, written):
    _, server = start(answer_script(4), answer_script(written), answer_script(written))
    assert main(["solve", "m", "2+2?", "--server", server.url, "--samples", "3", "--concurrency", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["answer"], result["votes"]) == (written, 2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--server", "http://127.0.0.1:9/v1", "--adapter", "a"], "--adapter is for a local model"),
        (["--tokenizer", "t"], "--tokenizer is for --server"),
        (["--server", "http://127.0.0.1:9/v1", "--top-p", "0.9"], "--top-p is for sampling: also give a --temperature"),
    ],
)
def test_options_that_would_be_ignored_are_refused(capsys, options, complaint):
    assert main(["solve", "m", "2+2?", *options]) == 2
    assert complaint in capsys.readouterr().err
