"""The client against a real server on the loopback interface, which writes a script and misbehaves when told to."""

import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from guides import make_guide
from tiny import tiny_tokenizer

from rbfast.cli.main import main
from rbfast.inference.guide import OTHER, VERIFY, WAIT, WRAP_UP, Guide, Limits
from rbfast.inference.remote import ServerSolver, chat, prompt_for, write
from rbfast.inference.solver import Sampling, calibrate
from rbfast.inference.state import STABLE
from rbfast.inference.vote import majority
from rbfast.teacher.client import Server, ServerError

SHORT = {"wait": "Wait.", "verify": "Check.", "other": "Else.", "wrap_up": "Stop."}
PROMPT = "Q\n"
WORDS = "|".join(["word. "] * 20_000)  # more than is asked for: what was not read before a stream was closed is gone


class Script:
    """Writes words of the seed's script, one a token, going on where its last reply ended."""

    def __init__(self, *scripts):
        self.scripts = [script.split("|") for script in scripts]
        self.requests, self.headers, self.probes = [], [], []
        self.faults: list = []  # one a request: None, an int status, "close", "ignore", "deaf", "garbage", "nonsense"
        self.completions, self.usage = True, True
        self.told = Counter()
        self.logprobs = []  # of the candidates at a token; one after the other, again and again
        self.probed = ["4"]  # what probes are answered, the last one again and again

    def script(self, body):
        return self.scripts[body["seed"] % len(self.scripts)]

    def pieces(self, body, ignore):
        left = self.script(body)[self.told[body["seed"]] :]
        return left if ignore else left[: body["max_tokens"]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def start():
    servers = []

    def run(*scripts, **options):
        state = Script(*scripts)

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "stream" not in body:
                    state.probes.append(body)
                    return self.probe(body)
                state.requests.append(body)
                state.headers.append({name.title(): value for name, value in self.headers.items()})
                fault = state.faults.pop(0) if state.faults else None
                if isinstance(fault, int):
                    return self.reply(fault, {"error": "not now"})
                if self.path == "/v1/chat/completions":
                    return self.chat(body)
                if not state.completions:
                    return self.reply(404, {"error": "no such path"})
                self.stream(body, fault)

            def reply(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def probe(self, body):
                text = state.probed.pop(0) if len(state.probed) > 1 else state.probed[0]
                usage = {"usage": {"completion_tokens": len(text.split())}} if state.usage else {}
                self.reply(200, {"choices": [{"text": text, "finish_reason": "length"}], **usage})

            def chat(self, body):
                script = state.script(body)
                usage = {"usage": {"completion_tokens": len(script)}} if state.usage else {}
                message = {"content": "".join(script)}
                self.reply(200, {"choices": [{"message": message, "finish_reason": "stop"}], **usage})

            def stream(self, body, fault):
                self.send_response(200)
                self.end_headers()
                pieces = state.pieces(body, fault in ("ignore", "deaf"))
                if fault == "nonsense":
                    return self.wfile.write(b'data: {"choices": 3}\n\n')
                if fault == "ignore":
                    # All in one piece, whose tokens it says.
                    return self.event({"text": "".join(pieces), "logprobs": {"tokens": pieces}})
                for number, piece in enumerate(pieces):
                    if fault in ("close", "garbage") and number == 2:
                        return self.wfile.write(b"data: {broken\n\n") if fault == "garbage" else None
                    state.told[body["seed"]] += 1
                    try:
                        self.event({"text": piece} | self.said(piece, state.told[body["seed"]], body))
                    except OSError:
                        return
                done = state.told[body["seed"]] >= len(state.script(body))
                self.event({"text": "", "finish_reason": "stop" if done else "length"})
                if state.usage == "exact":
                    self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": self.exact(pieces)}).encode())
                    self.wfile.write(b"\n\n")
                self.wfile.write(b"data: [DONE]\n\n")

            def exact(self, pieces):
                return {"completion_tokens": sum(len(piece.split()) for piece in pieces)}

            def said(self, piece, number, body):
                if not state.logprobs or "logprobs" not in body:
                    return {}
                best = state.logprobs[number % len(state.logprobs)]
                tops = {f"t{i}": value for i, value in enumerate(best)}
                return {"logprobs": {"tokens": [piece], "top_logprobs": [tops]}}

            def event(self, choice):
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
                self.wfile.flush()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        settings = {"timeout": 10, "retries": 2} | options
        return state, Server(f"http://127.0.0.1:{server.server_port}/v1", "m", **settings)

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def guide(**options):
    return make_guide(**{"budget": 120, "reserve": 40} | SHORT | options)


def test_a_stream_is_read_to_its_end(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    heard = []
    solution = write(server, PROMPT, guide(), listen=lambda kind, text: heard.append((kind, text)))
    assert (solution.thinking, solution.answer) == ("So x = 4.</think>", "It is 4.")
    assert {"thinking": "So x = 4.", "answer": "It is 4."}.items() <= solution.to_dict().items()
    assert (solution.tokens, solution.truncated, solution.events) == (8, False, ())
    assert heard[0] == ("think", "So ") and heard[-1] == ("answer", ".")
    assert state.requests[0]["max_tokens"] == 80 and state.requests[0]["stream"] is True


def test_interventions_go_on_from_what_is_left(start):
    state, server = start("Easy: |12|</think>|Hm, |so |3| words.\n|</think>|3")
    solution = write(server, PROMPT, guide(minimum=8))
    assert (solution.events[0].kind, solution.events[0].struck) == (WAIT, "</think>")
    assert solution.text.startswith("Easy: 12\n\nWait.\n")
    # What the client did not read before it closed is gone; the next prompt is what was kept.
    assert state.requests[1]["prompt"] == PROMPT + "Easy: 12\n\nWait.\n"


def test_the_budget_ends_the_thinking_and_then_the_answer(start):
    _, server = start("|".join(["word "] * 500))
    solution = write(server, PROMPT, guide(budget=60, reserve=40))
    assert [event.kind for event in solution.events] == [WRAP_UP]
    assert solution.tokens <= 60 and solution.truncated
    assert solution.thinking.endswith("Stop.\n</think>") and solution.answer.startswith("word ")


def test_a_tokenizers_count_is_used(start):
    _, server = start("|".join(["two words "] * 100))
    solution = write(server, PROMPT, guide(budget=60, reserve=20), count=lambda text: len(text.split()))
    assert solution.tokens <= 60 and 35 < len(solution.text.split()) <= 60


@pytest.mark.parametrize("fault", ["close", "garbage"])
def test_a_broken_stream_is_gone_on_with(start, fault):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = [fault]
    solution = write(server, PROMPT, guide())
    assert solution.text == "So x = 4.</think>It is 4." and solution.tokens == 8
    assert state.requests[1]["prompt"] == PROMPT + "So x" and state.requests[1]["max_tokens"] == 78


def test_a_server_that_always_breaks_off_loses_nothing(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = ["close"] * 2 + [429] * 9
    with pytest.raises(ServerError, match="429") as caught:
        write(server, PROMPT, guide())
    assert caught.value.partial.text == "So x = 4." and caught.value.status == 429


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(start, status):
    state, server = start("</think>|4")
    state.faults = [status, status]
    assert write(server, PROMPT, guide()).answer == "4"
    assert len(state.requests) == 3


def test_refusals_are_not_repeated(start):
    state, server = start("</think>|4")
    state.faults = [401]
    with pytest.raises(ServerError, match=r"said 401: .*not now"):
        write(server, PROMPT, guide())
    assert len(state.requests) == 1


def test_a_server_that_ignores_the_limit_is_named(start):
    state, server = start("|".join(["word "] * 500))
    state.faults = ["ignore"]
    with pytest.raises(ServerError, match="ignores max_tokens: at most 80 were requested, 500 came"):
        write(server, PROMPT, guide())


def test_a_server_that_ignores_the_limit_piece_by_piece_is_cut_off(start):
    state, server = start(WORDS)
    state.faults = ["deaf"] * 9
    solution = write(server, PROMPT, guide(budget=60))
    assert solution.tokens == 60 and solution.truncated and solution.thinking.endswith("Stop.\n</think>")


def test_chat_is_the_fallback_and_is_checked(start):
    state, server = start("It is |<answer>|4|</answer>")
    state.completions = False
    solution = samples_of(server, guide(), "2+2?", samples=1)[0]
    assert solution.text == "It is <answer>4</answer>" and solution.tokens == 4
    assert state.requests[-1]["messages"][0]["content"].startswith("2+2?\n\n")
    with pytest.raises(ServerError, match=r"did not honour the budget: at most 3 tokens .* it reports 4") as caught:
        chat(server, "2+2?", Guide(Limits(3)))
    assert caught.value.partial.text == "It is <answer>4</answer>"
    state.usage = False
    with pytest.raises(ServerError, match="it reports no count"):
        chat(server, "2+2?", guide())


def test_nobody_there():
    server = Server("http://127.0.0.1:9/v1", "m", timeout=2, retries=1)
    with pytest.raises(ServerError, match="said nothing: ConnectError"):
        write(server, PROMPT, guide())
    with pytest.raises(ValueError, match="url must look like"):
        Server("localhost:8000", "m")


def test_the_key_is_sent_and_never_shown(start, monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", "sk-secret")
    state, plain = start("</think>|4")
    server = Server(plain.url, "m", retries=0)
    write(server, PROMPT, guide())
    assert state.headers[0]["Authorization"] == "Bearer sk-secret"
    state.faults = [500]
    with pytest.raises(ServerError) as caught:
        write(server, PROMPT, guide())
    assert "sk-secret" not in repr(server) + str(caught.value)


# -------------------------------------------------------------------------------------- what needs more than the text


UNSURE, SURE = [math.log(0.2)] * 5, [math.log(0.999)]


def test_an_unsure_model_is_told_to_verify(start):
    state, server = start(WORDS)
    state.logprobs = [UNSURE]
    asked = guide(budget=400, verify_above=1.0, cooldown=0, cap=1, loop_length=999)
    solution = write(server, PROMPT, asked)
    assert [event.kind for event in solution.events] == [VERIFY, WRAP_UP] and "Check.\n" in solution.thinking
    assert {round(measured, 9) for measured in solution.sentences} == {round(math.log(5), 9)}
    assert state.requests[0]["logprobs"] == 5
    state, server = start(WORDS)
    state.logprobs = [SURE]
    assert [event.kind for event in write(server, PROMPT, asked).events] == [WRAP_UP]
    state, server = start(WORDS)
    write(server, PROMPT, guide())
    assert "logprobs" not in state.requests[0]


def test_the_rest_of_a_distribution_counts_as_one_token(start):
    state, server = start("One. |</think>|4")
    state.logprobs = [[math.log(0.5), math.log(0.25)]]
    [measured] = write(server, PROMPT, guide(verify_above=9.0)).sentences
    assert measured == pytest.approx(1.5 * math.log(2))


def test_a_server_without_log_probs_can_not_verify(start):
    _, server = start("So it is. |</think>|4")
    with pytest.raises(ServerError, match="sends no log-probs, and verify_above needs them: leave it out"):
        write(server, PROMPT, guide(verify_above=1.0))


def test_calibration_is_a_quantile_of_what_the_server_says(start):
    state, server = start("|".join(["On. "] * 60))
    state.logprobs = [UNSURE, SURE]
    low, high = (calibrate(ServerSolver(server), ["q"], guide(budget=50), quantile=q) for q in (0.1, 0.9))
    assert 0 < low < high < math.log(5)
    with pytest.raises(ValueError, match="quantile must lie in"):
        calibrate(ServerSolver(server), ["q"], guide(), quantile=1.0)


def test_a_loop_gets_another_approach(start):
    _, server = start("|".join(["round and ", "round. "] * 20 + ["</think>", "4"]))
    solution = write(server, PROMPT, guide(loop_length=4, cooldown=0, cap=1))
    assert solution.events[0].kind == OTHER and "Else.\n" in solution.thinking


def probing(**options):
    return guide(budget=300, probe_every=5, probe_agree=2, probe_tokens=3, probe="A:", finish="</answer>", **options)


def test_a_stable_probe_ends_the_thinking(start):
    state, server = start(WORDS)
    state.probed = ["5", " 4 </answer> and", "\n4\nso"]
    solution = write(server, PROMPT, probing(interventions=()), count=lambda text: len(text.split()))
    assert [event.kind for event in solution.events] == [STABLE]
    assert [request["prompt"] for request in state.probes] == [
        PROMPT + "word. " * words + "\n\n</think>A:" for words in (5, 10, 15)
    ]
    assert {(probe["max_tokens"], probe["temperature"], *probe["stop"]) for probe in state.probes} == {
        (3, 0.0, "</answer>")
    }
    assert solution.thinking == "word. " * 15 + "\n\n</think>"
    # A probe costs what it puts in, one token here, and what it writes.
    assert solution.probe_tokens == 3 + 1 + 3 + 2
    assert solution.tokens == 300 and solution.text.count("word") + 1 == 300 - solution.probe_tokens


@pytest.mark.parametrize("usage", [True, False])
def test_probes_are_paid_from_the_budget(start, usage):
    state, server = start(WORDS)
    state.probed, state.usage = [f"{n}" for n in range(99)], usage
    solution = write(server, PROMPT, probing(), count=lambda text: len(text.split()))
    written = len((solution.text).split())
    assert solution.probe_tokens == len(state.probes) * (2 if usage else 4) and len(state.probes) > 5
    assert written <= solution.tokens - solution.probe_tokens and solution.tokens <= 300


def test_a_probe_that_ignores_the_limit_is_named(start):
    state, server = start(WORDS)
    state.probed = ["far more than was asked for"]
    with pytest.raises(ServerError, match="ignores max_tokens: at most 3 were requested, 6 came") as caught:
        write(server, PROMPT, probing())
    assert caught.value.partial.thinking == "word. " * 5


def test_the_answer_goes_on_after_the_thinkings_share(start):
    # The first request asks for the thinking's share, and ends within the answer: the reserve is still there.
    state, server = start("|".join(["word "] * 60 + ["</think>"] + ["answer "] * 30))
    solution = write(server, PROMPT, guide(loop_length=99))
    assert [request["max_tokens"] for request in state.requests] == [80, 40]
    assert solution.answer == "answer " * 30 and solution.tokens == 91 and not solution.truncated


def test_pieces_of_several_tokens_are_counted_at_the_end(start):
    state, server = start("two words. |</think>|it is 4")
    state.usage = "exact"
    assert write(server, PROMPT, guide()).tokens == 6


def test_an_own_count_that_is_too_high_blames_nobody(start):
    _, server = start("|".join(["word "] * 90))
    solution = write(server, PROMPT, guide(budget=61), count=lambda text: 3)
    assert solution.tokens <= 61 and solution.truncated


def test_chunks_that_are_no_completion_are_named(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = ["close", "nonsense"]
    with pytest.raises(ServerError, match="sent no completion: TypeError") as caught:
        write(server, PROMPT, guide())
    assert caught.value.partial.text == "So x"


# ---------------------------------------------------------------------------------------------------------- the prompt


def test_the_prompt_is_the_models_own():
    tokenizer = tiny_tokenizer()
    assert prompt_for("2+2?", tokenizer).startswith("2+2?\n\n")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
    tokenizer.bos_token = "<end>"
    assert prompt_for("2+2?", tokenizer).startswith("<end><u>2+2?\n\n")
    # Servers add it to what they read, as the tokenizer does: twice it would be another prompt.
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
    assert result["solutions"][0]["tokens"] == len("So.</think><answer>4</answer>")  # a token a byte
    assert state.requests[0]["prompt"].startswith("<u>2+2?\n\n")
    state, server = start("So <answer>|4|</answer>")
    assert main(["solve", "m", "2+2?", "--server", server.url, "--json"]) == 0
    assert "not its chat template" in capsys.readouterr().err
    assert state.requests[0]["prompt"].startswith("2+2?\n\n")


# ---------------------------------------------------------------------------------------------------------------- votes


def plain(**options):
    return make_guide(**{"budget": 10**6, "close": "<answer>", "finish": "</answer>"} | options)


def says(answer):
    return f"So |<answer>|{answer}|</answer>"


def samples_of(server, asked, problem="q", *, samples, concurrency=8, **options):
    sampling = Sampling(samples, temperature=0.8 if samples > 1 else 0.0, **options)
    [solutions] = ServerSolver(server, concurrency=concurrency).solve([problem], asked, sampling)
    return solutions


ENDLESS = "|".join(["word "] * 200_000)


def test_samples_vote_each_with_a_seed_of_its_own(start):
    state, server = start(says(4), says(5), says(5), says(6))
    solutions = samples_of(server, plain(), samples=4, seed=4)
    assert [solution.answer for solution in solutions] == ["4</answer>", "5</answer>", "5</answer>", "6</answer>"]
    assert sorted(request["seed"] for request in state.requests) == [4, 5, 6, 7]
    assert {request["temperature"] for request in state.requests} == {0.8}


def test_a_decided_vote_abandons_what_is_still_written(start):
    _, server = start(says(4), says(4), ENDLESS)
    solutions = samples_of(server, plain(interventions=()), samples=3, concurrency=3)
    assert [solution.abandoned for solution in solutions] == [False, False, True]
    assert solutions[2].tokens < 200_000 and solutions[2].tokens == len(solutions[2].text.split())


def test_a_decided_vote_does_not_ask_again(start):
    state, server = start(says(4))
    solutions = samples_of(server, plain(), samples=9, concurrency=1)
    assert len(state.requests) == 5 and [solution.tokens for solution in solutions[5:]] == [0] * 4
    assert majority([solution.answer for solution in solutions if not solution.abandoned]).votes == 5
    state, server = start(says(4))
    samples_of(server, plain(), samples=9, concurrency=1, early_stop=False)
    assert len(state.requests) == 9


def test_a_sample_that_fails_loses_none_of_the_others(start):
    state, server = start(says(4), says(5), retries=0)
    state.faults = [None, 401]
    with pytest.raises(ServerError, match="said 401") as caught:
        samples_of(server, plain(), samples=5, concurrency=1)
    assert caught.value.status == 401 and caught.value.partial[0].answer == "4</answer>"


def test_samples_by_chat_vote_too(start):
    state, server = start(says(4))
    state.completions = False
    solutions = samples_of(server, plain(budget=500), "2+2?", samples=3)
    assert "So <answer>4</answer>" in {solution.text for solution in solutions}


def test_problems_are_solved_one_after_the_other_each_from_its_own_seed(start):
    state, server = start(*(says(number) for number in range(8)))
    found = ServerSolver(server).solve(["one?", "two?"], plain(), Sampling(2, 0.5, 0.9, seed=[2, 5]))
    assert [[sample.answer for sample in samples] for samples in found] == [
        [f"{number}</answer>" for number in seeds] for seeds in ((2, 3), (5, 6))
    ]
    assert [request["prompt"].split("\n")[0] for request in state.requests] == ["one?"] * 2 + ["two?"] * 2
    assert {(request["temperature"], request["top_p"]) for request in state.requests} == {(0.5, 0.9)}


def test_a_concurrency_of_none_is_refused(start):
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        ServerSolver(start(says(4))[1], concurrency=0)


def test_samples_vote_from_the_command_line(start, capsys):
    state, server = start(says(4), says(5), says(4))
    common = ["solve", "m", "2+2?", "--server", server.url, "--samples", "3", "--json", "--concurrency", "1"]
    assert main(common) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["answer"], result["votes"], len(result["solutions"])) == ("4", 2, 3)
    assert {request["temperature"] for request in state.requests} == {0.8}
    state.faults, state.told = [None, 401], Counter()
    assert main(common) == 1
    printed = capsys.readouterr()
    assert "said 401" in printed.err and json.loads(printed.out)["solutions"][0]["answer"] == "4"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--server", "http://127.0.0.1:9/v1", "--adapter", "a"], "--adapter is for a local model"),
        (["--tokenizer", "t"], "--tokenizer is for --server"),
    ],
)
def test_options_that_would_be_ignored_are_refused(capsys, options, complaint):
    assert main(["solve", "m", "2+2?", *options]) == 2
    assert complaint in capsys.readouterr().err
