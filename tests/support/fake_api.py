"""A loopback HTTP server that sends scripted answers in the format of any API, and records the requests."""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rbfast.teacher.client import Server


@dataclass
class Answer:
    """What to send: JSON, or a text unchanged."""

    content: object
    status: int = 200
    headers: dict = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    headers: dict
    data: bytes

    @property
    def body(self):
        return json.loads(self.data)


class FakeAPI:
    """Sends `answers` in order and repeats the last one; an answer may be a function of the request."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self.http.daemon_threads = True
        self.host = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def bodies(self):
        return [request.body for request in self.requests]

    def answer(self, request):
        with self.lock:
            self.requests.append(request)
            found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        found = found(request) if callable(found) else found
        return found if isinstance(found, Answer) else Answer(found)

    def client(self, **options):
        return Server(f"{self.host}/v1", "m", **{"timeout": 5, "retries": 3} | options)


class _Handler(BaseHTTPRequestHandler):
    api: FakeAPI

    def log_message(self, *args):
        pass

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.title(): value for name, value in self.headers.items()}
        answer = self.api.answer(Request(self.command, self.path, headers, data))
        content = answer.content if isinstance(answer.content, str) else json.dumps(answer.content)
        headers = {"Content-Type": "application/json", "Content-Length": len(content.encode())} | answer.headers
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content.encode())

    do_GET = do_POST


@contextmanager
def answering(*answers):
    api = FakeAPI(*answers)
    try:
        yield api
    finally:
        api.http.shutdown()
        api.http.server_close()


def chat_reply(message, finish_reason="stop", usage=None, **choice):
    """A chat completion; a string is the content of its message."""
    message = message if isinstance(message, dict) else {"role": "assistant", "content": message}
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8} if usage is None else usage
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason, **choice}], "usage": usage}


def events(*chunks, done=True):
    """A server-sent stream of these objects."""
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return Answer(text + ("data: [DONE]\n\n" if done else ""), headers={"Content-Type": "text/event-stream"})
