"""A teacher's log-probs for traces, from every source, against the teacher's own softmax in fp64."""

import json
import math
import re
import time
import tracemalloc
from threading import Event, Timer
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from openai_server import serving
from safetensors.numpy import load
from tiny_models import llama
from tiny_tokenizers import byte_fallback, byte_level

from rbfast.cli.main import main
from rbfast.data.chat_template import format_prompt
from rbfast.data.encoding import IGNORE, collate, encode
from rbfast.data.signal_store import SignalStore
from rbfast.data.trace import Trace
from rbfast.loss.distill_loss import DistillLoss
from rbfast.loss.teacher_signal import TopK
from rbfast.models.student import packs
from rbfast.teacher import logprobs, server_logprobs
from rbfast.teacher.budget import FREE, Budget
from rbfast.teacher.client import Server, ServerError
from rbfast.teacher.logprobs import TokenizersDiffer, add_local_logprobs
from rbfast.teacher.prompt_scores import DIALECTS
from rbfast.teacher.reply_store import ReplyStore
from rbfast.teacher.server_logprobs import add_reply_logprobs, add_server_logprobs
from rbfast.teacher.solutions import Question, teach
from rbfast.utils.files import Journal

TEXTS = ["Add 12 and 30.\n12 + 30 = 42, é 😀.", "Then take 2 away.\n42 - 2 = 40.", "Count the 你好."]
TRACES = [
    Trace(f"Problem {i}?", text, str(i), plan="Add." if i == 0 else None, id=f"t{i}") for i, text in enumerate(TEXTS)
]
TOKENIZER = byte_level(*TEXTS)
OTHER = byte_fallback(*TEXTS)
K = 5


def teacher_model(tokenizer):
    return llama(vocab_size=len(tokenizer), max_position_embeddings=512).eval()


def store_at(path, tokenizer=TOKENIZER, k=K):
    return SignalStore(path, "tiny", k, len(tokenizer))


def filled_examples(store, traces=TRACES, tokenizer=TOKENIZER):
    examples = [encode(trace, tokenizer) for trace in traces]
    assert store.fill(examples) == []
    return examples


