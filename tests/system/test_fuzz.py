"""Ten thousand broken files: each is refused by name or read correctly, without a crash, a hang or lost data.

The mutations are seeded: bits, cuts, splices, zeros, and unexpected JSON values. If a file carries a digest (adapters,
scores, signals, checkpoints), only its original content is a right result.
"""

import json
import math
import random
import shutil
import signal
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from run_folders import write_run
from safetensors.numpy import load, save
from tiny_models import attach, batch, disturb, llama
from tiny_tokenizers import byte_level

from rbfast.adapter.adapter_files import read_adapter
from rbfast.adapter.column_scores import ColumnScores, score_columns
from rbfast.data.answers import answer_text, as_text
from rbfast.data.encoding import encode
from rbfast.data.readers import read_rows, read_traces, write_traces
from rbfast.data.replies import verdict_of
from rbfast.data.signal_store import SignalStore
from rbfast.data.trace import Trace, is_finite
from rbfast.evaluation.decoding import Decoding
from rbfast.evaluation.evaluate import evaluate
from rbfast.grading.grade import Problem
from rbfast.grading.tasks import load_problems
from rbfast.inference.decoding import Completion
from rbfast.report.read_run import read_run
from rbfast.report.run_report import render
from rbfast.teacher.client import Server
from rbfast.teacher.jobs import Job
from rbfast.teacher.solutions import Question, read_questions, teach
from rbfast.training.checkpoints import last_checkpoint, write_digests
from rbfast.utils.sealed import seal

pytestmark = pytest.mark.slow

LIMIT = 20  # seconds per file
HUGE, DEEP = "@huge@", "@deep@"  # placeholders for text that json.dumps cannot write
VALUES = [None, True, False, 0, -1, 3, 2**63, 1.5, 1e308, math.nan, math.inf, "", " ", "x", "\ud800", "\0", "é" * 999]
VALUES += ["../../x", "<script>", "nan", [], {}, [[]], [None], {"": 0}, [0] * 99, HUGE, DEEP]
TEXTS = ["Add 12 and 30.\n12 + 30 = 42, é 😀.", "Then take 2 away.\n42 - 2 = 40."]
TRACES = [Trace(f"Problem {i}?", text, str(i), plan="Add." if i else None, id=f"t{i}") for i, text in enumerate(TEXTS)]
TOKENIZER = byte_level(*TEXTS)


