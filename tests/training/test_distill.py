"""A run from traces to adapter: exact resumption, refused settings, schedules, checkpoints and trackers."""

import json
import math
import re
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cache import add_repository, use_hub_cache
from tiny_models import llama, same_bits, snapshot
from tiny_runs import TOKENIZER, TRACES, run, student
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainerState
from transformers.integrations import integration_utils
from transformers.models.llama.modeling_llama import LlamaMLP

from rbfast.adapter.adapter_files import read_adapter
from rbfast.adapter.column_scores import score_columns
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import encode_all
from rbfast.models.student import packs
from rbfast.training.arguments import sole_training
from rbfast.training.distill import DistillConfig, distill, placement_scores, plan_run, trace_loss
from rbfast.training.distill_config import SCHEDULES
from rbfast.training.objective import Objective
from rbfast.training.resume import check_same_run, digest_records, run_settings
from rbfast.training.run_folder import RUN
from rbfast.training.trainer import DistillTrainer
from rbfast.training.training_bar import TrainingBar
from rbfast.utils.files import lock_folder

SLOW_PLACEMENTS = [pytest.param(placement, marks=pytest.mark.slow) for placement in ("activation", "random")]


@pytest.mark.parametrize("placement", ["gradient", *SLOW_PLACEMENTS])
def test_interrupted_run_resumes_bitwise(tmp_path, monkeypatch, placement):
    whole = run(tmp_path / "whole", monkeypatch, placement=placement)
    for cut in (1, 5):  # before the first checkpoint, and once both A and B have moments
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut", monkeypatch, cut_at=cut, placement=placement)
    resumed = run(tmp_path / "cut", monkeypatch, placement=placement, save_steps=3)  # save_steps may change
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("mode", [False, True])
def test_interrupted_run_restores_the_model_and_resumes(tmp_path, monkeypatch, mode):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole", monkeypatch)
    model = student().train(mode)
    model.model.norm.train(not mode)
    base, modes = snapshot(model), [module.training for module in model.modules()]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillTrainer, "training_step", interrupt)
        run(tmp_path / "cut", monkeypatch, model=model)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", monkeypatch, cut_at=5, model=model)
    assert same_bits(snapshot(model), base) and all(parameter.requires_grad for parameter in model.parameters())
    assert same_bits(run(tmp_path / "cut", monkeypatch, model=model), whole)
    assert [module.training for module in model.modules()] == modes


def test_only_an_unfinished_run_requires_its_dtype(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, monkeypatch, cut_at=3)
    with pytest.raises(ValueError, match="its dtype is 'float32', now 'bfloat16'"):
        run(tmp_path, monkeypatch, model=student().bfloat16())
    trained = run(tmp_path, monkeypatch)
    assert same_bits(run(tmp_path, monkeypatch, model=student().bfloat16()), trained)


def test_run_resumes_for_any_spelling_of_its_base_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = student()
    for name in ("base", "base/", str(tmp_path / "base")):
        model.config._name_or_path = name
        with pytest.raises(RuntimeError, match="power cut"):
            run("cut", monkeypatch, cut_at=3, model=model)
    model.config._name_or_path = "other"
    with pytest.raises(ValueError, match=r"its base_model is '.*base', now 'other'"):
        run("cut", monkeypatch, model=model)


def test_run_continues_from_another_adapter(tmp_path, monkeypatch):
    run(tmp_path / "first", monkeypatch)
    start, model = tmp_path / "first", student()
    first = SparseAdapter.from_pretrained(model, start)
    examples, _ = encode_all(TRACES, TOKENIZER)
    expected = trace_loss(model, examples, 4)["mean"]
    first.detach()
    whole = run(tmp_path / "whole", monkeypatch, adapter=start, learning_rate=1e-9)
    assert all(torch.allclose(whole[name], value, atol=1e-6) for name, value in first.state_dict().items())
    whole = run(tmp_path / "second", monkeypatch, adapter=start)
    assert {name for name, value in first.state_dict().items() if torch.equal(whole[name], value)} == {
        name for name in whole if name.endswith("cols")
    }
    trained = SparseAdapter.from_pretrained(model, tmp_path / "second")
    assert trace_loss(model, examples, 4)["mean"] < expected
    trained.detach()
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", monkeypatch, cut_at=5, adapter=start)
    with pytest.raises(ValueError, match=r"its adapter is '[0-9a-f]+', now None"):
        run(tmp_path / "cut", monkeypatch)
    with pytest.raises(ValueError, match=r"its adapter is '[0-9a-f]+', now '[0-9a-f]+'"):
        run(tmp_path / "cut", monkeypatch, adapter=tmp_path / "second")
    assert same_bits(run(tmp_path / "cut", monkeypatch, adapter=start), whole)
    assert same_bits(run(tmp_path / "cut", monkeypatch, adapter=start), whole)  # the finished run is loaded