def exact_logprobs(model, ids):
    """log softmax fp64 [n, V] of a sequence."""
    with torch.no_grad():
        return model.double()(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def check_exact(model, examples, k=K):
    for example in examples:
        rows = np.flatnonzero(example.labels != IGNORE)
        assert example.teacher_rows.tolist() == rows.tolist()
        expected = exact_logprobs(model, example.input_ids)[rows].topk(k)
        torch.testing.assert_close(torch.tensor(example.teacher_logprobs), expected.values.float(), atol=1e-5, rtol=0)
        assert (torch.tensor(example.teacher_ids) == expected.indices).float().mean() > 0.99


def test_local_teacher_scores_every_trained_token(tmp_path):
    model = teacher_model(TOKENIZER)
    with store_at(tmp_path) as store:
        assert add_local_logprobs(model, TOKENIZER, TRACES, TOKENIZER, store) == []
    examples = filled_examples(SignalStore.open(tmp_path))
    check_exact(model, examples)
    batch = collate(examples)
    assert batch["teacher_ids"].dtype == torch.int64 and len(batch["teacher_rows"]) == len(batch["teacher_ids"])


@pytest.mark.parametrize("teacher_tokenizer", [TOKENIZER, OTHER], ids=["same", "other"])
def test_traces_scored_together_match_those_scored_alone(tmp_path, monkeypatch, teacher_tokenizer):
    model, forwards = teacher_model(teacher_tokenizer), []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    stored = []
    for name, tokens in (("alone", 1), ("together", 10**6)):
        monkeypatch.setattr(logprobs, "_TOKENS", tokens)
        with store_at(tmp_path / name) as store:
            packs(model)  # a few forward passes of its own, once
            forwards.clear()
            assert add_local_logprobs(model, teacher_tokenizer, TRACES, TOKENIZER, store, align=True) == []
        assert len(forwards) == (len(TRACES) if name == "alone" else 1)
        stored.append(filled_examples(SignalStore.open(tmp_path / name)))
    for alone, together in zip(*stored, strict=True):
        assert np.array_equal(alone.teacher_rows, together.teacher_rows)
        np.testing.assert_allclose(together.teacher_logprobs, alone.teacher_logprobs, atol=1e-5)
        assert (together.teacher_ids == alone.teacher_ids).mean() > 0.99  # ties may break either way


def test_trace_without_shared_tokens_does_not_stop_the_others(tmp_path, monkeypatch):
    read = logprobs._shared_tokens
    nothing = lambda t, s, task, reply: ([], []) if task.trace is TRACES[1] else read(t, s, task, reply)  # noqa: E731
    monkeypatch.setattr(logprobs, "_shared_tokens", nothing)
    with store_at(tmp_path) as store:
        [(trace, reason)] = add_local_logprobs(teacher_model(OTHER), OTHER, TRACES, TOKENIZER, store, align=True)
    assert trace is TRACES[1] and "share no token" in reason and len(SignalStore.open(tmp_path)) == 2


def test_teacher_with_a_larger_head_keeps_to_the_students_ids(tmp_path):
    model = llama(vocab_size=len(TOKENIZER) + 64)
    with store_at(tmp_path, k=len(TOKENIZER) + 64) as store:
        add_local_logprobs(model, TOKENIZER, TRACES, TOKENIZER, store)
    example = filled_examples(SignalStore.open(tmp_path))[0]
    assert example.teacher_ids.max() < len(TOKENIZER)
    mass = np.exp(example.teacher_logprobs.astype(np.float64)).sum(1)
    expected = exact_logprobs(model, example.input_ids)[example.teacher_rows][:, : len(TOKENIZER)].exp().sum(1)
    np.testing.assert_allclose(mass, expected.numpy(), atol=1e-5)  # the rest is the tail


@pytest.mark.parametrize("teacher_tokenizer", [TOKENIZER, OTHER], ids=["same", "other"])
def test_padding_rows_of_the_head_never_crowd_out_tokens(tmp_path, teacher_tokenizer):
    model = llama(vocab_size=len(teacher_tokenizer) + 64)
    hidden = []
    model.model.norm.register_forward_hook(lambda *given: hidden.append(given[2].detach()))
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.sign(torch.randn(model.config.hidden_size)) * 2)
        model.lm_head.weight[len(teacher_tokenizer) :] *= 5  # some padding rows are now likelier than any token
    with store_at(tmp_path) as store:
        assert add_local_logprobs(model, teacher_tokenizer, TRACES, TOKENIZER, store, align=True) == []
    logits = model.lm_head(hidden[-1])[0]
    assert logits.topk(K).indices.min(1).values.ge(len(teacher_tokenizer)).float().mean() > 0.5, (
        "padding rows must dominate for this test to mean much"
    )
    for example in filled_examples(SignalStore.open(tmp_path)):
        assert np.isfinite(example.teacher_logprobs).all() and example.teacher_logprobs.shape[1] == K
        if teacher_tokenizer is TOKENIZER:
            best = exact_logprobs(model, example.input_ids)[example.teacher_rows][:, : len(TOKENIZER)].topk(K)
            np.testing.assert_allclose(example.teacher_logprobs, best.values.numpy(), atol=1e-4)
            model.float()


def test_local_teacher_with_other_tokens_requires_align(tmp_path):
    model = teacher_model(OTHER)
    with store_at(tmp_path) as store:
        with pytest.raises(TokenizersDiffer, match="other tokens than the student's"):
            add_local_logprobs(model, OTHER, TRACES, TOKENIZER, store)
        assert add_local_logprobs(model, OTHER, TRACES, TOKENIZER, store, align=True) == []
    for example, trace in zip(filled_examples(SignalStore.open(tmp_path)), TRACES, strict=True):
        assert 0 < len(example.teacher_rows) < (example.labels != IGNORE).sum()
        check_aligned(model, example, trace)


