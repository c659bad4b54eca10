"""A loopback server that writes a script, misbehaves on request, and records its requests."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from guides import SHORT, make_guide

from rbfast.inference.remote import ServerSolver
from rbfast.inference.solver import Sampling
from rbfast.teacher.client import Server

PROMPT = "Q\n"
WORDS = "|".join(["word. "] * 20_000)  # more than requested: a closed stream loses its undelivered part


class Script:
    """Writes the words of the seed's script, one per token, from the end of its last reply."""

    def __init__(self, *scripts):
        self.scripts = [script.split("|") for script in scripts]
        self.requests, self.headers, self.probes = [], [], []
        self.faults: list = []  # one per request: None, an int status, "close", "ignore", "deaf", "garbage", "nonsense"
        self.completions, self.usage = True, True
        self.finish = None  # the finish reason; None: "stop" or "length"
        self.delivered = Counter()
        self.logprobs = []  # of the candidates at each token; used cyclically
        self.probed = ["4"]  # answers to probes; the last one is repeated

    def script(self, body):
        return self.scripts[body["seed"] % len(self.scripts)]

    def pieces(self, body, ignore):
        left = self.script(body)[self.delivered[body["seed"]] :]
        return left if ignore else left[: body["max_tokens"]]


@pytest.fixture
def no_pauses(monkeypatch):
    """Retries do not wait."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def start():
    """A function that starts a server with these scripts and returns its state and a client."""
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
                    # A single event, which lists its tokens.
                    return self.event({"text": "".join(pieces), "logprobs": {"tokens": pieces}})
                for number, piece in enumerate(pieces):
                    if fault in ("close", "garbage") and number == 2:
                        return self.wfile.write(b"data: {broken\n\n") if fault == "garbage" else None
                    state.delivered[body["seed"]] += 1
                    try:
                        self.event({"text": piece} | self.logprobs_of(piece, state.delivered[body["seed"]], body))
                    except OSError:
                        return
                done = state.delivered[body["seed"]] >= len(state.script(body))
                self.event({"text": "", "finish_reason": state.finish or ("stop" if done else "length")})
                if state.usage == "exact":
                    self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": self.usage_of(pieces)}).encode())
                    self.wfile.write(b"\n\n")
                self.wfile.write(b"data: [DONE]\n\n")

            def usage_of(self, pieces):
                return {"completion_tokens": sum(len(piece.split()) for piece in pieces)}

            def logprobs_of(self, piece, number, body):
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
    """A guide with a budget that a script can exhaust."""
    return make_guide(**{"budget": 120, "reserve": 40} | SHORT | options)


def samples_of(server, chosen_guide, problem="q", *, samples, concurrency=8, **options):
    """The solutions of one problem."""
    sampling = Sampling(samples, temperature=0.8 if samples > 1 else 0.0, **options)
    [solutions] = ServerSolver(server, concurrency=concurrency).solve([problem], chosen_guide, sampling)
    return solutions
