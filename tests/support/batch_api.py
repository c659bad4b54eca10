"""A server with OpenAI's batch API: files, batches, and the outcome of each request."""

import json

from fake_api import Answer
from questions import QUESTIONS

from rbfast.teacher.budget import Prices


class Batches:
    """Answers requests of the batch API. `reply(body)` answers each chat request of a batch: with a completion, or an
    `Answer` with another status. A batch is done at its second poll."""

    def __init__(self, reply):
        self.reply = reply
        self.files, self.batches, self.polls = {}, {}, {}
        self.status = "completed"
        self.errors = None

    def __call__(self, request):
        path = request.path.split("?")[0].removeprefix("/v1")
        if request.method == "POST" and path == "/files":
            return self.upload(request)
        if request.method == "POST" and path == "/batches":
            return self.create(request.body)
        if path == "/batches":
            return {"object": "list", "data": list(self.batches.values()), "has_more": False}
        if path.startswith("/batches/"):
            return self.poll(path.split("/")[2])
        if path.endswith("/content"):
            return Answer(self.files[path.split("/")[2]])
        return Answer({"error": {"message": f"no such path {path}"}}, 404)

    def upload(self, request):
        name = f"file-{len(self.files)}"
        # The part of the form between its headers and the last boundary.
        lines = request.data.decode().split("\r\n")
        self.files[name] = next(line for line in lines if line.startswith('{"custom_id"'))
        return {"id": name, "object": "file", "purpose": "batch", "bytes": 1, "created_at": 0, "filename": "f"}

    def create(self, body):
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {"id": name, "object": "batch", "status": "validating", "created_at": 0, **body}
        return self.batches[name]

    def poll(self, name):
        batch = self.batches[name]
        self.polls[name] = self.polls.get(name, 0) + 1
        if self.polls[name] == 1:
            return batch | {"status": "in_progress"}
        if "output_file_id" not in batch and self.status != "failed":
            self.run(name, batch)
        return batch | {"status": self.status, "errors": self.errors}

    def run(self, name, batch):
        good, bad = [], []
        for line in filter(None, self.files[batch["input_file_id"]].split("\n")):
            request = json.loads(line)
            assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
            found = self.reply(request["body"])
            found = found if isinstance(found, Answer) else Answer(found)
            response = {"status_code": found.status, "request_id": "r", "body": found.content}
            where = good if found.status == 200 else bad
            where.append({"id": "x", "custom_id": request["custom_id"], "response": response, "error": None})
        for kind, lines in (("output", good[::-1]), ("error", bad)):  # batches do not keep the order
            self.files[f"{name}-{kind}"] = "".join(json.dumps(line) + "\n" for line in lines)
            batch[f"{kind}_file_id"] = f"{name}-{kind}" if lines else None


def assert_the_budget_holds(ask, made, folder):
    """Batches stay within the budget, and none starts that could exceed it. `ask(folder, questions, **options)`."""
    options = {"max_tokens": 100, "prices": Prices(0, 1000), "max_cost": 0.35}
    taught = ask(folder, QUESTIONS, **options)
    # The limit allows three replies of 100 tokens. They took 5 each, so others could follow.
    assert len(taught.traces) > 3 and taught.cost <= 0.35 and len(made()) > 1
    short = ask(folder / "short", QUESTIONS[:4], **options | {"max_cost": 0.09})
    assert (short.traces, short.open) == ([], 4) and "budget" in short.reason