def check_aligned(model, example, trace):
    """Each row of log-probs agrees with one row of the teacher's own softmax."""
    prompt = OTHER(format_prompt(trace.problem, OTHER), add_special_tokens=False).input_ids
    written = OTHER(trace.completion(), add_special_tokens=False).input_ids
    table = exact_logprobs(model, prompt + written)[len(prompt) - 1 :]
    sets = [set(np.round(row.numpy(), 4)) for row in table[: len(written)]]
    for values in example.teacher_logprobs:
        known = {round(float(v), 4) for v in values if v > -math.inf}
        assert any(all(min(abs(v - w) for w in row) < 2e-4 for v in known) for row in sets)


def test_scoring_resumes(tmp_path):
    model, calls = teacher_model(TOKENIZER), []
    with store_at(tmp_path) as store:
        add_local_logprobs(model, TOKENIZER, TRACES[:2], TOKENIZER, store)
    with store_at(tmp_path) as store:
        add_local_logprobs(model, TOKENIZER, TRACES, TOKENIZER, store, progress=lambda *done: calls.append(done))
    assert calls == [(1, 1)] and len(SignalStore.open(tmp_path)) == 3


def test_overlong_trace_is_refused_with_the_reason(tmp_path):
    with store_at(tmp_path) as store:
        refused = add_local_logprobs(teacher_model(TOKENIZER), TOKENIZER, TRACES, TOKENIZER, store, max_tokens=60)
    assert refused and "at most 60 tokens" in refused[0][1]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_server_logprobs_match_the_model(tmp_path, dialect):
    ascii_only = [trace for trace in TRACES if trace.completion().isascii()] if dialect == "echo" else TRACES
    model = teacher_model(TOKENIZER)
    with serving(model, TOKENIZER) as server, store_at(tmp_path) as store:
        server.faults = [429, "cut"]
        assert add_server_logprobs(server.client(), ascii_only, TOKENIZER, store, dialect=dialect) == []
        sent = len(server.requests)
        add_server_logprobs(server.client(), ascii_only, TOKENIZER, store, dialect=dialect)
        assert len(server.requests) == sent == len(ascii_only) + 2
    examples = filled_examples(SignalStore.open(tmp_path), ascii_only)
    if dialect != "echo":
        check_exact(model, examples)
    for example in examples:
        rows = torch.tensor(example.teacher_rows)
        table = exact_logprobs(model, example.input_ids)[rows]
        values = table.gather(1, torch.tensor(example.teacher_ids).long()).float()
        known = torch.tensor(example.teacher_logprobs) > -math.inf
        torch.testing.assert_close(torch.tensor(example.teacher_logprobs)[known], values[known], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_server_with_other_tokens_requires_align(tmp_path, dialect):
    ascii_trace = TRACES[1:2]
    with serving(teacher_model(OTHER), OTHER) as server, store_at(tmp_path) as store:
        with pytest.raises(TokenizersDiffer, match="align"):
            add_server_logprobs(server.client(), ascii_trace, TOKENIZER, store, dialect=dialect)
        assert add_server_logprobs(server.client(), ascii_trace, TOKENIZER, store, dialect=dialect, align=True) == []
    [example] = filled_examples(SignalStore.open(tmp_path), ascii_trace)
    assert 0 < len(example.teacher_rows) < (example.labels != IGNORE).sum()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_server_with_other_tokens_reads_earlier_turns(tmp_path, dialect):
    turns = ({"role": "user", "content": "Add 12."}, {"role": "assistant", "content": "To what?"})
    trace = Trace("To 30.", TEXTS[0], "42", system="Be brief.", turns=turns)
    with serving(teacher_model(OTHER), OTHER) as server, store_at(tmp_path) as store:
        add_server_logprobs(server.client(), [trace], TOKENIZER, store, dialect=dialect, align=True)
    [request] = server.requests
    prompt = request["text" if dialect == "sglang" else "prompt"]
    assert prompt.startswith("Be brief.\n\nAdd 12.\n\nTo what?\n\nTo 30.") and len(store) == 1


def test_trace_refused_by_a_server_does_not_stop_the_others(tmp_path):
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        server.faults, server.refusal_body = [400], b"the maximum context length is 64 tokens"
        [(trace, reason)] = add_server_logprobs(server.client(), TRACES, TOKENIZER, store, concurrency=1)
        assert trace == TRACES[0] and "maximum context length" in reason and len(store) == 2


def answering_logits(server, times):
    """Make a server's first `times` replies hold logits instead of log-probs."""
    answer, sent = server.complete, []

    def complete(body):
        reply = answer(body)
        sent.append(body)
        for entry in reply["choices"][0]["prompt_logprobs"][1:] if len(sent) <= times else ():
            for candidate in entry.values():
                candidate["logprob"] += 20.0
        return reply

    server.complete = complete


def test_logits_for_one_trace_do_not_stop_the_others(tmp_path):
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        answering_logits(server, 1)
        [(trace, reason)] = add_server_logprobs(server.client(), TRACES, TOKENIZER, store, concurrency=1)
    assert trace == TRACES[0] and "t0: " in reason and "are they logits" in reason and len(store) == 2


def test_logits_for_every_trace_stop_the_scoring(tmp_path):
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        answering_logits(server, 99)
        with pytest.raises(ServerError, match="are they logits"):
            add_server_logprobs(server.client(), TRACES * 9, TOKENIZER, store, concurrency=1)
        assert len(server.requests) < 9 and len(store) == 0


def test_nan_for_one_trace_does_not_stop_the_others(tmp_path, monkeypatch):
    def with_nan(*args):
        ids, values = top_k(*args)
        values[0] = math.nan  # in the first trace
        return ids, values

    top_k = logprobs._top_k
    monkeypatch.setattr(logprobs, "_top_k", with_nan)
    with store_at(tmp_path) as store:
        [(trace, reason)] = add_local_logprobs(teacher_model(TOKENIZER), TOKENIZER, TRACES, TOKENIZER, store)
    assert trace == TRACES[0] and "t0: " in reason and len(SignalStore.open(tmp_path)) == 2


def test_zero_concurrency_is_refused(tmp_path):
    with store_at(tmp_path) as store, pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        add_server_logprobs(Server("http://127.0.0.1:9/v1", "m"), TRACES, TOKENIZER, store, concurrency=0)


@pytest.mark.parametrize("status", [400, 401])
def test_refusal_of_every_trace_stops_the_scoring(tmp_path, status):
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        server.faults = [status] * 99
        with pytest.raises(ServerError, match=f"returned {status}"):
            add_server_logprobs(server.client(), TRACES * 9, TOKENIZER, store, concurrency=1)
        assert len(server.requests) < 9 and len(store) == 0


def test_refusals_do_not_stop_a_resumed_scoring(tmp_path):
    traces = [Trace(f"Problem {i}?", TEXTS[0], str(i), id=f"t{i}") for i in range(10)]
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        add_server_logprobs(server.client(), traces[:1], TOKENIZER, store)
        server.faults = [400] * 6
        refused = add_server_logprobs(server.client(), traces, TOKENIZER, store, concurrency=1)
    assert [trace for trace, _ in refused] == traces[1:7] and len(store) == 4


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), ServerError("it is gone", status=500)])
def test_pending_answers_are_kept_after_an_early_end(tmp_path, monkeypatch, fault):
    """The third of twelve traces fails while the second and the fourth are pending; then nothing more is sent."""
    traces = [Trace(f"Problem {i}?", TEXTS[0], str(i), id=f"t{i}") for i in range(12)]
    read, failed, started = server_logprobs._Reader.read, Event(), []

    def read_or_fail(reader, task):
        started.append(number := int(task.trace.answer))
        if number == 2:
            failed.set()
            raise fault
        if number in (1, 3, 4):
            assert failed.wait(60)
        return read(reader, task)

    monkeypatch.setattr(server_logprobs._Reader, "read", read_or_fail)
    with (
        serving(teacher_model(TOKENIZER), TOKENIZER) as server,
        store_at(tmp_path) as store,
        pytest.raises(type(fault)),
    ):
        add_server_logprobs(server.client(), traces, TOKENIZER, store, concurrency=3)
    assert len(SignalStore.open(tmp_path)) == len(started) - 1
    assert len(started) < len(traces)