def test_failed_start_leaves_the_folder_to_other_settings(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="raise density"):
        run(tmp_path, monkeypatch, density=1e-4)
    model = student()
    attached = SparseAdapter.attach(model, density=0.2)
    with pytest.raises(ValueError, match="call its detach"):
        run(tmp_path, monkeypatch, density=0.1, model=model)
    attached.detach()
    run(tmp_path, monkeypatch, model=model)
    with pytest.raises(ValueError, match=r"its density is 0\.2, now 0\.1"):
        run(tmp_path, monkeypatch, density=0.1)


def test_retrained_student_keeps_its_instruction(tmp_path, monkeypatch):
    def instruction(folder):
        return json.loads((tmp_path / folder / "prompt.json").read_text())["instruction"]

    run(tmp_path / "first", monkeypatch, instruction="Reply shortly.")
    run(tmp_path / "second", monkeypatch, adapter=tmp_path / "first")
    model = student()
    model.config._name_or_path = str(tmp_path / "first")  # like a merged model, which has a prompt.json too
    run(tmp_path / "merged", monkeypatch, model=model)
    run(tmp_path / "other", monkeypatch, adapter=tmp_path / "first", instruction="none")
    assert [instruction(folder) for folder in ("second", "merged", "other")] == ["Reply shortly.", "Reply shortly.", ""]


def test_adapter_on_the_hub_is_continued_as_one_in_a_folder(tmp_path, monkeypatch):
    run(tmp_path / "first", monkeypatch, instruction="Reply shortly.")
    add_repository(tmp_path / "cache", "owner/name", tmp_path / "first")
    use_hub_cache(monkeypatch, tmp_path / "cache")
    by_folder = run(tmp_path / "folder", monkeypatch, adapter=tmp_path / "first")
    assert same_bits(run(tmp_path / "hub", monkeypatch, adapter="owner/name"), by_folder)
    settings = [(tmp_path / folder / "prompt.json").read_text() for folder in ("folder", "hub")]
    assert settings[0] == settings[1] and "Reply shortly." in settings[0]


@pytest.mark.parametrize("placement", ["random", "gradient"])
def test_run_trains_the_named_layers_and_resumes(tmp_path, monkeypatch, placement):
    settings = {"targets": ("q_proj", "v_proj"), "density": 0.05, "placement": placement}
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, monkeypatch, cut_at=5, **settings)
    values = run(tmp_path, monkeypatch, **settings)
    assert {name.split(".")[-2] for name in values} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="its targets is"):
        run(tmp_path, monkeypatch, **settings | {"targets": "all-linear"})


SHAPES = [{"density": 0.01}, {"rank": 3}, {"support": 16}, {"targets": ["q_proj"]}, {"placement": "gradient"}]


@pytest.mark.parametrize("setting", SHAPES)
def test_shape_settings_are_refused_with_an_existing_adapter(tmp_path, monkeypatch, setting):
    [name] = setting
    for start in (run, lambda *args, **settings: planned(**settings)):
        with pytest.raises(ValueError, match=f"{name} is for a new adapter, but the one in first has its own"):
            start(tmp_path / "second", monkeypatch, adapter="first", **setting)
    assert not (tmp_path / "second").exists()


