"""On-policy rounds with a teacher on a server, which must match a local teacher."""

import json
import math

import numpy as np
import pytest
import torch
from openai_server import serving
from tiny_models import llama
from tiny_rounds import QUESTIONS, WRITING, read_samples, run, teacher
from tiny_runs import TOKENIZER, student

from rbfast.data.encoding import IGNORE
from rbfast.data.signal_store import SignalStore
from rbfast.on_policy import rounds as module
from rbfast.on_policy import served_teacher
from rbfast.on_policy.samples import Writing
from rbfast.on_policy.served_teacher import ServedTeacher
from rbfast.teacher import client
from rbfast.teacher.client import Server, ServerError
from rbfast.teacher.logprobs import TokenizersDiffer
from rbfast.teacher.prompt_scores import BY_IDS
from rbfast.training.arguments import DeviceArguments
from rbfast.training.trainer import DistillTrainer


@pytest.fixture
def server():
    with serving(teacher(), TOKENIZER) as running:
        yield running


def losses(ran):
    return [entry["loss"] for entry in ran.log_history]


def test_server_with_all_candidates_matches_a_local_teacher(tmp_path, server):
    beside = run(tmp_path / "beside")
    all_but_one = ServedTeacher(server.client(), k=len(TOKENIZER) - 1, concurrency=2)
    served = run(tmp_path / "served", teacher=all_but_one)
    assert losses(served) == pytest.approx(losses(beside), rel=1e-3)
    for name, value in beside.adapter.state_dict().items():
        torch.testing.assert_close(served.adapter.state_dict()[name], value, rtol=1e-2, atol=1e-4)
    settings = json.loads((tmp_path / "served/run.json").read_text())
    assert settings["teacher"] == "tiny" and settings["on_policy"]["top_k"] == len(TOKENIZER) - 1


@pytest.mark.parametrize("dialect", BY_IDS)
def test_every_written_token_is_among_its_candidates(tmp_path, server, monkeypatch, dialect):
    compute, seen = DistillTrainer.compute_loss, []

    def watch(self, model, inputs, *args, **kwargs):
        seen.append(inputs)
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", watch)
    run(tmp_path, teacher=ServedTeacher(server.client(), k=2, dialect=dialect))
    model = teacher()
    for batch in seen:
        rows = (batch["labels"][0] != IGNORE).nonzero().squeeze(1)
        assert batch["teacher_rows"].tolist() == rows.tolist() and len(batch["text_rows"]) == 0
        labels = batch["labels"][0, rows]
        ids, logprobs = batch["teacher_ids"], batch["teacher_logprobs"]
        assert ids.shape[1] == 3 and (ids == labels[:, None]).any(1).all()
        start = 0
        for length in batch["lengths"]:
            part = slice(start, start + length)
            start += length
            exact = model(batch["input_ids"][:, part]).logits[0].log_softmax(-1)
            for row in [row for row in rows.tolist() if part.start <= row < part.stop]:
                at = rows.tolist().index(row)
                kept = logprobs[at].isfinite()
                torch.testing.assert_close(
                    logprobs[at, kept], exact[row - part.start, ids[at, kept]], atol=1e-4, rtol=0
                )


