"""On-policy rounds: training on the student's own text, convergence to the teacher, and exact resumption."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import llama
from tiny_rounds import CONFIG, QUESTIONS, WRITING, read_samples, run
from tiny_runs import TOKENIZER, TRACES, student
from tiny_tokenizers import byte_fallback

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.chat_template import format_prompt
from rbfast.data.encoding import IGNORE, NO_ROLE
from rbfast.data.instruction import instruction_named
from rbfast.data.spans import ROLES
from rbfast.on_policy import rounds as module
from rbfast.on_policy import samples
from rbfast.on_policy.rounds import DEFAULTS, distill_on_policy, summary
from rbfast.on_policy.samples import Writer, Writing, example_of_sample, write_samples
from rbfast.report.read_run import read_run
from rbfast.teacher.jobs import Question
from rbfast.training.distill import distill
from rbfast.training.distill_config import DistillConfig
from rbfast.training.objective import Objective
from rbfast.training.trainer import DistillTrainer

INSTRUCTION = instruction_named("answer")


def test_each_round_is_written_by_the_updated_student_and_trained(tmp_path, monkeypatch):
    seen = []
    start = module._Rounds.start

    def spy(self, number, progress):
        records, refused = start(self, number, progress)
        seen.append((number, list(self.examples), records))
        return records, refused

    step, trained = DistillTrainer.compute_loss, []

    def watch(self, model, inputs, *args, **kwargs):
        trained.append((self.state.global_step, inputs["labels"][inputs["labels"] != IGNORE].tolist()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(module._Rounds, "start", spy)
    monkeypatch.setattr(DistillTrainer, "compute_loss", watch)
    ran = run(tmp_path / "run", learning_rate=0.5)  # large, so that the samples soon change
    assert [number for number, *_ in seen] == [0, 1, 2]
    for number, _, records in seen:
        tokens = [token for at, labels in trained if at // 2 == number for token in labels]
        assert sorted(tokens) == sorted(token for record in records for token in record["ids"])
    assert len(read_samples(tmp_path / "run")) == 3
    problems = [record["problem"] for _, _, records in seen for record in records]
    assert sorted(problems) == sorted(question.text for question in QUESTIONS)  # one pass over all of them
    for _, examples, records in seen:
        for example, record in zip(examples, records, strict=True):
            kept = example.labels != IGNORE
            assert example.labels[kept].tolist() == record["ids"]
            assert example.input_ids[-len(record["ids"]) :].tolist() == record["ids"]
            assert ((example.roles != NO_ROLE) == kept).all()
    losses = [entry["loss"] for entry in ran.log_history]
    assert ran.traces == 12 and not ran.found
    assert [entry["step"] for entry in ran.log_history] == [*range(1, 7)] and min(losses) >= 0
    # The base itself writes the first round, but not the last one.
    base = Writer(student(), TOKENIZER, instruction_named("none"))
    for number, same in ((0, True), (2, False)):
        questions = [Question(record["problem"]) for record in seen[number][2]]
        again = write_samples(base, questions, WRITING, tmp_path / f"{number}", f"0:{number}", lambda *_: None)
        assert (again == seen[number][2]) is same


def test_student_approaches_its_teacher(tmp_path):
    taught = student()
    shape = dict(density=0.2, rank=3, learning_rate=3e-2, instruction="none")
    distill(taught, TOKENIZER, TRACES, tmp_path / "teacher", DistillConfig(epochs=6.0, **shape), True).adapter.merge()
    config = DistillConfig(objective=DEFAULTS.objective, epochs=12.0, batch_size=6, **shape)
    writing = replace(WRITING, max_new_tokens=12)
    ran = distill_on_policy(
        student(), TOKENIZER, QUESTIONS, tmp_path / "run", config, True, teacher=taught, rounds=12, writing=writing
    )
    losses = [entry["loss"] for entry in ran.log_history]
    assert np.mean(losses[-3:]) < 0.3 * np.mean(losses[:3])


def test_interrupted_run_resumes_bitwise(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    for cut_at in (0, 2, 3):  # before the first step, between two rounds, within one
        folder, model = tmp_path / f"cut{cut_at}", student()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(RuntimeError, match="power cut"):
            run(folder, monkeypatch, cut_at, model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        resumed = run(folder, model=model)
        assert read_samples(folder) == read_samples(tmp_path / "whole")
        assert (folder / "log.json").read_text() == (tmp_path / "whole/log.json").read_text()
        for name, value in whole.adapter.state_dict().items():
            assert torch.equal(value, resumed.adapter.state_dict()[name])
    finished = run(tmp_path / "whole")
    assert finished.found and finished.log_history == whole.log_history


@pytest.mark.parametrize("cut", ["while the second round is written", "after the last checkpoint"])
def test_killed_process_resumes_bitwise(tmp_path, monkeypatch, cut):
    def stop(*args, **kwargs):
        raise RuntimeError("power cut")

    whole = run(tmp_path / "whole", save_steps=99)  # each round ends with a checkpoint anyway
    with monkeypatch.context() as patch:
        if cut == "after the last checkpoint":
            patch.setattr("rbfast.training.distill._save", stop)
        else:
            write, calls = samples._write, []

            def write_or_stop(*args):
                calls.append(args)
                return stop() if len(calls) == 3 else write(*args)

            patch.setattr(samples, "_write", write_or_stop)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut", save_steps=99, writing=replace(WRITING, batch_size=2))
    resumed = run(tmp_path / "cut", save_steps=99, writing=replace(WRITING, batch_size=2))
    assert read_samples(tmp_path / "cut") == read_samples(tmp_path / "whole")
    costs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("cut", "whole")]
    assert costs[0]["tokens_per_epoch"] == costs[1]["tokens_per_epoch"]
    for name, value in whole.adapter.state_dict().items():
        assert torch.equal(value, resumed.adapter.state_dict()[name])


def test_role_loss_is_its_divergence(tmp_path):
    ran = run(tmp_path, objective=Objective(0, 1, 0, anneal=0.0, beta=1.0, ce_share=0.0))
    for entry in ran.log_history:
        assert entry["loss_tactical"] == pytest.approx(entry["loss"], rel=1e-4)


def test_student_keeps_the_prompt_it_was_trained_with(tmp_path):
    first = run(tmp_path / "first")
    first.adapter.detach()
    prompt = tmp_path / "first/prompt.json"
    prompt.write_text(json.dumps(json.loads(prompt.read_text()) | {"system": "Be careful."}))
    settings = dict(adapter=tmp_path / "first", density=DEFAULTS.density, rank=None, instruction=None)
    run(tmp_path / "plain", **settings)
    assert json.loads((tmp_path / "plain/prompt.json").read_text())["system"] == "Be careful."
    own = [replace(question, system="Be brief.") for question in QUESTIONS]
    run(tmp_path / "own", questions=own, **settings)
    assert json.loads((tmp_path / "own/prompt.json").read_text())["system"] == "Be brief."
    with pytest.raises(ValueError, match="are others, or in another order"):
        run(tmp_path / "plain", questions=own, **settings)


def test_problems_that_do_not_fill_a_round_are_left_out(tmp_path):
    with pytest.warns(UserWarning, match="2 of 12 problems are left out: 5 rounds take 2 each"):
        assert run(tmp_path, rounds=5).traces == 10
    for name in ("problems.jsonl", Path("problems.jsonl")):
        with pytest.raises(TypeError, match=r"list of Question, got .*problems\.jsonl.*solutions\.read_questions"):
            run(tmp_path / "names", questions=name)


def test_killed_process_writes_the_remaining_samples(tmp_path):
    writer = Writer(student(), TOKENIZER, INSTRUCTION)
    writing = replace(WRITING, samples=2, batch_size=4)
    whole, calls = tmp_path / "whole", []
    records = write_samples(writer, QUESTIONS, writing, whole, "0:0", lambda *done: calls.append(done))
    assert calls[-1] == (12, 12) and len(records) == 24
    assert [(record["number"], record["sample"]) for record in records] == [(n, s) for n in range(12) for s in range(2)]
    lines = whole.read_text().splitlines(keepends=True)
    (tmp_path / "part").write_text("".join(lines[:7]) + lines[7][:20])  # an incomplete batch and a torn line
    again = write_samples(writer, QUESTIONS, writing, tmp_path / "part", "0:0", lambda *_: None)
    assert again == records
    other = write_samples(writer, QUESTIONS, writing, tmp_path / "other", "0:1", lambda *_: None)
    assert other != records


def test_processes_take_alternate_batches(tmp_path, monkeypatch):
    writer, write, alone = Writer(student(), TOKENIZER, INSTRUCTION), samples._write, []
    monkeypatch.setattr(samples, "_write", lambda *args: alone.append(write(*args)) or alone[-1])
    expected = write_samples(writer, QUESTIONS, WRITING, tmp_path / "alone", "0:0", lambda *_: None)
    assert len(alone) == 3
    monkeypatch.setattr(samples, "_write", write)
    monkeypatch.setattr(samples, "process_count", lambda: 2)
    for index, mine in enumerate(([[alone[0]], [alone[2]]], [[alone[1]], []])):
        gathered = []

        def gather(written, gathered=gathered):
            gathered.append(written)
            return alone[2 * len(gathered) - 2 : 2 * len(gathered)]

        monkeypatch.setattr(samples, "process_index", lambda index=index: index)
        monkeypatch.setattr(samples, "is_first_process", lambda index=index: index == 0)
        monkeypatch.setattr(samples, "gather_object", gather)
        path = tmp_path / f"{index}"
        assert write_samples(writer, QUESTIONS, WRITING, path, "0:0", lambda *_: None) == expected
        assert gathered == mine and path.exists() == (index == 0)


def test_plan_counts_the_cache_of_a_sample_batch(tmp_path):
    plan = run(tmp_path / "run", writing=replace(WRITING, max_new_tokens=200, batch_size=3)).plan
    model, longest = student(), plan.largest // CONFIG.batch_size
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert plan.cache == 3 * longest * per_token
    assert f"writing      about {plan.cache / 1e6:.1f} MB of key-value cache" in str(plan)
    large = replace(plan, memory=2 * plan.fixed, cache=10**9)
    assert large.needed == plan.fixed + 10**9 and "use a smaller --sample-batch-size" in str(large)
    tight = replace(plan, memory=2 * plan.fixed, kept=10**9, is_checkpointed=True, kept_checkpointed=10**9)
    assert "use a smaller --batch-size or --max-new-tokens" in str(tight)
    assert "--shard" in str(replace(plan, memory=1, cache=0)) and "--shard" not in str(replace(plan, memory=1))


def test_student_may_sample_a_head_row_that_its_teacher_lacks(tmp_path):
    wide = llama(vocab_size=len(TOKENIZER) + 40, max_position_embeddings=256)
    ran = run(tmp_path, model=wide, writing=replace(WRITING, max_new_tokens=30))
    records = [json.loads(line) for text in read_samples(tmp_path).values() for line in text.splitlines()]
    assert max(token for record in records for token in record["ids"]) >= len(TOKENIZER)
    assert all(entry["loss"] >= 0 for entry in ran.log_history)


def test_gradient_checkpointing_does_not_change_the_samples(tmp_path):
    plain, again = run(tmp_path / "plain"), run(tmp_path / "again", gradient_checkpointing=True)
    assert read_samples(tmp_path / "plain") == read_samples(tmp_path / "again")
    for name, value in plain.adapter.state_dict().items():
        torch.testing.assert_close(again.adapter.state_dict()[name], value)


def test_roles_follow_the_text_and_include_a_written_end_of_turn():
    tokenizers = TOKENIZER, byte_fallback("Add one. 3 + 1 = 4 <answer> </answer> é", size=40)
    text = "First, find the plan: add one to the number.\n3 + 1 = 4 é\n\n<answer>4</answer>"
    for tokenizer in tokenizers:
        writer = Writer(None, tokenizer, INSTRUCTION)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        question = Question("What is 3 + 1?")
        prompt = tokenizer(format_prompt(question.text, tokenizer, INSTRUCTION), add_special_tokens=False).input_ids
        for end in ([], [tokenizer.eos_token_id]):
            record = {"ids": [*ids, *end], "truncated": not end}
            example = example_of_sample(writer, question, record)
            assert example.input_ids.tolist() == [*prompt, *ids, *end]
            roles = example.roles[len(prompt) - 1 : -1]
            assert len(roles) == len(record["ids"])
            assert ROLES[roles[-1]] == "answer"
            tokens_by_role = {}
            for token, role in zip(ids, roles, strict=False):
                tokens_by_role.setdefault(ROLES[role], []).append(token)
            assert "plan" in tokenizer.decode(tokens_by_role["strategic"])
            assert "+ 1 =" in tokenizer.decode(tokens_by_role["tactical"])
            assert "4</answer>" in tokenizer.decode(tokens_by_role["answer"]).replace(" ", "")
    named = tokenizer("First, I put it between <answer> and </answer>.\n3 + 1 = 4\n<answer>4</answer>").input_ids
    roles = example_of_sample(writer, question, {"ids": named, "truncated": True}).roles
    assert "tactical" in {ROLES[role] for role in roles[len(prompt) - 1 : -1]}  # the first marker is only mentioned
    broken = [*tokenizer("é").input_ids[:1], *ids]  # half a character
    roles = example_of_sample(writer, question, {"ids": broken, "truncated": True}).roles
    assert roles[-2] == example.roles[-3] and len(roles) == len(prompt) + len(broken)
    unused = example_of_sample(writer, question, {"ids": [*ids, 10**6], "truncated": True})
    assert unused.input_ids[-1] == 10**6  # a model's vocabulary may be larger than its tokenizer's
    nothing = example_of_sample(writer, question, {"ids": [tokenizer.eos_token_id], "truncated": False})
    assert nothing.labels[-2] == tokenizer.eos_token_id and ROLES[nothing.roles[-2]] == "answer"


def test_run_continues_from_an_adapter_into_a_readable_run_folder(tmp_path):
    first = run(tmp_path / "first")
    first.adapter.detach()
    config = dict(density=DEFAULTS.density, rank=None)
    run(tmp_path / "second", adapter=tmp_path / "first", **config)
    model = student()
    SparseAdapter.from_pretrained(model, tmp_path / "second")
    folder = read_run(tmp_path / "second")
    assert folder.settings["on_policy"]["rounds"] == 3 and len(folder.log) == 6
    assert folder.measurements == []  # its training samples are no evaluation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "expected rounds from 1 to the number of questions"),
        ({"rounds": 13}, r"\(12 x 1 epochs\), got 13"),
        ({"objective": Objective()}, r"ce_share \(--ce-weight\) must be 0, got 0\.5"),
        ({"tokens_per_batch": 64}, r"tokens_per_batch \(--tokens-per-batch\) is for traces"),
        ({"max_tokens": 64}, r"max_tokens \(--max-tokens\) is for traces"),
        ({"placement": "gradient"}, r"placement \(--placement\) is for traces"),
        ({"writing": Writing(max_new_tokens=300)}, "lower max_new_tokens"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", [{"max_new_tokens": 7}, {"samples": 2}, {"temperature": 0.5}, {"top_p": 0.9}])
def test_changed_sampling_is_another_run(tmp_path, changed):
    run(tmp_path)
    with pytest.raises(ValueError, match="its on_policy is"):
        run(tmp_path, writing=replace(WRITING, **changed))
    with pytest.raises(ValueError, match="are others, or in another order"):
        run(tmp_path, questions=[replace(QUESTIONS[0], system="Be brief."), *QUESTIONS[1:]])
    assert run(tmp_path, writing=replace(WRITING, batch_size=3)).found


@pytest.mark.parametrize(
    "field", [{"samples": 0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1}, {"top_p": 0}]
)
def test_numbers_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Writing(**field)


@pytest.mark.parametrize("change", [{"number": 12}, {"problem": "What is 2?"}, {"sample": 1}, {"ids": []}], ids=str)
def test_completions_of_other_problems_are_refused(tmp_path, change):
    writer, path = Writer(student(), TOKENIZER, INSTRUCTION), tmp_path / "round-001.jsonl"
    record, *_ = write_samples(writer, QUESTIONS[:1], WRITING, path, "0", lambda *_: None)
    path.write_text(json.dumps(record | change) + "\n")
    with pytest.raises(ValueError, match=r"round-001\.jsonl:1: expected a completion of this round's problems"):
        write_samples(writer, QUESTIONS[:1], WRITING, path, "0", lambda *_: None)


def test_foreign_samples_file_is_refused(tmp_path):
    (tmp_path / "round-001.jsonl").write_text(json.dumps({"problem": "What?"}) + "\n")
    writer = Writer(llama(), TOKENIZER, INSTRUCTION)
    with pytest.raises(ValueError, match=r"round-001\.jsonl:1: number"):
        write_samples(writer, QUESTIONS, WRITING, tmp_path / "round-001.jsonl", "0", lambda *_: None)


def test_summary_of_a_round():
    records = [{"ids": [1] * 4, "truncated": True}, {"ids": [1] * 6, "truncated": False}]
    assert summary(records) == "2 completions of 5 tokens, 50% cut off"
    graded = [record | {"correct": right} for record in records for right in (True, False)]
    assert summary(graded) == "4 completions of 5 tokens, 50% cut off, 50% right"