def test_run_may_not_replace_its_starting_adapter(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds the adapter to continue from, which the run would replace"):
        run(tmp_path / "first", monkeypatch, adapter=tmp_path / "second" / ".." / "first")


def planned(adapter, **settings):
    return plan_run(student(), TOKENIZER, TRACES, DistillConfig(**settings), adapter=adapter)


def test_columns_are_scored_by_the_mean_of_each_role():
    examples, _ = encode_all(TRACES[:2], TOKENIZER)
    config = DistillConfig(batch_size=4)
    once, twice = (placement_scores(student(), examples * n, config).columns for n in (1, 2))
    for name, scores in once.items():
        torch.testing.assert_close(twice[name], scores)


def test_activation_scores_cover_only_the_traces():
    examples, _ = encode_all(TRACES[:2], TOKENIZER)
    fresh, probed = student(), student()
    packs(probed)  # runs two examples of its own, once
    scores = [placement_scores(model, examples, DistillConfig(), "activation").columns for model in (fresh, probed)]
    assert same_bits(*scores)


def test_trace_loss_uses_evaluation_mode():
    model = llama(vocab_size=len(TOKENIZER), max_position_embeddings=256, attention_dropout=0.5)
    examples, _ = encode_all(TRACES[:4], TOKENIZER)
    expected = trace_loss(model.eval(), examples)
    assert trace_loss(model.train(), examples) == expected and model.training


def test_trace_loss_ignores_the_default_device():
    model, (examples, _) = student().bfloat16(), encode_all(TRACES[:3], TOKENIZER)
    expected = trace_loss(model, examples)
    with torch.device("meta"):  # stands for a GPU
        assert trace_loss(model, examples) == expected


def test_interrupted_run_with_token_batches_resumes_bitwise(tmp_path, monkeypatch):
    settings = dict(tokens_per_batch=400, accumulation=2, epochs=2)
    whole = run(tmp_path / "whole", monkeypatch, **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", monkeypatch, cut_at=3, **settings)
    with pytest.raises(ValueError, match="steps take 800 tokens, now they would take 400: batch size 400 x"):
        run(tmp_path / "cut", monkeypatch, **settings | {"accumulation": 1})
    with pytest.raises(ValueError, match="its tokens_per_batch is 400, now 800"):
        run(tmp_path / "cut", monkeypatch, tokens_per_batch=800, epochs=2)
    resumed = run(tmp_path / "cut", monkeypatch, **settings)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("placement", ["gradient", "random"])
def test_gradient_checkpointing_matches_plain_training_bitwise(tmp_path, monkeypatch, placement):
    runs = []
    monkeypatch.setattr(LlamaMLP, "forward", counting(LlamaMLP.forward, runs))
    kept = run(tmp_path / "kept", monkeypatch, placement=placement)
    once = len(runs)
    again = run(tmp_path / "again", monkeypatch, placement=placement, gradient_checkpointing=True)
    layers, batches = 2, 6
    assert len(runs) - 2 * once == layers * batches * (2 if placement == "gradient" else 1)
    assert all(torch.equal(again[name], value) for name, value in kept.items())


def counting(forward, runs):
    @wraps(forward)
    def counted(self, *args, **kwargs):
        runs.append(1)
        return forward(self, *args, **kwargs)

    return counted


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("density", (0, -0.1, 1.5, NAN)),
        ("epochs", (0, -1.0, float("inf"), NAN)),
        ("learning_rate", (0.0, -1e-3, float("inf"), NAN)),
        ("warmup", (-0.1, 1, 20, NAN)),
        ("rank", (0, -2)),
        ("support", (0,)),
        ("placement_traces", (0,)),
        ("batch_size", (0, -8)),
        ("tokens_per_batch", (0, -1)),
        ("accumulation", (0,)),
        ("max_tokens", (0,)),
        ("save_steps", (0, -1)),
        ("seed", (-1, 2**32)),
        ("placement", ("gradients",)),
        ("schedule", ("step",)),
    ],
)
def test_invalid_settings_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}$"):
            DistillConfig(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        (DistillConfig, "epochs", "2", "a number"),
        (DistillConfig, "learning_rate", None, "a number"),
        (DistillConfig, "batch_size", 8.0, "a whole number"),
        (DistillConfig, "rank", True, "a whole number"),
        (DistillConfig, "seed", "0", "a whole number"),
        (Objective, "beta", "0.5", "a number"),
    ],
)
def test_non_numeric_settings_are_refused(kind, name, value, words):
    with pytest.raises(TypeError, match=rf"^{name} must be {words}, got {re.escape(repr(value))}$"):
        kind(**{name: value})


def test_numpy_numbers_are_accepted():
    config = DistillConfig(seed=np.int64(3), learning_rate=np.float32(0.5), objective=Objective(beta=np.float64(0.5)))
    assert json.loads(json.dumps(asdict(config))) == asdict(
        DistillConfig(seed=3, learning_rate=0.5, objective=Objective(beta=0.5))
    )


