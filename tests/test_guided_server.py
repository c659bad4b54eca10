"""The client against a real server on the loopback interface, which writes a script and misbehaves when told to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rbfast.guide import WAIT, WRAP_UP, Guide
from rbfast.guided_server import Server, ServerError, chat, solve, solve_or_chat

SHORT = {"wait": "Wait.", "wrap_up": "Stop."}
PROMPT = "Q\n"


class Script:
    """Writes words of `script`, one a token, going on where the prompt ends."""

    def __init__(self, script):
        self.script, self.requests, self.headers = script.split("|"), [], []
        self.faults: list = []  # one a request: None, an int status, "close", "ignore", "garbage"
        self.completions, self.usage = True, True
        self.told = 0

    def pieces(self, body, ignore):
        left = self.script[self.told :]
        return left if ignore else left[: body["max_tokens"]]


@pytest.fixture
def start():
    servers = []

    def run(script):
        state = Script(script)

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                state.requests.append(body)
                state.headers.append(dict(self.headers))
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

            def chat(self, body):
                usage = {"usage": {"completion_tokens": len(state.script)}} if state.usage else {}
                message = {"content": "".join(state.script)}
                self.reply(200, {"choices": [{"message": message, "finish_reason": "stop"}], **usage})

            def stream(self, body, fault):
                self.send_response(200)
                self.end_headers()
                pieces = state.pieces(body, fault == "ignore")
                if fault == "ignore":
                    # All in one piece, whose tokens it says.
                    return self.event({"text": "".join(pieces), "logprobs": {"tokens": pieces}})
                for number, piece in enumerate(pieces):
                    if fault in ("close", "garbage") and number == 2:
                        return self.wfile.write(b"data: {broken\n\n") if fault == "garbage" else None
                    state.told += 1
                    try:
                        self.event({"text": piece})
                    except OSError:
                        return
                done = state.told >= len(state.script)
                self.event({"text": "", "finish_reason": "stop" if done else "length"})
                self.wfile.write(b"data: [DONE]\n\n")

            def event(self, choice):
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
                self.wfile.flush()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return state, Server(f"http://127.0.0.1:{server.server_port}/v1", "m", timeout=10, retries=2, pause=0.01)

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def guide(**options):
    return Guide(**{"budget": 120, "reserve": 40} | SHORT | options)


def test_a_stream_is_read_to_its_end(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    heard = []
    solution = solve(server, PROMPT, guide(), listen=lambda kind, text: heard.append((kind, text)))
    assert (solution.thinking, solution.answer) == ("So x = 4.</think>", "It is 4.")
    assert (solution.tokens, solution.truncated, solution.events) == (8, False, ())
    assert heard[0] == ("think", "So ") and heard[-1] == ("answer", ".")
    assert state.requests[0]["max_tokens"] == 80 and state.requests[0]["stream"] is True


def test_interventions_go_on_from_what_is_left(start):
    state, server = start("Easy: |12|</think>|Hm, |so |3| words.\n|</think>|3")
    solution = solve(server, PROMPT, guide(minimum=8))
    assert (solution.events[0].kind, solution.events[0].struck) == (WAIT, "</think>")
    assert solution.text.startswith("Easy: 12\n\nWait.\n")
    # What the client did not read before it closed is gone; the next prompt is what was kept.
    assert state.requests[1]["prompt"] == PROMPT + "Easy: 12\n\nWait.\n"


def test_the_budget_ends_the_thinking_and_then_the_answer(start):
    _, server = start("|".join(["word "] * 500))
    solution = solve(server, PROMPT, guide(budget=60, reserve=40))
    assert [event.kind for event in solution.events] == [WRAP_UP]
    assert solution.tokens <= 60 and solution.truncated
    assert solution.thinking.endswith("Stop.\n</think>") and solution.answer.startswith("word ")


def test_a_tokenizers_count_is_used(start):
    _, server = start("|".join(["two words "] * 100))
    solution = solve(server, PROMPT, guide(budget=60, reserve=20), count=lambda text: len(text.split()))
    assert solution.tokens <= 60 and 35 < len(solution.text.split()) <= 60


@pytest.mark.parametrize("fault", ["close", "garbage"])
def test_a_broken_stream_is_gone_on_with(start, fault):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = [fault]
    solution = solve(server, PROMPT, guide())
    assert solution.text == "So x = 4.</think>It is 4." and solution.tokens == 8
    assert state.requests[1]["prompt"] == PROMPT + "So x" and state.requests[1]["max_tokens"] == 78


def test_a_server_that_always_breaks_off_loses_nothing(start):
    state, server = start("So |x| = 4|.|</think>|It is |4|.")
    state.faults = ["close"] * 2 + [429] * 9
    with pytest.raises(ServerError, match="429") as caught:
        solve(server, PROMPT, guide())
    assert caught.value.partial.text == "So x = 4." and caught.value.status == 429


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(start, status):
    state, server = start("</think>|4")
    state.faults = [status, status]
    assert solve(server, PROMPT, guide()).answer == "4"
    assert len(state.requests) == 3


def test_refusals_are_not_repeated(start):
    state, server = start("</think>|4")
    state.faults = [401]
    with pytest.raises(ServerError, match=r"said 401: .*not now"):
        solve(server, PROMPT, guide())
    assert len(state.requests) == 1


def test_a_server_that_ignores_the_limit_is_named(start):
    state, server = start("|".join(["word "] * 500))
    state.faults = ["ignore"]
    with pytest.raises(ServerError, match="ignores max_tokens: at most 80 were asked for, 500 came"):
        solve(server, PROMPT, guide())


def test_chat_is_the_fallback_and_is_checked(start):
    state, server = start("It is |<answer>|4|</answer>")
    state.completions = False
    solution = solve_or_chat(server, "2+2?", PROMPT, guide())
    assert solution.text == "It is <answer>4</answer>" and solution.tokens == 4
    assert state.requests[-1]["messages"][0]["content"].startswith("2+2?\n\n")
    with pytest.raises(ServerError, match=r"did not honour the budget: at most 3 tokens .* it says 4") as caught:
        chat(server, "2+2?", Guide(3))
    assert caught.value.partial.text == "It is <answer>4</answer>"
    state.usage = False
    with pytest.raises(ServerError, match="it says nothing of how many"):
        chat(server, "2+2?", guide())


def test_nobody_there():
    server = Server("http://127.0.0.1:9/v1", "m", timeout=2, retries=1, pause=0.01)
    with pytest.raises(ServerError, match="said nothing: ConnectionRefusedError"):
        solve(server, PROMPT, guide())
    with pytest.raises(ValueError, match="url must look like"):
        Server("localhost:8000", "m")


def test_the_key_is_sent_and_never_shown(start, monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", "sk-secret")
    state, plain = start("</think>|4")
    server = Server(plain.url, "m", pause=0.01, retries=0)
    solve(server, PROMPT, guide())
    assert state.headers[0]["Authorization"] == "Bearer sk-secret"
    state.faults = [500]
    with pytest.raises(ServerError) as caught:
        solve(server, PROMPT, guide())
    assert "sk-secret" not in repr(server) + str(caught.value)
