"""The chat and batch APIs of Anthropic and Gemini, and the outcome of each request.

`reply(question, params)` answers each request: with a text, or an `Answer` with another status and an error message.
A batch has ended at its second poll.
"""

import json
import re

from fake_api import Answer

KEY = "sk-ant-0123456789abcdef"
THOUGHT = "Let me add."
_UNKNOWN = Answer({"error": {"type": "not_found_error", "message": "no such path"}}, 404)


class Claude:
    """Anthropic's messages and batches. `ends`: the result types of requests that get no reply."""

    url, model = "", "claude-sonnet-4-5"
    creation = ("POST", "/v1/messages/batches")
    moments = ("POST /v1/messages/batches", "GET /v1/messages/batches/msgbatch_", "GET .*/results")

    def __init__(self, reply):
        self.reply, self.batches, self.polls = reply, {}, {}
        self.ends = {}  # by question

    def __call__(self, request):
        if request.headers["X-Api-Key"] != KEY or request.headers["Anthropic-Version"] != "2023-06-01":
            return Answer({"error": {"type": "authentication_error", "message": "who is it?"}}, 401)
        path, _, query = request.path.removeprefix("/v1/messages").partition("?")
        if (request.method, path) == ("POST", ""):
            return self.chat(request.body)
        if (request.method, path) == ("POST", "/batches"):
            return self.create(request.body["requests"])
        if path == "/batches":
            limit = int(dict(part.split("=") for part in query.split("&")).get("limit", 20))
            return {"data": [self.status(name) for name in reversed(self.batches)][:limit], "has_more": False}
        if path.endswith("/results"):
            return Answer("".join(json.dumps(line) + "\n" for line in self.results(path.split("/")[2])))
        return self.poll(path.split("/")[2])

    def chat(self, params):
        found = self.reply(params["messages"][-1]["content"][0]["text"], params)
        return self.message(found) if isinstance(found, str) else self.refusal(found)

    def message(self, text):
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [
                {"type": "thinking", "thinking": THOUGHT, "signature": "s"},
                {"type": "text", "text": text},
            ],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 3, "output_tokens": 5},
        }

    def refusal(self, answer):
        error = {"type": "invalid_request_error", "message": answer.content}
        return Answer({"type": "error", "error": error}, answer.status)

    def create(self, requests):
        keys = [request["custom_id"] for request in requests]
        assert len(set(keys)) == len(keys) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", key) for key in keys)
        assert all({"model", "messages", "max_tokens"} <= request["params"].keys() for request in requests)
        assert not any("stream" in request["params"] for request in requests)
        self.batches[name := f"msgbatch_{len(self.batches)}"] = requests
        return self.status(name)

    def status(self, name):
        ended = self.polls.get(name, 0) > 1
        done, count = "succeeded" if ended else "processing", len(self.batches[name])
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0) | {done: count}
        status = "ended" if ended else "in_progress"
        return {"id": name, "type": "message_batch", "processing_status": status, "request_counts": counts}

    def poll(self, name):
        self.polls[name] = self.polls.get(name, 0) + 1
        return self.status(name)

    def results(self, name):
        for request in reversed(self.batches[name]):  # batches do not keep the order
            question = request["params"]["messages"][-1]["content"][0]["text"]
            found = self.chat(request["params"])
            if question in self.ends:
                result = {"type": self.ends[question]}
            elif isinstance(found, Answer):
                result = {"type": "errored", "error": found.content}
            else:
                result = {"type": "succeeded", "message": found}
            yield {"custom_id": request["custom_id"], "result": result}


class Gemini:
    """Gemini's generateContent, files and batches. `state`: the final state of a batch."""

    url, model = "/v1beta", "gemini-2.5-pro"
    creation = ("POST", "/v1beta/models/gemini-2.5-pro:batchGenerateContent")
    moments = ("POST /upload/", "POST /place/", "POST .*:batch", "GET /v1beta/batches/", "GET /download/")

    def __init__(self, reply):
        self.reply, self.files, self.batches, self.polls = reply, {}, {}, {}
        self.state, self.error = "BATCH_STATE_SUCCEEDED", None

    def __call__(self, request):
        path = request.path.partition("?")[0]
        if not path.startswith("/place/") and request.headers["X-Goog-Api-Key"] != KEY:
            return Answer({"error": {"code": 401, "message": "who is it?"}}, 401)
        if path == "/upload/v1beta/files":
            assert request.headers["X-Goog-Upload-Command"] == "start"
            place = f"http://{request.headers['Host']}/place/{len(self.files)}?upload_id=1"
            return Answer({}, headers={"X-Goog-Upload-Url": place})
        if path.startswith("/place/"):
            assert request.headers["X-Goog-Upload-Command"] == "upload, finalize"
            self.files[name := f"files/{len(self.files)}"] = request.data.decode()
            return {"file": {"name": name}}
        if path == f"/v1beta/models/{self.model}:generateContent":
            return self.chat(request.body)
        if path == f"/v1beta/models/{self.model}:batchGenerateContent":
            return self.create(request.body["batch"])
        if path == "/v1beta/batches":
            return {"operations": [self.status(name) for name in self.batches]}
        if path.startswith("/download/v1beta/files/"):
            return Answer(self.files[path.removeprefix("/download/v1beta/").removesuffix(":download")])
        return self.poll(path.removeprefix("/v1beta/")) if path.startswith("/v1beta/batches/") else _UNKNOWN

    def chat(self, request):
        found = self.reply(request["contents"][-1]["parts"][0]["text"], request.get("generationConfig", {}))
        if isinstance(found, Answer):
            return Answer({"error": {"code": found.status, "message": found.content}}, found.status)
        parts = [{"text": THOUGHT, "thought": True}, {"text": found}]
        usage = {"promptTokenCount": 3, "candidatesTokenCount": 1, "thoughtsTokenCount": 4, "totalTokenCount": 8}
        candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP"}
        return {"candidates": [candidate], "usageMetadata": usage}

    def create(self, batch):
        lines = self.files[batch["input_config"]["file_name"]].splitlines()
        self.batches[name := f"batches/{len(self.batches)}"] = batch | {
            "requests": [json.loads(line) for line in lines]
        }
        return self.status(name)

    def status(self, name):
        batch, polls = self.batches[name], self.polls.get(name, 0)
        operation = {"name": name, "metadata": {"displayName": batch["display_name"]}}
        operation["metadata"]["batchStats"] = {"requestCount": str(len(batch["requests"]))}
        if polls == 0:
            return operation  # a new batch reports neither its state nor its counts
        if polls == 1:
            operation["metadata"] |= {"state": "BATCH_STATE_RUNNING"}
            return operation
        operation["metadata"] |= {"state": self.state}
        if self.state != "BATCH_STATE_SUCCEEDED":
            return operation | {"done": True, "error": {"code": 13, "message": self.error}}
        self.files[results := f"files/of-{name[8:]}"] = "".join(map(self.result, batch["requests"]))
        return operation | {"done": True, "response": {"responsesFile": results}}

    def poll(self, name):
        self.polls[name] = self.polls.get(name, 0) + 1
        return self.status(name)

    def result(self, line):
        found = self.chat(line["request"])
        if isinstance(found, Answer):
            error = {"code": 3 if found.status == 400 else 13, "message": found.content["error"]["message"]}
            return json.dumps({"key": line["key"], "error": error}) + "\n"
        return json.dumps({"key": line["key"], "response": found}) + "\n"