def test_second_ctrl_c_drops_pending_answers_and_keeps_the_others(tmp_path, monkeypatch, capsys, ctrl_c):
    traces = [Trace(f"Problem {i}?", TEXTS[0], str(i), id=f"t{i}") for i in range(12)]
    read, released, pressed = server_logprobs._Reader.read, Event(), []

    def read_or_wait(reader, task):
        if task.trace.answer == "0":
            return read(reader, task)
        assert released.wait(10)

    def progress(done, total):
        pressed.append(time.monotonic())
        Timer(1.0, ctrl_c).start()
        ctrl_c()

    monkeypatch.setattr(server_logprobs._Reader, "read", read_or_wait)
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            add_server_logprobs(server.client(), traces, TOKENIZER, store, concurrency=3, progress=progress)
        assert not released.is_set() and 0.5 < time.monotonic() - pressed[0] < 8
        released.set()
    assert re.fullmatch("waiting for pending replies: [23]; press Ctrl-C again .*\n", capsys.readouterr().err)
    assert len(SignalStore.open(tmp_path)) == 1


@pytest.mark.parametrize(("dialect", "wanted"), [("vllm", "prompt_logprobs"), ("sglang", "input_top_logprobs")])
def test_server_that_scores_no_prompts_is_reported(tmp_path, dialect, wanted):
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        server.complete = server.generate = lambda body: {"choices": [{"text": "hello"}], "meta_info": {}}
        with pytest.raises(ServerError, match=f"sends no {wanted}: .*dialects: vllm, sglang, echo"):
            add_server_logprobs(server.client(), TRACES, TOKENIZER, store, dialect=dialect)


