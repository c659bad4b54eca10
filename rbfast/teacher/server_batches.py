"""OpenAI's batch API, which other servers have too: upload a file of requests, and create a batch from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import IO, Any

from rbfast.teacher.batch_api import BatchStatus, Report, Request, Result, parse_line
from rbfast.teacher.client import IncompleteReply, Server, ServerError, downloaded_lines, is_busy
from rbfast.teacher.jobs import CHAT, Job

_RUNNING = {"validating", "in_progress", "finalizing", "cancelling"}


class ServerBatches:
    """A `BatchAPI`. Its ticket is the id of the uploaded file, by which the batch is found."""

    most_requests, most_bytes = 50_000, 190_000_000

    def __init__(self, server: Server) -> None:
        self.teacher, self.url = server, server.url

    def request(self, job: Job) -> Request:
        body = self.teacher.full_body(job.body())
        line = {"custom_id": job.key, "method": "POST", "url": f"/v1{CHAT}", "body": body}
        return Request(job.key, json.dumps(line, ensure_ascii=False).encode())

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        data = b"".join(request.data + b"\n" for request in requests)
        server = self.teacher
        with server.translated_errors("/files"):
            file = server.client().files.create(
                file=("rbfast.jsonl", data), purpose="batch", extra_headers=server.headers()
            )
        return {"file": file.id}

    def create(self, ticket: dict[str, Any], requests: Sequence[Request]) -> str:
        try:
            with self.teacher.translated_errors("/batches"):
                # Without the SDK's retries: each could create another batch.
                once = self.teacher.client().with_options(max_retries=0)
                return once.batches.create(
                    input_file_id=ticket["file"],
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    extra_headers=self.teacher.headers(),
                ).id
        except ServerError as error:
            if error.status is None or is_busy(error.status):
                raise IncompleteReply(str(error), error.status) from None
            raise

    def find(self, ticket: dict[str, Any], report: Report) -> str | None:
        with self.teacher.translated_errors("/batches"):
            recent = self.teacher.client().batches.list(limit=100, extra_headers=self.teacher.headers()).data
        return next((batch.id for batch in recent if batch.input_file_id == ticket["file"]), None)

    def poll(self, batch: str) -> BatchStatus:
        with self.teacher.translated_errors(f"/batches/{batch}"):
            response = self.teacher.client().batches.retrieve(batch, extra_headers=self.teacher.headers())
        counts = response.request_counts
        done, total = (counts.completed + counts.failed, counts.total) if counts else (None, None)
        ended, fault = response.status not in _RUNNING, None
        if ended and response.status != "completed":
            errors = "; ".join(str(error.message) for error in (response.errors and response.errors.data) or [])
            fault = f"the batch {batch} has the status {response.status}{': ' + errors if errors else ''}"
            fault = self.teacher.hide(fault)
        return BatchStatus(batch, response.status, ended, done, total, fault, response)

    def results(self, state: BatchStatus) -> Iterator[Result]:
        for line in self._lines(state):
            response, error = line.get("response") or {}, line.get("error")
            body, status = response.get("body"), response.get("status_code")
            whole = status == 200 and isinstance(body, dict) and not error
            refusal = "" if whole else self.teacher.hide(json.dumps(error or body, ensure_ascii=False, default=str))
            yield Result(line["custom_id"], body if whole else None, status, refusal)

    def _lines(self, state: BatchStatus) -> Iterator[dict[str, Any]]:
        server = self.teacher
        for name in filter(None, (state.response.output_file_id, state.response.error_file_id)):
            for line in downloaded_lines(server, partial(self._download, name)):
                yield parse_line(line, "custom_id", f"{server.url}/files/{name}", server)

    def _download(self, name: str, file: IO[bytes]) -> None:
        server = self.teacher
        content = server.client().files.with_streaming_response.content(name, extra_headers=server.headers())
        with server.translated_errors(f"/files/{name}/content"), content as response:
            http = import_module(type(response.http_response).__module__.partition(".")[0])  # httpx, or httpx2
            try:
                file.writelines(response.iter_bytes())
            except http.TransportError as error:  # the SDK neither retries nor translates it
                raise IncompleteReply(f"{server.url}/files/{name} broke off: {type(error).__name__}: {error}") from None
