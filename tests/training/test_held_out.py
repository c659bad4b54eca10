"""The loss of held-out traces: how it is measured during training, and the choice of the best adapter."""

import json
import warnings
from collections import defaultdict

import pytest
import torch
from tiny_models import same_bits
from tiny_runs import TOKENIZER, TRACES, run, student
from transformers import TrainerState

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import encode_all
from rbfast.data.spans import ROLES
from rbfast.data.trace import Trace
from rbfast.training.distill import DistillConfig, distill, plan_run, trace_loss
from rbfast.training.held_out import split_held_out
from rbfast.training.objective import Objective
from rbfast.training.training_bar import TrainingBar

OTHERS = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}", str(n + 1)) for n in range(90, 95)]


def log_of(folder):
    return json.loads((folder / "log.json").read_text())


def measured(log):
    return [entry for entry in log if "eval_loss" in entry]


def test_share_holds_out_all_traces_of_a_problem():
    traces = [Trace(f"Problem {n} ", f"Solve {m}.", "1") for m in range(3) for n in range(10)]
    traces += [Trace(f"Problem  {n}", "Solve again.", "1") for n in range(10)]
    trained, held_out = split_held_out(traces, 0.2, seed=1)
    sides = defaultdict(set)
    for side, some in (("trained", trained), ("held out", held_out)):
        for trace in some:
            sides[" ".join(trace.problem.split())].add(side)
    assert sorted(map(sorted, sides.values())) == [["held out"]] * 2 + [["trained"]] * 8
    assert len(trained) + len(held_out) == len(traces)
    assert split_held_out(traces, 0.2, seed=1) == (trained, held_out) != split_held_out(traces, 0.2, seed=2)
    for share, count in ((1e-9, 1), (0.999, 9)):  # neither side is empty
        assert len({" ".join(trace.problem.split()) for trace in split_held_out(traces, share, seed=0)[1]}) == count


@pytest.mark.parametrize(
    ("held_out", "error"),
    [
        (0.0, r"above 0 and below 1.*got 0\.0 of 24"),
        (1.0, "above 0 and below 1"),
        (-0.5, "above 0"),
        (float("nan"), "got nan"),
        (5, "got 5 of 24"),
        ([], "expected traces to measure"),
    ],
)
def test_invalid_held_out_is_refused(tmp_path, held_out, error):
    with pytest.raises(ValueError, match=error):
        distill(student(), TOKENIZER, TRACES, tmp_path / "run", held_out=held_out)
    assert not (tmp_path / "run").exists()


def test_single_problem_cannot_be_split():
    with pytest.raises(ValueError, match=r"at least 2 problems; got 0\.5 of 1"):
        split_held_out([TRACES[0]] * 3, 0.5, seed=0)


def test_a_file_name_in_place_of_held_out_traces_is_refused():
    with pytest.raises(TypeError, match=r"expected a list of Trace, got str 'other\.jsonl': read_traces"):
        split_held_out(TRACES, "other.jsonl", seed=0)