def test_server_without_generate_is_no_sglang(tmp_path):
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        server.faults = [404]
        with pytest.raises(ServerError, match=r"returned 404: .*needs SGLang's own /generate; dialects") as caught:
            add_server_logprobs(server.client(), TRACES, TOKENIZER, store, dialect="sglang", concurrency=1)
    assert caught.value.status == 404


def test_sglang_shows_texts_for_the_first_prompts_only(tmp_path):
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        assert add_server_logprobs(server.client(), TRACES, TOKENIZER, store, dialect="sglang", concurrency=1) == []
    assert [request["return_text_in_logprobs"] for request in server.requests] == [True, False, False]


def test_null_from_sglang_is_no_probability(tmp_path):
    model = teacher_model(TOKENIZER)
    example = encode(TRACES[0], TOKENIZER)
    label = int(example.labels[example.labels != IGNORE][0])
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(model.config.hidden_size, len(TOKENIZER))
        model.lm_head.bias[label] = -torch.inf
    with serving(model, TOKENIZER) as server, store_at(tmp_path) as store:
        assert add_server_logprobs(server.client(), TRACES[:1], TOKENIZER, store, dialect="sglang") == []
    [example] = filled_examples(SignalStore.open(tmp_path), TRACES[:1])
    assert label not in example.teacher_ids[np.isfinite(example.teacher_logprobs)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_logprobs_of_an_unknown_shape_are_reported(tmp_path, dialect):
    pairs, as_of_chats = [[5, -0.1]] * len(encode(TRACES[1], TOKENIZER).input_ids), {"content": [{"token": "1"}]}
    with serving(teacher_model(TOKENIZER), TOKENIZER) as server, store_at(tmp_path) as store:
        server.complete = lambda body: {"choices": [{"prompt_logprobs": pairs, "logprobs": as_of_chats}]}
        server.generate = lambda body: {"meta_info": {"input_token_logprobs": pairs, "input_top_logprobs": pairs}}
        with pytest.raises(ServerError, match=f"not send log-probs in the format of --dialect {dialect}"):
            add_server_logprobs(server.client(), TRACES[1:2], TOKENIZER, store, dialect=dialect)


@pytest.mark.parametrize("served", [TOKENIZER, OTHER], ids=["same tokens", "other tokens"])
def test_logprobs_of_a_reply_reach_its_trace(tmp_path, served):
    reply = "<plan>Add.</plan>\nAdd 12 and 30.\n12 + 30 = 42.\n\n<answer>42</answer>"
    with serving(teacher_model(served), served, script=lambda problem: reply) as server:
        taught = teach(server.client(), [Question("12 + 30?")], tmp_path / "taught", top_logprobs=K)
    [trace], [record] = taught.traces, taught.replies
    with store_at(tmp_path / "signals") as store:
        assert add_reply_logprobs(trace, record, TOKENIZER, store) is None
    [example] = filled_examples(SignalStore.open(tmp_path / "signals"), [trace])
    labels = example.labels[example.teacher_rows]
    if served is TOKENIZER:
        # The reasoning and the answer, which the reply and the trace spell alike, but not the plan.
        assert TOKENIZER.decode(labels) == "Add 12 and 30.\n12 + 30 = 42.\n\n<answer>42</answer>"
    sent = np.array([value for _, top in record["logprobs"] for _, value in top], dtype=np.float32)
    kept = example.teacher_logprobs[example.teacher_logprobs > -math.inf]
    assert len(labels) > 5 and np.isin(kept, sent).all()


def test_stored_logprobs_take_no_memory(tmp_path):
    tokens = [["a", [[f"token {i}", -i / 7] for i in range(20)]]] * 1000
    replies = {f"key {i}": [[str(i), tokens[0][1]], *tokens[1:]] for i in range(30)}
    fields = {"text": "", "thinking": "", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
    record = {**fields, "key": "", "logprobs": []}
    tracemalloc.start()
    try:
        store = ReplyStore(tmp_path / "replies.jsonl", Budget(FREE, None, None), [])
        for key, logprobs in replies.items():
            store.add(record | {"key": key, "logprobs": list(logprobs)})
        again = ReplyStore(tmp_path / "replies.jsonl", Budget(FREE, None, None), [])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2**20  # a single reply takes more
    for one in (store, again):
        assert {key: list(one.get(SimpleNamespace(key=key))["logprobs"]) for key in replies} == replies


def test_text_of_a_stored_reply_is_in_memory_once(tmp_path):
    thoughts = {f"key {i}": f"{i}" * 2**16 for i in range(9)}
    fields = {"text": "", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1, "logprobs": []}
    records = [fields | {"key": key, "thinking": text, "message": {"a": text}} for key, text in thoughts.items()]
    Journal(tmp_path / "replies.jsonl").append(records)
    tracemalloc.start()
    try:
        store = ReplyStore(tmp_path / "replies.jsonl", Budget(FREE, None, None), [])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.2 * len(thoughts) * 2**16
    assert {key: store.get(SimpleNamespace(key=key))["thinking"] for key in thoughts} == thoughts


@pytest.mark.parametrize(
    ("text", "thinking", "written"),
    [
        ("Add.\n<answer>42</answer>", "", "Add.\n<answer>42</answer><|im_end|>"),
        ("So <answer>42</answer>", "Add.", "<think>\nAdd.\n</think>\n\nSo <answer>42</answer><|im_end|>"),
    ],
    ids=["end of turn", "thought"],
)
def test_reply_logprobs_may_include_tokens_outside_its_text(tmp_path, text, thinking, written):
    spelled = [bytes([byte]).decode("latin-1") for byte in written.encode()]
    reply = {"text": text, "thinking": thinking, "logprobs": [[letter, [[letter, -0.1]]] for letter in spelled]}
    trace, tokenizer = Trace("12 + 30?", "Add.", "42"), byte_level()
    with store_at(tmp_path, tokenizer) as store:
        assert add_reply_logprobs(trace, reply, tokenizer, store) is None
    [example] = filled_examples(SignalStore.open(tmp_path), [trace], tokenizer)
    assert tokenizer.decode(example.labels[example.teacher_rows]).startswith("Add.\n")


def test_reply_without_logprobs_is_refused(tmp_path):
    reply = {"text": "Add.\n\n<answer>1</answer>", "logprobs": []}
    with store_at(tmp_path) as store:
        assert "no log-probs" in add_reply_logprobs(Trace("1?", "Add.", "1"), reply, TOKENIZER, store)


def test_reply_with_logits_is_refused(tmp_path):
    spelled = [bytes([byte]).decode("latin-1") for byte in b"Add.\n\n<answer>1</answer>"]
    reply = {"text": "Add.\n\n<answer>1</answer>", "logprobs": [[letter, [[letter, 3.0]]] for letter in spelled]}
    tokenizer = byte_level()
    with store_at(tmp_path, tokenizer) as store:
        assert "are they logits" in add_reply_logprobs(Trace("1?", "Add.", "1"), reply, tokenizer, store)


def test_command_reports_why_replies_gave_no_logprobs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rbfast.models.student.load_tokenizer", lambda student: TOKENIZER)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"problem": f"{i}?", "id": f"q{i}"}) + "\n" for i in range(7)))
    with serving(teacher_model(TOKENIZER), TOKENIZER, script=lambda problem: "Add.\n<answer>1</answer>") as server:
        chat = server.chat
        server.chat = lambda body: chat(body | {"logprobs": False})
        url = f"http://127.0.0.1:{server.port}/v1"
        words = ["teach", "tiny", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--server", url]
        assert main([*words, "--student", "tiny", "-k", str(K)]) == 0
    printed = capsys.readouterr()
    assert "signals: 0" in printed.out
    reasons = [line for line in printed.err.splitlines() if line.startswith("no log-probs: ")]
    assert reasons == [
        *(f"no log-probs: q{i}/0: the reply has no log-probs of the reasoning" for i in range(5)),
        "no log-probs: 2 more",
    ]


# The store


def test_store_accepts_only_its_own_traces_and_settings(tmp_path):
    with store_at(tmp_path) as store:
        add_local_logprobs(teacher_model(TOKENIZER), TOKENIZER, TRACES, TOKENIZER, store)
    changed = Trace(TRACES[0].problem, TRACES[0].reasoning + "!", TRACES[0].answer)
    missing = SignalStore.open(tmp_path).fill([encode(trace, TOKENIZER) for trace in (TRACES[0], changed)])
    assert len(missing) == 1
    later = encode(TRACES[0], TOKENIZER)  # the same tokens, trained from a later position on
    later.labels[np.flatnonzero(later.labels != IGNORE)[0]] = IGNORE
    assert SignalStore.open(tmp_path).fill([later]) == [later]
    for other in (dict(k=K + 1), dict(tokenizer=OTHER)):
        with pytest.raises(ValueError, match="choose another folder"):
            store_at(tmp_path, **other)
    with pytest.raises(ValueError, match="holds signals with teacher 'tiny', expected 'huge'"):
        SignalStore(tmp_path, "huge", K, len(TOKENIZER))
    store_at(tmp_path / "empty").flush()
    assert store_at(tmp_path / "empty", k=K + 1).k == SignalStore.open(tmp_path / "empty").k == K + 1


def test_signals_that_a_full_disk_refused_are_written_later(tmp_path, monkeypatch):
    example, store = encode(TRACES[0], TOKENIZER), store_at(tmp_path)
    store.add(example, np.array([0]), np.array([[1]]), np.array([[-0.5]]))
    with monkeypatch.context() as patch:
        patch.setattr("rbfast.data.signal_store.atomic_write", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            store.flush()
    store.flush()
    assert example in SignalStore.open(tmp_path)


def test_each_shard_is_read_once_in_any_order(tmp_path, monkeypatch):
    examples = [encode(trace, TOKENIZER) for trace in TRACES * 2]
    for number, example in enumerate(examples):
        example.input_ids[0] = number  # makes every example unique
    with store_at(tmp_path) as store:
        for number, example in enumerate(examples):
            rows = np.flatnonzero(example.labels != IGNORE)
            store.add(example, rows, np.full((len(rows), 1), number), np.full((len(rows), 1), -0.5))
            if number % 2:
                store.flush()
    for example in examples:
        example.teacher_ids = None
    assert store.fill(examples) == []  # the store that wrote the shards has their index
    assert [int(example.teacher_ids[0, 0]) for example in examples] == list(range(6))
    store, read = SignalStore.open(tmp_path), []
    monkeypatch.setattr("rbfast.data.signal_store.load", lambda data: read.append(data) or load(data))
    mixed = [examples[number] for number in (0, 5, 2, 1, 4, 3)]
    other = encode(TRACES[0], TOKENIZER)
    assert store.fill([other, *mixed]) == [other] and len(read) <= 3
    assert [int(example.teacher_ids[0, 0]) for example in examples] == list(range(6))
    assert all(example.teacher_logprobs.base is None for example in examples)


def test_opening_a_store_reads_only_its_index(tmp_path, monkeypatch):
    with store_at(tmp_path) as store:
        add_local_logprobs(teacher_model(TOKENIZER), TOKENIZER, TRACES, TOKENIZER, store)
    read = []
    monkeypatch.setattr("rbfast.data.signal_store.load", lambda data: read.append(data) or load(data))
    store = SignalStore.open(tmp_path)
    assert len(store) == 3 and all(encode(trace, TOKENIZER) in store for trace in TRACES) and not read
    [shard] = tmp_path.glob("*.safetensors")
    data = shard.read_bytes()
    keys = data.index(load(data)["keys"].tobytes())
    for at, error in ((keys, "its index does not match its name"), (keys - 1, "has changed since it was written")):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=f"not a complete shard.*{error}"):
            filled_examples(SignalStore.open(tmp_path))


def test_broken_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a folder that `rbfast teach --score` wrote"):
        SignalStore.open(tmp_path / "absent")
    with store_at(tmp_path) as store:
        add_local_logprobs(teacher_model(TOKENIZER), TOKENIZER, TRACES, TOKENIZER, store)
    [shard] = tmp_path.glob("*.safetensors")
    whole = shard.read_bytes()
    for broken in (whole[:-5], whole[:40], b"", b"x" * 100):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=r"signals-\w+\.safetensors: not a complete shard"):
            SignalStore.open(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "signals.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"signals\.json"):
        SignalStore.open(tmp_path)


def test_two_stores_of_one_folder_keep_each_others_shards(tmp_path):
    examples, row = [encode(trace, TOKENIZER) for trace in TRACES[:2]], np.array([3])
    stores = [SignalStore(tmp_path, "tiny", 1, len(TOKENIZER)) for _ in examples]
    for example, store in zip(examples, stores, strict=True):
        store.add(example, row, np.array([[5]]), np.array([[-0.5]]))
        store.flush()
    assert SignalStore.open(tmp_path).fill(examples) == []


def test_ids_above_16_bits_are_kept(tmp_path):
    example, row, last = encode(TRACES[0], TOKENIZER), np.array([3]), 2**16
    with SignalStore(tmp_path, "tiny", 1, last + 1) as store:
        store.add(example, row, np.array([[last]]), np.array([[-0.5]]))
    assert SignalStore.open(tmp_path).fill([example]) == [] and example.teacher_ids.tolist() == [[last]]


def test_logits_and_nan_are_refused(tmp_path):
    example = encode(TRACES[0], TOKENIZER)
    with store_at(tmp_path) as store:
        for values in ([[3.0, 1.0]], [[math.nan, -1.0]]):
            with pytest.raises(ValueError, match="are they logits"):
                store.add(example, np.array([1]), np.array([[1, 2]]), np.array(values))


def test_stored_token_takes_a_few_hundred_bytes(tmp_path):
    with store_at(tmp_path, k=32) as store:
        add_local_logprobs(teacher_model(TOKENIZER), TOKENIZER, TRACES * 1, TOKENIZER, store)
    tokens = sum((encode(trace, TOKENIZER).labels != IGNORE).sum() for trace in TRACES)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size / tokens < 32 * 6 + 4 + 20


def test_fp16_logprobs_are_too_coarse_near_the_teacher():
    """The gradient error from rounded teacher log-probs, for a student 0.02 nats from its teacher, in fp64."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (64, 4096))
    logits = hidden @ (0.4 * weight).T
    logits += 0.02 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    top = logits.log_softmax(-1).topk(32)

    def gradient(logprobs):
        leaf = hidden.clone().requires_grad_()
        labels = torch.zeros(len(leaf), dtype=torch.int64)
        DistillLoss()(leaf, 0.4 * weight, labels, TopK(top.indices, logprobs.double())).loss.backward()
        return leaf.grad

    exact_logprobs = gradient(top.values)
    errors = [
        ((gradient(top.values.to(d)) - exact_logprobs).norm() / exact_logprobs.norm()).item()
        for d in (torch.float32, torch.half)
    ]
    assert errors[0] < 1e-4 and 0.01 < errors[1] < 0.05