def test_bar_keeps_the_losses_of_the_last_step():
    bar, state = TrainingBar(quiet=True), TrainerState(global_step=3, max_steps=3)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 2.0, "loss_answer": 1.5})
    bar.on_log(None, state, None, logs={"train_runtime": 1.0})  # logged as a Trainer ends
    bar.close()
    assert bar.bar.tasks[0].description == "answer 1.500"


def test_resumed_run_reports_its_step(capsys):
    for step, message in ((0, ""), (4, "resuming at step 4 of 6\n")):
        callback = TrainingBar(quiet=False)
        callback.bar.start = lambda: None
        callback.on_train_begin(None, TrainerState(global_step=step, max_steps=6), None)
        assert capsys.readouterr().err == message
    TrainingBar(quiet=True).on_train_begin(None, TrainerState(global_step=4, max_steps=6), None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_trace_beyond_the_position_table_is_refused(tmp_path, model_type):
    longest = max(len(example.input_ids) for example in encode_all(TRACES, TOKENIZER)[0])
    sizes = dict(vocab_size=len(TOKENIZER), hidden_size=24, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(ffn_dim=32, word_embed_proj_dim=24) if model_type == "opt" else {}
    for positions in (longest - 1, longest):
        config = AutoConfig.for_model(model_type, max_position_embeddings=positions, **sizes)
        model, settings = AutoModelForCausalLM.from_config(config), DistillConfig(density=0.2)
        if positions == longest:
            assert distill(model, TOKENIZER, TRACES, tmp_path, settings, quiet=True).log_history
        else:
            with pytest.raises(ValueError, match=f"has {longest} tokens, but .* {positions} positions: set max_tokens"):
                distill(model, TOKENIZER, TRACES, tmp_path, settings, quiet=True)


@pytest.mark.parametrize("rope_type", ["default", "yarn"])
def test_traces_beyond_the_trained_context_warn(rope_type, recwarn):
    rope = {"rope_type": rope_type, "rope_theta": 1e4} | ({"factor": 4.0} if rope_type == "yarn" else {})
    model = llama(vocab_size=len(TOKENIZER), max_position_embeddings=95, rope_parameters=rope)
    plan_run(model, TOKENIZER, TRACES, DistillConfig(density=0.2))
    warned = [str(w.message) for w in recwarn if "positions" in str(w.message)]
    assert len(warned) == (rope_type == "default")
    assert all("1 of 24 traces are longer than the 95 positions" in message for message in warned)


def test_foreign_files_among_the_checkpoints_stay(tmp_path, monkeypatch):
    foreign = tmp_path / "checkpoints" / "llama" / "model.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("theirs")
    for _ in range(2):  # trained, then loaded
        run(tmp_path, monkeypatch)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["llama"]
        assert foreign.read_text() == "theirs"


def test_run_killed_while_removing_its_last_checkpoint_is_complete(tmp_path, monkeypatch):
    whole = run(tmp_path, monkeypatch)
    leftover = tmp_path / "checkpoints" / "checkpoint-6"
    leftover.mkdir(parents=True)
    (leftover / "optimizer.pt").write_bytes(b"")
    assert same_bits(run(tmp_path, monkeypatch), whole) and not leftover.exists()


def test_single_process_saves_despite_a_stale_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run(tmp_path, monkeypatch)
    assert SparseAdapter.from_pretrained(student(), tmp_path).sites()


@pytest.mark.parametrize("traces", ["pool.jsonl", Path("pool.jsonl"), [TRACES[0], TRACES[1].to_dict()]])
def test_unread_traces_are_refused_with_a_hint(tmp_path, traces):
    with pytest.raises(TypeError, match=r"expected a list of Trace, got (str|PosixPath|dict).*: read_traces\(FILE\)"):
        distill(student(), TOKENIZER, traces, tmp_path)


def test_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    run(tmp_path / "first", monkeypatch)
    values = sum(value.numel() for value in SparseAdapter.from_pretrained(student(), tmp_path / "first").parameters())
    for free in (39 * values, 41 * values):  # needed: three checkpoints of 12 bytes a value, and the adapter
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))
        model = student()
        if free < 40 * values:
            with pytest.raises(OSError, match=r"are free, but the checkpoints and the adapter need .* on another disk"):
                run(tmp_path / "second", monkeypatch, model=model)
            assert all(parameter.requires_grad for parameter in model.parameters())
        else:
            run(tmp_path / "second", monkeypatch)
    for free in (41 * values, 17 * values):  # at the start, and beside two checkpoints
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut", monkeypatch, cut_at=5)


