"""The batch APIs of Anthropic and Gemini. litellm translates requests and replies, as for chats; uploads, batches and
results use the providers' own APIs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any
from uuid import uuid4

from rbfast.teacher.batch_api import BatchStatus, Report, Request, Result, parse_line, wait_for_end
from rbfast.teacher.client import ServerError
from rbfast.teacher.jobs import Job
from rbfast.teacher.provider_requests import ProviderRequests
from rbfast.teacher.providers import Provider

# The HTTP status of each error type: https://docs.claude.com/en/api/errors
_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class AnthropicBatches:
    """A `BatchAPI`: Anthropic's Message Batches.

    These batches have no name, and only the results show the ids of the requests. So a ticket holds the newest batch
    before ours, the number of our requests and the key of one. Ours is the later batch that has as many requests and
    whose results contain that key.
    """

    most_requests, most_bytes = 100_000, 250_000_000
    _LISTED = 1000  # batches at most

    def __init__(self, provider: Provider) -> None:
        self.teacher = provider
        self._requests = ProviderRequests(provider)
        self.url = f"{self._requests.chat_url}/batches"

    def request(self, job: Job) -> Request:
        params = self.teacher.request(job.body()).content
        return Request(job.key, b'{"custom_id": %s, "params": %s}' % (json.dumps(job.key).encode(), params))

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        newest = next(iter(self._list(1)), {})
        return {"after": newest.get("id", ""), "requests": len(requests), "key": requests[0].key}

    def create(self, ticket: dict[str, Any], requests: Sequence[Request]) -> str:
        data = b'{"requests": [' + b",\n".join(request.data for request in requests) + b"]}"
        return self._requests.once("POST", self.url, "id", content=data)["id"]

    def find(self, ticket: dict[str, Any], report: Report) -> str | None:
        """The id of the batch. May wait for a batch to end: only its results show whose it is."""
        later = takewhile(lambda batch: batch["id"] != ticket["after"], self._list(self._LISTED))
        alike = [batch["id"] for batch in later if sum(_counts(batch).values()) == ticket["requests"]]
        for batch in reversed(alike):  # the oldest first
            wait_for_end(self, batch, report)
            if any(line["custom_id"] == ticket["key"] for line in self._lines(batch)):
                return batch
        return None

    def poll(self, batch: str) -> BatchStatus:
        response = self._requests.ask("GET", f"{self.url}/{batch}", "processing_status")
        counts, status = _counts(response), response["processing_status"]
        total = sum(counts.values())
        return BatchStatus(batch, status, status == "ended", total - counts.get("processing", 0), total)

    def results(self, state: BatchStatus) -> Iterator[Result]:
        for line in self._lines(state.batch):
            key, result = line["custom_id"], _object(line.get("result"))
            if result.get("type") == "succeeded":
                yield read_result(self.teacher, key, result.get("message"))
                continue
            error = _object(result.get("error"))
            error = _object(error.get("error")) or error
            refusal = f"the request has the state {result.get('type')}"
            if error:
                refusal = json.dumps(error, ensure_ascii=False)
            yield Result(key, None, _STATUS.get(str(error.get("type"))), self.teacher.hide(refusal))

    def _list(self, limit: int) -> list[dict[str, Any]]:
        """The newest batches, the newest first."""
        return self._requests.ask("GET", f"{self.url}?limit={limit}", "data")["data"]

    def _lines(self, batch: str) -> Iterator[dict[str, Any]]:
        url = f"{self.url}/{batch}/results"
        for line in self._requests.lines(url):
            yield parse_line(line, "custom_id", url, self.teacher)


class GeminiBatches:
    """A `BatchAPI`: Gemini's batchGenerateContent of an uploaded file. A batch is found by its display name."""

    most_requests, most_bytes = 100_000, 250_000_000  # the API accepts 2 GB, but we hold the requests in memory
    _ENDED = ("_SUCCEEDED", "_FAILED", "_CANCELLED", "_EXPIRED")

    def __init__(self, provider: Provider) -> None:
        self.teacher = provider
        self._requests = ProviderRequests(provider)
        self._model = self._requests.chat_url.removesuffix(":generateContent")
        self.url = self._model.rpartition("/models/")[0]

    def request(self, job: Job) -> Request:
        request = self.teacher.request(job.body()).content
        return Request(job.key, b'{"key": %s, "request": %s}' % (json.dumps(job.key).encode(), request))

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        name = f"rbfast-{uuid4().hex}"
        data = b"".join(request.data + b"\n" for request in requests)
        return {"name": name, "file": self._requests.upload(self._beside("upload") + "/files", name, data)}

    def create(self, ticket: dict[str, Any], requests: Sequence[Request]) -> str:
        batch = {"display_name": ticket["name"], "input_config": {"file_name": ticket["file"]}}
        url = f"{self._model}:batchGenerateContent"
        return self._requests.once("POST", url, "name", json={"batch": batch})["name"]

    def find(self, ticket: dict[str, Any], report: Report) -> str | None:
        page = ""
        while True:
            response = self._requests.ask("GET", f"{self.url}/batches?pageSize=100&pageToken={page}")
            for batch in response.get("operations") or []:
                if (batch.get("metadata") or {}).get("displayName") == ticket["name"]:
                    return batch["name"]
            page = response.get("nextPageToken") or ""
            if not page:
                return None

    def poll(self, batch: str) -> BatchStatus:
        response = self._requests.ask("GET", f"{self.url}/{batch}", "metadata")
        status = str(response["metadata"].get("state", ""))
        counts = response["metadata"].get("batchStats") or {}
        total, good, bad = (int(counts.get(f"{name}equestCount", 0)) for name in ("r", "successfulR", "failedR"))
        ended, fault = status.endswith(self._ENDED) or response.get("done") is True, None
        if ended and not status.endswith("SUCCEEDED"):
            error = (response.get("error") or {}).get("message")
            fault = self.teacher.hide(f"the batch {batch} has the status {status}{f': {error}' if error else ''}")
        return BatchStatus(batch, status, ended, good + bad, total, fault, response)

    def results(self, state: BatchStatus) -> Iterator[Result]:
        places = (state.response.get("response"), state.response["metadata"].get("output"))
        file = next((place["responsesFile"] for place in places if place and place.get("responsesFile")), None)
        if file is None:
            return
        url = f"{self._beside('download')}/{file}:download?alt=media"
        for data in self._requests.lines(url):
            line = parse_line(data, "key", url, self.teacher)
            if "response" in line:
                yield read_result(self.teacher, line["key"], line["response"])
                continue
            error = _object(line.get("error") or line.get("status"))
            refusal = self.teacher.hide(json.dumps(error, ensure_ascii=False))
            yield Result(line["key"], None, _status_of_code(error.get("code")), refusal)

    def _beside(self, word: str) -> str:
        """The API's URL for files, with `word` before the version."""
        root, version = re.fullmatch(r"(.*?)(/v\d\w*)?", self.url).groups(default="")  # type: ignore[union-attr]
        return f"{root}/{word}{version}"


def read_result(provider: Provider, key: str, reply: Any) -> Result:
    """The result from a reply in the provider's own format."""
    try:
        return Result(key, provider.read(reply))
    except ServerError as error:
        return Result(key, None, error.status, str(error))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _counts(batch: dict[str, Any]) -> dict[str, int]:
    return batch.get("request_counts") or {}


def _status_of_code(code: Any) -> int | None:
    """The HTTP status of an error. The results of a batch have gRPC codes; 3 is INVALID_ARGUMENT."""
    return 400 if code == 3 else code if isinstance(code, int) and code >= 100 else None