@pytest.mark.parametrize("cut_at", [0, 3])
def test_interrupted_run_repeats_no_request_and_resumes_bitwise(tmp_path, server, monkeypatch, cut_at):
    taught = ServedTeacher(server.client(), k=4)
    whole = run(tmp_path / "whole", teacher=taught)
    prompts = [json.dumps(request["prompt"]) for request in server.requests]
    server.requests.clear()
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", monkeypatch, cut_at, teacher=taught)
    resumed = run(tmp_path / "cut", teacher=taught)
    assert sorted(json.dumps(request["prompt"]) for request in server.requests) == sorted(prompts)
    for name in ("log.json", "samples/round-003.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    for name, value in whole.adapter.state_dict().items():
        assert torch.equal(value, resumed.adapter.state_dict()[name])
    with pytest.raises(ValueError, match="its on_policy is"):
        run(tmp_path / "cut", teacher=ServedTeacher(server.client(), k=5))
    server.requests.clear()
    assert run(tmp_path / "cut", teacher=taught).found and not server.requests


def test_server_failure_keeps_samples_and_scores(tmp_path, server):
    server.faults = [None] * 3 + [500] * 4
    one_by_one = ServedTeacher(server.client(), k=4, concurrency=1)
    with pytest.raises(ServerError, match="returned 500"):
        run(tmp_path, teacher=one_by_one)
    assert len((tmp_path / "samples/round-001.jsonl").read_text().splitlines()) == 4
    kept = len(SignalStore.open(tmp_path / "samples/signals/round-001"))
    assert kept in (2, 3)  # two completions after the check, and perhaps the pending one
    server.requests.clear()
    assert not run(tmp_path, teacher=one_by_one).found
    assert len(server.requests) == 3 * 4 - kept


def test_server_that_scores_nothing_ends_the_run(tmp_path, server):
    server.faults, server.refusal_body = [None] + [400] * 4, b'{"error": "too long"}'
    with pytest.raises(ServerError, match=r"scored none of the completions of a round: .*too long"):
        run(tmp_path, teacher=ServedTeacher(server.client(), k=4))
    server.faults = []
    assert not run(tmp_path, teacher=ServedTeacher(server.client(), k=4)).found


def test_failed_check_does_not_tie_the_folder_to_its_settings(tmp_path, server):
    server.faults, server.refusal_body = [400], b'{"error": "too many logprobs"}'
    with pytest.raises(ServerError, match="too many logprobs"):
        run(tmp_path, teacher=ServedTeacher(server.client(), k=30))
    run(tmp_path, teacher=ServedTeacher(server.client(), k=4))


def test_prompt_of_one_token_is_enough_for_the_check(server):
    ServedTeacher(server.client(), k=4).check([5], TOKENIZER)
    assert server.requests[-1]["prompt"] == [5, 5]


@pytest.mark.parametrize("is_listed", [False, True])
def test_token_without_candidates_is_not_trained_on(tmp_path, server, monkeypatch, is_listed):
    compute, complete, trained = DistillTrainer.compute_loss, server.complete, []

    def without_the_last(body):
        reply = complete(body)
        tops = reply["choices"][0]["prompt_logprobs"]
        tops[-1] = {name: entry | {"logprob": -math.inf} for name, entry in tops[-1].items()} if is_listed else {}
        return reply

    def watch(self, model, inputs, *args, **kwargs):
        trained.append((inputs["labels"] != IGNORE).sum().item())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", watch)
    server.complete = without_the_last
    ran = run(tmp_path, teacher=ServedTeacher(server.client(), k=4))
    records = [json.loads(line) for text in read_samples(tmp_path).values() for line in text.splitlines()]
    assert sum(trained) == sum(len(record["ids"]) - 1 for record in records) and min(losses(ran)) > 0


def test_equal_completions_are_requested_once(tmp_path, server):
    greedy = Writing(max_new_tokens=4, temperature=0.0)
    run(tmp_path, questions=[QUESTIONS[0]] * 6, writing=greedy, teacher=ServedTeacher(server.client(), k=4))
    prompts = [tuple(request["prompt"]) for request in server.requests[1:]]
    assert len(prompts) == 3  # one in each round


def test_completion_refused_by_the_server_is_not_trained_on(tmp_path, server, monkeypatch):
    compute, trained = DistillTrainer.compute_loss, []

    def watch(self, model, inputs, *args, **kwargs):
        trained.append((inputs["labels"] != IGNORE).sum().item())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", watch)
    server.faults, server.refusal_body = [None, 400], b'{"error": "too long"}'
    with pytest.warns(UserWarning, match="round 1 of 3: 1 of 4 completions are not trained on.*too long"):
        run(tmp_path, teacher=ServedTeacher(server.client(), k=4, concurrency=1))
    records = [json.loads(line) for text in read_samples(tmp_path).values() for line in text.splitlines()]
    refused = next(record for record in records if record["number"] == 0)  # requested first
    assert sum(trained) == sum(len(record["ids"]) for record in records) - len(refused["ids"])


def test_unsuitable_server_is_refused_before_the_student_writes(tmp_path, server):
    server.complete = lambda body: {"choices": [{"text": "hello"}]}
    with pytest.raises(ServerError, match="sends no prompt_logprobs"):
        run(tmp_path / "plain", teacher=ServedTeacher(server.client()))
    with serving(teacher(), TOKENIZER) as foreign, pytest.raises(TokenizersDiffer, match="the tokenizers differ"):
        foreign.text = "other {}".format
        run(tmp_path / "foreign", teacher=ServedTeacher(foreign.client()))
    server.complete = type(server).complete.__get__(server)
    ranked = server._ranked
    server._ranked = lambda *row: {f"token {number}": entry for number, entry in ranked(*row).items()}
    with pytest.raises(ServerError, match="TypeError: expected token ids, got str 'token "):
        run(tmp_path / "named", teacher=ServedTeacher(server.client()))
    for name in ("plain", "foreign", "named"):
        assert not list((tmp_path / name).glob("samples/round-*"))


def test_a_server_may_show_a_whole_character_for_the_token_that_ends_it(tmp_path, server):
    text = server.text
    server.text = lambda number: text(number).replace("\ufffd", "é")
    run(tmp_path, teacher=ServedTeacher(server.client(), k=4))
    records = [json.loads(line) for lines in read_samples(tmp_path).values() for line in lines.splitlines()]
    drawn = [token for record in records for token in record["ids"]]
    assert any("\ufffd" in text(token) for token in drawn)


def test_processes_share_the_requests(tmp_path, server, monkeypatch):
    run(tmp_path / "run", teacher=ServedTeacher(server.client(), k=4))
    rounds = module._Rounds(
        module.Writer(student(), TOKENIZER, module.instruction_of(TOKENIZER, module.DEFAULTS)),
        [QUESTIONS[:4]], WRITING, tmp_path / "other", 0, None,
    )  # fmt: skip
    rounds.start(0, lambda _: None)
    server.requests.clear()
    monkeypatch.setattr(served_teacher, "process_count", lambda: 2)
    for index in (1, 0):
        monkeypatch.setattr(served_teacher, "process_index", lambda index=index: index)
        ServedTeacher(server.client(), k=4).correct(rounds.examples, TOKENIZER, tmp_path / "signals", lambda *_: None)
        if index == 1:
            assert len(server.requests) == 2
            assert [np.any(example.labels != IGNORE) for example in rounds.examples] == [False, True, False, True]
            rounds.start(0, lambda _: None)
    assert len(server.requests) == 4 and all(np.any(example.labels != IGNORE) for example in rounds.examples)


def test_processes_wait_for_all_retries_of_a_request(tmp_path):
    usual = Server("http://localhost/v1", "any")
    wait = DeviceArguments(str(tmp_path), report_to="none").ddp_timeout
    assert wait > (1 + usual.retries) * (usual.timeout + client._LONGEST_PAUSE)


@pytest.mark.parametrize("field", ["k", "concurrency"])
def test_numbers_below_one_are_refused(server, field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        ServedTeacher(server.client(), **{field: 0})


def test_student_may_sample_a_head_row_without_a_token(tmp_path, server):
    rows = len(TOKENIZER) + 40

    def wide():
        return llama(vocab_size=rows, max_position_embeddings=256)

    with serving(wide(), TOKENIZER) as padded:
        padded.text = lambda number: "" if number >= len(TOKENIZER) else type(padded).text(padded, number)
        taught = ServedTeacher(padded.client(), k=4)
        ran = run(tmp_path, model=wide(), teacher=taught, writing=Writing(max_new_tokens=30))
    drawn = [
        token
        for text in read_samples(tmp_path).values()
        for line in text.splitlines()
        for token in json.loads(line)["ids"]
    ]
    assert max(drawn) >= len(TOKENIZER) and np.isfinite(losses(ran)).all()


def test_dialect_without_token_ids_is_refused():
    with pytest.raises(ValueError, match="dialect must be vllm or sglang for on-policy rounds, got 'echo'"):
        ServedTeacher(Server("http://localhost/v1", "m"), dialect="echo")
