"""A small OpenAI-compatible loopback server around a model, which misbehaves on request.

It writes the text of `script(problem)` with the model's own log-probs, and scores prompts like vLLM, like SGLang or by
echo.
"""

import json
import math
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from rbfast.teacher.align import token_bytes
from rbfast.teacher.client import Server


class OpenAI:
    """The server. `faults`: what happens to the next requests: None, a status, "hang", "cut" or "kill"."""

    def __init__(self, model, tokenizer, script=lambda problem: "<answer>1</answer>"):
        self.model, self.tokenizer, self.script = model, tokenizer, script
        self.bytes = token_bytes(tokenizer)
        self.faults, self.requests, self.headers = [], [], []
        self.active, self.most_active, self.pause = 0, 0, 0.0
        self.reports_usage = True  # whether replies count their tokens
        self.refusal_body = b'{"error": "not now"}'  # the body of a refusal
        self.retry_after = None  # a header of a refusal
        self.lock = threading.Lock()
        self.http = None
        self.port = 0

    def start(self):
        handler = type("Handler", (_Handler,), {"state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def client(self, **options):
        return Server(f"http://127.0.0.1:{self.port}/v1", "tiny", **{"timeout": 5, "retries": 3} | options)

    def logprobs(self, ids):
        """[n, V]: row i predicts token i + 1."""
        with self.lock, torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def text(self, number):
        return (self.bytes[number] or b"").decode("utf-8", "replace")

    def complete(self, body):
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt, add_special_tokens=False).input_ids
        table = self.logprobs(ids)
        if "prompt_logprobs" in body:
            scored = [None, *(self._ranked(table[i], ids[i + 1], body["prompt_logprobs"]) for i in range(len(ids) - 1))]
            choice = {"prompt_logprobs": scored}
            if body.get("return_token_ids"):
                choice["prompt_token_ids"] = ids
        else:
            generated = int(table[-1].argmax())
            written = [*ids, generated]
            tops = [None]
            for row in table:
                best = row.topk(body["logprobs"])
                found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                tops.append({self.text(n): value for n, value in found})
            choice = {"logprobs": {"tokens": [self.text(n) for n in written], "top_logprobs": tops}}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}

    def _ranked(self, row, actual, k):
        numbers = [actual, *(n for n in row.topk(k).indices.tolist() if n != actual)]
        return {str(n): {"logprob": float(row[n]), "decoded_token": self.text(n)} for n in numbers}

    def generate(self, body):
        """SGLang's own API. It sends null for a log-prob of -inf."""
        ids = body.get("input_ids") or self.tokenizer(body["text"], add_special_tokens=False).input_ids
        table, shows = self.logprobs(ids), body["return_text_in_logprobs"]

        def entry(row, number):
            value = float(row[number])
            return [value if value > -math.inf else None, number, self.text(number) if shows else None]

        own, tops = [[None, ids[0], self.text(ids[0]) if shows else None]], [None]
        for row, number in zip(table, ids[1:], strict=False):
            own.append(entry(row, number))
            tops.append([entry(row, other) for other in row.topk(body["top_logprobs_num"]).indices.tolist()])
        return {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": tops}}

    def chat(self, body):
        problem = body["messages"][-1]["content"]
        reply = self.script(problem)
        ids = self.tokenizer(reply, add_special_tokens=False, split_special_tokens=True).input_ids
        cut = len(ids) > body["max_tokens"]
        ids = ids[: body["max_tokens"]]
        text = b"".join(self.bytes[n] for n in ids).decode("utf-8", "replace")
        choice = {"message": {"content": text}, "finish_reason": "length" if cut else "stop"}
        if body.get("logprobs"):
            prompt = self.tokenizer(problem, add_special_tokens=False).input_ids
            table = self.logprobs(prompt + ids)[len(prompt) - 1 :]
            choice["logprobs"] = {"content": [self._content_entry(table[i], n, body) for i, n in enumerate(ids)]}
        usage = {"prompt_tokens": len(problem.split()), "completion_tokens": len(ids)}
        return {"choices": [choice]} | ({"usage": usage} if self.reports_usage else {})

    def _content_entry(self, row, number, body):
        best = row.topk(body["top_logprobs"]).indices.tolist()
        return self._token_entry(row, number) | {"top_logprobs": [self._token_entry(row, n) for n in best]}

    def _token_entry(self, row, number):
        raw = self.bytes[number]
        return {"token": self.text(number), "bytes": None if raw is None else list(raw), "logprob": float(row[number])}


class _Handler(BaseHTTPRequestHandler):
    state: OpenAI

    def log_message(self, *args):
        pass

    def do_POST(self):
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.requests.append(body)
            state.headers.append({name.title(): value for name, value in self.headers.items()})
            fault = state.faults.pop(0) if state.faults else None
            state.active += 1
            state.most_active = max(state.most_active, state.active)
        try:
            self._reply(body, fault)
        finally:
            with state.lock:
                state.active -= 1

    def _reply(self, body, fault):
        state = self.state
        if isinstance(fault, int):
            return self._send(fault, state.refusal_body)
        if fault == "hang":
            threading.Event().wait(1.0)  # not time.sleep, which tests replace
            return self.connection.close()
        if fault == "kill":
            return self.connection.shutdown(socket.SHUT_RDWR)
        threading.Event().wait(state.pause)
        answers = {"/v1/chat/completions": state.chat, "/v1/completions": state.complete, "/generate": state.generate}
        found = answers[self.path](body)
        data = json.dumps(found).encode()
        self._send(200, data, cut=fault == "cut")

    def _send(self, status, data, cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status != 200:
            after = self.state.retry_after
            self.send_header("Retry-After-Ms" if after is None else "Retry-After", "10" if after is None else after)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)


@contextmanager
def serving(model, tokenizer, **options):
    server = OpenAI(model, tokenizer, **options).start()
    try:
        yield server
    finally:
        server.stop()