def test_folder_in_use_by_another_run_is_refused(tmp_path, monkeypatch):
    model = student()
    with lock_folder(tmp_path), pytest.raises(ValueError, match="another process is using"):
        run(tmp_path, monkeypatch, model=model)
    run(tmp_path, monkeypatch, model=model)


def test_model_folder_is_refused_as_output(tmp_path, monkeypatch):
    student().save_pretrained(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds a model.*name another folder"):
        run(tmp_path, monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_interrupted_run_stops_its_progress_bar(tmp_path, monkeypatch):
    bars = []

    def interrupt(*args, **kwargs):
        assert bars[0].bar.live.is_started
        raise KeyboardInterrupt

    monkeypatch.setattr("rbfast.training.distill.TrainingBar", lambda quiet: bars.append(TrainingBar(quiet)) or bars[0])
    monkeypatch.setattr(DistillTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(student(), TOKENIZER, TRACES, tmp_path, DistillConfig(density=0.2))
    assert not bars[0].bar.live.is_started


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("strategic", (-1.0, NAN, float("inf"))),
        ("anneal", (-0.1, 1.1, NAN)),
        ("ce_share", (2, NAN)),
        ("beta", (-1, NAN)),
        ("strategic_temperature", (0.0, -1.0, NAN)),
        ("answer_temperature", (0.0, float("inf"))),
    ],
)
def test_invalid_objectives_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"({name}|role weights) must be .*, got .*{re.escape(repr(value))}"):
            Objective(**{name: value})


def test_placed_parameters_are_contiguous(tmp_path):
    """Fused Adam pairs values and moments by their address: moments in another layout would be scrambled."""
    model = llama(vocab_size=61)
    ids = torch.arange(22).view(2, 11)
    scores = score_columns(model, [{"input_ids": ids, "labels": ids}], lambda model, batch: model(**batch).loss)
    adapter = SparseAdapter.attach(model, density=0.2, rank=3, placement=scores)
    assert all(parameter.is_contiguous() for parameter in adapter.parameters())


def test_one_step_run_trains(tmp_path):
    config = DistillConfig(density=0.2, rank=3, batch_size=4, placement="random")
    trained = distill(student(), TOKENIZER, TRACES[:4], tmp_path, config, quiet=True)
    assert len(trained.log_history) == 1
    assert any(bool(site.B.any()) for site in trained.adapter.sites().values())


def learning_rates(folder, monkeypatch, **settings):
    run(folder, monkeypatch, learning_rate=1.0, **settings)
    return [entry["learning_rate"] for entry in json.loads((folder / "log.json").read_text())]


def test_learning_rate_follows_the_schedule(tmp_path, monkeypatch):
    two_epochs = dict(accumulation=2, epochs=2, warmup=0.3)  # 6 steps, 2 of them warm up
    rates = {name: learning_rates(tmp_path / name, monkeypatch, schedule=name, **two_epochs) for name in SCHEDULES}
    assert rates["linear"] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert rates["constant"] == pytest.approx([0, 0.5, 1, 1, 1, 1])
    assert rates["cosine"] == pytest.approx([0, 0.5, *((1 + math.cos(math.pi * n / 4)) / 2 for n in range(4))])


def test_one_step_warmup_is_skipped(tmp_path, monkeypatch):
    # Its learning rate would be 0.
    assert learning_rates(tmp_path, monkeypatch, accumulation=3, warmup=0.5, save_steps=1) == [1, 0.5]


def test_seed_chooses_columns_and_held_out_traces(tmp_path, monkeypatch):
    columns, held_out = [], []
    for folder, seed in ((tmp_path / "0", 0), (tmp_path / "1", 1)):
        run(folder, monkeypatch, seed=seed, held_out=0.2, support=4)
        columns.append([delta.cols.tolist() for delta in read_adapter(folder)[1].values()])
        held_out.append(json.loads((folder / "run.json").read_text())["held_out"]["digest"])
    assert columns[0] != columns[1] and held_out[0] != held_out[1]


def test_traces_are_digested_one_at_a_time():
    tracemalloc.start()
    try:
        digest = digest_records({"b": f"é {n}" * 2**12, "a": n} for n in range(200))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20 and digest == "0512683befe55c9402df4ddaea585548"