def mutate(data, rng):
    """The bytes after one or a few random damages."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 99))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[(other := rng.randrange(len(data) + 1)) : other + length]
        elif kind == 4:
            data[at:at] = rng.randbytes(length)
        elif kind == 5:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at : at + length] = rng.choice((b'"', b"}", b"]", b"\n", b"1e999", b"-", b"\\u0000", b"NaN"))
    return bytes(data)


def substitute(line, rng):
    """JSON with one value or name replaced or removed."""
    value = json.loads(line)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk([value] if not isinstance(value, dict | list) else value)
    node, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("problem", "", "x", key + "x"))] = node.pop(key)
    else:
        node[key] = rng.choice(VALUES)
    text = json.dumps(value).replace(json.dumps(HUGE), "9" * 5000).replace(json.dumps(DEEP), "[" * 9999)
    return text.encode()


def mutate_json(data, rng, lines=False):
    """Damaged bytes, or JSON with one value changed. `lines`: each line is JSON."""
    if rng.random() < 0.5:
        return mutate(data, rng)
    if not lines:
        return substitute(data, rng)
    parts = data.splitlines()
    at = rng.randrange(len(parts))
    parts[at] = substitute(parts[at], rng)
    return b"\n".join(parts) + b"\n"


@contextmanager
def time_limit():
    def late(*_):
        raise AssertionError("the call hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sweep(n, path, change, read, errors=(ValueError,)):
    """Call `read` on n mutations of a file: an error must name it; `read` checks a result. Returns both counts."""
    rng, whole, refused = random.Random(path.name), path.read_bytes(), 0
    read()
    for number in range(n):
        data = change(whole, rng)
        path.write_bytes(data)
        try:
            with time_limit():
                read()
        except errors as error:
            refused += 1
            assert path.name in str(error), (number, data[:300], error)
        except BaseException as error:
            error.add_note(f"mutation {number} of {path.name}: {data[:600]!r}")
            raise
    path.write_bytes(whole)
    return refused, n - refused


def test_broken_traces(tmp_path):
    path = tmp_path / "traces.jsonl"
    signals = {"ids": [[1, 2]], "logprobs": [[-0.5, -1.5]]}
    spans = [[0, 15, "strategic"], [15, len(TEXTS[0]), "tactical"]]
    first = TRACES[0].to_dict() | {"spans": spans, "signals": signals, "difficulty": 0.5, "verified": True}
    write_traces(path, [Trace.from_dict(first), TRACES[1]])

    def read():
        traces = read_traces(path)
        rows = [json.loads(line.decode("utf-8-sig")) for line in path.read_bytes().split(b"\n") if line.strip()]
        assert len(traces) == len(rows) == len(list(read_rows(path)))
        for trace, row in zip(traces, rows, strict=True):
            if not {"problem", "reasoning", "answer"} <= row.keys():
                continue  # a row in another format, read by what its fields mean: tests/data/test_formats.py
            expected = {
                name: value for name, value in row.items() if name in Trace.__dataclass_fields__ and value != ""
            }
            # An answer is taken as text. Other fields of an unexpected type count as absent.
            expected["answer"] = (
                expected["answer"] if isinstance(expected["answer"], str) else answer_text(expected["answer"])
            )
            expected |= {name: as_text(expected.get(name)) for name in ("id", "domain", "source", "teacher")}
            expected |= {"verified": verdict_of(expected.get("verified"))}
            expected |= {} if is_finite(expected.get("difficulty")) else {"difficulty": None}
            assert trace.to_dict() == {name: value for name, value in expected.items() if value is not None}

    refused, read_well = sweep(3000, path, lambda data, rng: mutate_json(data, rng, lines=True), read)
    assert refused > 1000 and read_well > 100


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_broken_adapters(tmp_path, name):
    adapter = attach(llama())
    disturb(adapter)
    adapter.save_pretrained(tmp_path)
    _, whole = read_adapter(tmp_path)

    def read():
        config, deltas = read_adapter(tmp_path)
        header = json.loads((tmp_path / "adapter_config.json").read_bytes())
        for entry in header["modules"].values():
            entry.setdefault("experts", None)  # written only if there are any
        assert {name: header[name] for name in asdict(config)} == asdict(config)
        assert deltas.keys() == whole.keys()
        for name, delta in deltas.items():
            assert all(torch.equal(getattr(delta, part), getattr(whole[name], part)) for part in ("cols", "A", "B"))

    change = mutate_json if name.endswith("json") else mutate

    # A name or shape in the config that the tensors contradict is an error of the tensors' file.
    def named():
        try:
            read()
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if str(tmp_path) in str(error) else "no name") from error

    refused, _ = sweep(1250, tmp_path / name, change, named)
    assert refused > 300


@pytest.mark.parametrize("name", ["run.json", "log.json", "datasheet.json", "skipped.jsonl", "after.jsonl"])
def test_broken_run_folders(tmp_path, name):
    run, drawn = write_run(tmp_path / "run"), []

    def read():
        folder = read_run(run)
        if len(drawn) < 2 and random.Random(name).random() < 0.5:
            drawn.append(render([folder]))

    refused, _ = sweep(400, run / name, lambda data, rng: mutate_json(data, rng, name.endswith("l")), read)
    assert refused > 100 or name == "run.json"


def test_broken_scores(tmp_path):
    path = tmp_path / "scores.safetensors"
    whole = score_columns(llama(), [batch()], lambda model, inputs: model(**inputs).loss)
    whole.save(path)

    def read():
        scores = ColumnScores.load(path)
        assert (scores.shapes, scores.method, scores.batches) == (whole.shapes, whole.method, whole.batches)
        assert all(torch.equal(scores.columns[name], column) for name, column in whole.columns.items())

    refused, _ = sweep(800, path, mutate, read)
    assert refused > 700


def test_broken_score_headers(tmp_path):
    """The digest is updated, so that the checks behind it run."""
    path = tmp_path / "scores.safetensors"
    score_columns(llama(), [batch()], lambda model, inputs: model(**inputs).loss).save(path)

    def change(data, rng):
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        text = header["__metadata__"]["rbfast"].encode()
        metadata = {"rbfast": mutate_json(text, rng).decode("utf-8", "replace")}
        header["__metadata__"] = metadata
        written = json.dumps(header).encode()
        return seal(len(written).to_bytes(8, "little") + written + data[end:])

    def read():
        scores = ColumnScores.load(path)
        assert scores.columns.keys() == scores.shapes.keys()

    refused, _ = sweep(400, path, change, read)
    assert refused > 100


@pytest.fixture
def store(tmp_path):
    """A folder with the log-probs of two examples, and the examples."""
    rng, examples = np.random.default_rng(0), [encode(trace, TOKENIZER) for trace in TRACES]
    with SignalStore(tmp_path, "teacher", 4, len(TOKENIZER)) as store:
        for example in examples:
            rows = np.flatnonzero(example.labels != -100)
            ids = rng.integers(0, len(TOKENIZER), (len(rows), 4))
            store.add(example, rows, ids, np.log(np.full(ids.shape, 0.2)))
    return tmp_path, examples


def read_store(folder, whole=None):
    examples = [encode(trace, TOKENIZER) for trace in TRACES]
    SignalStore.open(folder).fill(examples)
    for example in examples:
        if example.teacher_rows is not None and len(example.teacher_rows):
            assert example.teacher_rows.max() < len(example.labels)
            assert example.teacher_ids.min() >= 0 and example.teacher_ids.max() < len(TOKENIZER)
            assert np.exp(example.teacher_logprobs.astype(float)).sum(1).max() <= 1.002
    found = [(e.teacher_rows.tolist(), e.teacher_ids.tolist()) for e in examples if e.teacher_rows is not None]
    assert whole is None or found == whole
    return found


def test_broken_signals(store):
    folder, _ = store
    whole = read_store(folder)
    assert len(whole) == 2
    [shard] = folder.glob("*.safetensors")
    refused, _ = sweep(800, shard, mutate, lambda: read_store(folder, whole))
    assert refused > 700
    named = lambda: read_store(folder)  # noqa: E731
    refused, _ = sweep(400, folder / "signals.json", mutate_json, lambda: naming(folder, "signals.json", named))
    assert refused > 100


def naming(folder, name, read):
    """Any file of the folder may be named: a manifest that contradicts the shard is an error of the shard."""
    try:
        read()
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if str(folder) in str(error) else "no name") from error


def test_broken_signal_tensors(store):
    """The digest is updated, so that the checks behind it run."""
    folder, _ = store
    [shard] = folder.glob("*.safetensors")

    def change(data, rng):
        tensors = load(data)
        name = rng.choice(sorted(tensors))
        kind = rng.randrange(4)
        if kind == 0:
            tensors[name] = tensors[name].astype(rng.choice((np.int64, np.int8, np.float32, np.uint8)))
        elif kind == 1:
            tensors[name] = tensors[name][rng.randrange(3) :]
        elif kind == 2:
            del tensors[name]
        else:
            values = tensors[name].copy()
            values.flat[rng.randrange(values.size)] = rng.choice((0, 1, 250))
            tensors[name] = values
        return seal(save(tensors))

    refused, _ = sweep(600, shard, change, lambda: read_store(folder))
    assert refused > 300


def test_broken_evaluation_results(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    problems = [Problem("task", f"{n}?", str(n), {}) for n in range(3)]
    write = lambda self, model, tokenizer, some, size: [(p, [(Completion(p.answer, 2, False), ())]) for p in some]  # noqa: E731
    monkeypatch.setattr(Decoding, "write", write)
    evaluate(None, None, problems, keep=path)

    def read():
        results = evaluate(None, None, problems, keep=path)
        assert [result.problem for result in results] == problems
        assert all(isinstance(result.correct, bool) and isinstance(result.completion.text, str) for result in results)

    refused, _ = sweep(700, path, lambda data, rng: mutate_json(data, rng, lines=True), read)
    assert refused > 200


def test_broken_teacher_replies(tmp_path, monkeypatch):
    path = tmp_path / "replies.jsonl"
    reply = {"text": "Add.\n<answer>4</answer>", "thinking": "", "finish_reason": "stop", "logprobs": []}
    ask = lambda job: {"key": job.key, "prompt_tokens": 3, "completion_tokens": 2} | reply  # noqa: E731
    monkeypatch.setattr(Job, "ask", ask)
    questions = [Question(f"{n} + 1?") for n in range(3)]
    server = Server("http://127.0.0.1:9/v1", "m")
    teach(server, questions, tmp_path, concurrency=1)

    def read():
        taught = teach(server, questions, tmp_path, concurrency=1)
        assert len(taught.traces) + taught.failed == 3

    refused, _ = sweep(300, path, lambda data, rng: mutate_json(data, rng, lines=True), read)
    assert refused > 50


@pytest.mark.parametrize("name", ["problems.jsonl", "questions.jsonl"])
def test_broken_problems(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"problem": "2 + 2?", "answer": "4"}\n{"question": "3 + 3?", "answer": 6, "id": "b"}\n')
    read = (lambda: load_problems(str(path), None, 0)) if name == "problems.jsonl" else (lambda: read_questions(path))
    refused, _ = sweep(500, path, lambda data, rng: mutate_json(data, rng, lines=True), read)
    assert refused > 100


def test_broken_checkpoints(tmp_path):
    """A broken checkpoint after an intact one: the intact one is used, or the mutation changed nothing."""
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(random.Random(step).randbytes(500))
        write_digests(folder)
    newest = tmp_path / "checkpoints" / "checkpoint-4"
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}

    def read():
        checkpoint = last_checkpoint(tmp_path / "checkpoints")
        assert checkpoint.endswith("checkpoint-2") or (newest / "optimizer.pt").read_bytes() == whole["optimizer.pt"]

    with pytest.warns(UserWarning, match="resuming from"):
        for name in whole:
            sweep(500, newest / name, mutate_json if name.endswith("json") else mutate, read)


def test_broken_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "traces.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([trace.to_dict() for trace in TRACES]), path)
    refused, _ = sweep(300, path, mutate, lambda: read_traces(path))
    assert refused > 100


def test_curation_of_a_broken_pool_accounts_for_every_row(tmp_path):
    from rbfast.curation.curate import CurateConfig, curate

    pool, out = tmp_path / "pool.jsonl", tmp_path / "out"
    write_traces(pool, TRACES * 4)

    def read():
        shutil.rmtree(out, ignore_errors=True)
        result = curate([pool], out, CurateConfig(size=3))
        dropped = (out / "dropped.jsonl").read_bytes().count(b"\n")
        assert result.selected + dropped == len(list(read_rows(pool)))

    sweep(8, pool, lambda data, rng: mutate_json(data, rng, lines=True), read)