def test_held_out_problems_that_are_trained_on_warn():
    with pytest.warns(UserWarning, match="2 of 7 held-out traces have a problem that is trained on"):
        assert split_held_out(TRACES, OTHERS + TRACES[:2], seed=0) == (TRACES, OTHERS + TRACES[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_held_out(TRACES, OTHERS, seed=0)


def test_keep_best_requires_held_out_traces(tmp_path):
    with pytest.raises(ValueError, match="give held_out too"):
        distill(student(), TOKENIZER, TRACES, tmp_path, keep_best=True)


def test_measuring_does_not_change_the_training(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain", monkeypatch, epochs=2)
    assert same_bits(run(tmp_path / "measured", monkeypatch, epochs=2, held_out=OTHERS), plain)
    log = log_of(tmp_path / "measured")
    assert [entry["step"] for entry in measured(log)] == [0, 2, 4, 6, 8, 10, 12]
    assert [entry for entry in log if "loss" in entry] == log_of(tmp_path / "plain")


@pytest.mark.parametrize("settings", [{}, {"tokens_per_batch": 400, "batch_size": 1}])
def test_measured_loss_is_the_adapters_at_that_step(tmp_path, monkeypatch, settings):
    examples, _ = encode_all(OTHERS, TOKENIZER)
    before = trace_loss(student(), examples)
    run(tmp_path, monkeypatch, held_out=OTHERS, **settings)
    model = student()
    SparseAdapter.from_pretrained(model, tmp_path)
    first, *_, last = measured(log_of(tmp_path))
    assert set(first) == {"step", "epoch", "eval_loss", *(f"eval_loss_{role}" for role in ROLES)}  # and no timings
    for entry, expected in ((first, before), (last, trace_loss(model, examples))):
        for role in ROLES:
            assert entry[f"eval_loss_{role}"] == pytest.approx(expected[role], rel=1e-5)
    assert last["eval_loss"] < first["eval_loss"]


def test_teacher_counts_in_the_loss_but_not_by_role(tmp_path):
    traces, model = TRACES[:8], student()
    config = DistillConfig(density=0.2, rank=3, batch_size=4, learning_rate=1e-9, objective=Objective(ce_share=0.0))
    log = distill(model, TOKENIZER, traces, tmp_path, config, True, teacher=student(), held_out=OTHERS).log_history
    expected = trace_loss(student(), encode_all(OTHERS, TOKENIZER)[0])
    assert measured(log)[0]["eval_loss"] < 1e-5  # the student equals its teacher
    for role in ROLES:
        assert measured(log)[0][f"eval_loss_{role}"] == pytest.approx(expected[role], rel=1e-5)


def test_interrupted_run_resumes_with_the_same_adapter_and_log(tmp_path, monkeypatch):
    settings = dict(held_out=0.2, epochs=2)
    whole = run(tmp_path / "whole", monkeypatch, **settings)
    for cut in (1, 5):
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut", monkeypatch, cut_at=cut, **settings)
    with pytest.raises(ValueError, match=r"its held_out is .*'traces': 5.*, now .*'traces': 2"):
        run(tmp_path / "cut", monkeypatch, held_out=0.1, epochs=2)
    with pytest.raises(ValueError, match=r"its held_out is .*, now None"):
        run(tmp_path / "cut", monkeypatch, epochs=2)
    assert same_bits(run(tmp_path / "cut", monkeypatch, **settings), whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert same_bits(run(tmp_path / "cut", monkeypatch, **settings), whole)  # the finished run is loaded
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["traces"] == 19


def test_keep_best_keeps_the_best_adapter(tmp_path, monkeypatch):
    odd = [Trace("What", ".=+ " * n, "+") for n in range(2, 6)]  # training on the other traces does not help with these
    wild = dict(held_out=odd, epochs=3, learning_rate=1.0, schedule="constant")
    run(tmp_path / "last", monkeypatch, **wild)
    losses = {entry["step"]: entry["eval_loss"] for entry in measured(log_of(tmp_path / "last")) if entry["step"]}
    best = min(losses, key=losses.get)
    assert 2 < best < max(losses) - 4
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", monkeypatch, cut_at=best + 3, keep_best=True, **wild)
    (tmp_path / "cut").rename(tmp_path / "moved")
    run(tmp_path / "moved", monkeypatch, keep_best=True, **wild)
    model = student()
    SparseAdapter.from_pretrained(model, tmp_path / "moved")
    best_loss = trace_loss(model, encode_all(odd, TOKENIZER)[0])
    log = {entry["step"]: entry for entry in measured(log_of(tmp_path / "moved"))}
    assert log[best]["eval_loss_tactical"] == pytest.approx(best_loss["tactical"], rel=1e-5)
    assert log[max(losses)]["eval_loss_tactical"] > 1.001 * best_loss["tactical"]
    assert not (tmp_path / "moved" / "checkpoints").exists()


def test_held_out_traces_that_do_not_fit_warn(tmp_path, monkeypatch):
    long = Trace("What is 1 + 1?" * 30, "Add one.", "2")
    with pytest.warns(UserWarning, match="1 of 6 held-out traces are not measured; the first: "):
        run(tmp_path / "some", monkeypatch, held_out=[*OTHERS, long], max_tokens=150)
    with pytest.raises(ValueError, match="none of the 1 traces"):
        run(tmp_path / "none", monkeypatch, held_out=[long], max_tokens=150)


def test_plan_counts_only_trained_traces():
    config = DistillConfig(density=0.2, rank=3, batch_size=4)
    assert plan_run(student(), TOKENIZER, TRACES, config, held_out=0.5).batches == 3


def test_bar_shows_the_last_held_out_loss():
    callback = TrainingBar(quiet=True)
    callback.on_train_begin(None, state := TrainerState(global_step=0, max_steps=6), None)
    for logs in ({"eval_loss": 2.0}, {"loss": 1.0, "loss_tactical": 1.5}, {"loss": 1.0, "loss_tactical": 1.25}):
        callback.on_log(None, state, None, logs)
    assert callback.bar.tasks[0].description == "held-out 2.000  tactical 1.250"


def test_evaluation_draws_no_random_numbers(tmp_path, monkeypatch):
    drawn = []
    for held_out in (None, OTHERS):
        torch.manual_seed(3)
        run(tmp_path / str(held_out is None), monkeypatch, held_out=held_out)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