def test_resuming_with_other_traces_is_refused(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch)
    for traces in (TRACES[::-1], [*TRACES[:-1], replace(TRACES[-1], reasoning="Count on.")]):
        monkeypatch.setattr("tiny_runs.TRACES", traces)
        with pytest.raises(ValueError, match="are others, or in another order"):
            run(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"save_steps": 7, "gradient_checkpointing": True}, None),
        ({"batch_size": 2, "accumulation": 4}, None),
        ({"batch_size": 4}, "whose optimizer steps take 8 traces, now they would take 4"),
        ({"tokens_per_batch": 512}, "its tokens_per_batch is None, now 512"),
        ({"seed": 1}, "its seed is 0, now 1"),
        ({"epochs": 2.0}, "its epochs is 1.0, now 2.0"),
        ({"objective": Objective(anneal=0.25)}, "its objective is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_refuses_only_settings_that_change_the_result(tmp_path, changes, error):
    first, now = (asdict(DistillConfig(**settings)) for settings in ({}, changes))
    (tmp_path / RUN).write_text(json.dumps(run_settings(student(), first)))
    settings = run_settings(student(), now)
    if error is None:
        return check_same_run(tmp_path, settings)
    with pytest.raises(ValueError, match=error):
        check_same_run(tmp_path, settings)


def test_losses_reach_the_named_trackers(tmp_path, monkeypatch):
    sent = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            sent.append((args.run_name, state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ours", Tracker)
    run(tmp_path / "first", monkeypatch)
    assert not sent
    run(tmp_path / "second", monkeypatch, report_to=["ours"])
    losses = [logs["loss_tactical"] for name, _, logs in sent if name == "second" and "loss" in logs]
    assert losses == [entry["loss_tactical"] for entry in json.loads((tmp_path / "second" / "log.json").read_text())]


def test_unavailable_tracker_is_refused_before_training(tmp_path, monkeypatch):
    class Missing(TrainerCallback):
        def __init__(self):
            raise RuntimeError("needs the package theirs: pip install theirs")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "theirs", Missing)
    with pytest.raises(ImportError, match="pip install theirs"):
        run(tmp_path / "run", monkeypatch, report_to=["theirs"])
    with pytest.raises(ValueError, match=r"spreadsheet is not supported, only .*tensorboard.* are supported"):
        run(tmp_path / "run", monkeypatch, report_to=["spreadsheet"])
    assert not (tmp_path / "run").exists()


def test_run_stops_at_the_first_non_finite_gradient(tmp_path, monkeypatch):
    compute, steps = DistillTrainer.compute_loss, []

    def overflow(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return compute(self, *args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1)

    monkeypatch.setattr(DistillTrainer, "compute_loss", overflow)
    with pytest.raises(ValueError, match="the gradient of step 3 is NaN or infinite, so the training has diverged"):
        run(tmp_path, monkeypatch)
    assert steps == [0, 1, 2]


def test_second_training_thread_is_refused(tmp_path, monkeypatch):
    model = student()
    with ThreadPoolExecutor(1) as other_thread, sole_training():
        running = other_thread.submit(run, tmp_path, monkeypatch, model=model)
        with pytest.raises(RuntimeError, match="another thread of this process is training"):
            running.result()
    assert all(parameter.requires_grad for parameter in model.parameters())
    run(tmp_path, monkeypatch, model=model)


def test_teacher_function_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"teacher must be a model, got function: pass .* DistillLoss"):
        distill(student(), TOKENIZER, TRACES, tmp_path / "run", teacher=lambda ids: ids)
    assert not (tmp_path / "run").exists()


def test_scores_of_ones_own_begin_a_run_as_an_adapter(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="an adapter attached with scores of your own can be saved and continued from"):
        DistillConfig(placement="scores.safetensors")
    model = student()
    ids = torch.tensor([[1, 2, 3, 4]])
    scores = score_columns(model, [ids], lambda model, ids: model(ids, labels=ids).loss)
    adapter = SparseAdapter.attach(model, density=0.2, placement=scores)
    adapter.save_pretrained(tmp_path / "start")
    columns = {name: site.cols.clone() for name, site in adapter.sites().items()}
    adapter.detach()
    state = run(tmp_path / "run", monkeypatch, model=model, adapter=tmp_path / "start")
    trained = {name.removesuffix(".cols"): value for name, value in state.items() if name.endswith(".cols")}
    assert trained.keys() == columns.keys() and all(torch.equal(trained[name], columns[name]) for name in columns)
