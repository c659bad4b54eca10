"""The experiments on curation, hierarchy and budgets: fair draws, and complete runs with a tiny random student."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments import evidence, scaling, votes
from experiments.evidence import Settings, arms, drawn, flat, section, split
from experiments.teacher_results import traces_from_results
from real_inputs import data_path
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import encode_all
from rbfast.data.trace import Trace
from rbfast.evaluation.evaluate import Result, summarize_samples
from rbfast.grading.grade import Problem
from rbfast.inference.decoding import Completion

SETTINGS = Settings(
    size=12, held_out=2, problems=2, tokens=1500, max_new_tokens=4, rate=1e-2, student="tiny", density=0.05
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """All completions of ten results of each of two tasks, right and wrong."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("claude35_logic__propositional_logic.json", "claude35_cognition__number_sequence.json"):
        results = json.loads((data_path("reasoning_gym_claude35") / name).read_text())
        (folder / name).write_text(json.dumps(results | {"results": results["results"][:10]}))
    return traces_from_results(folder, "someone", incorrect=True)[0]


TASKS = ("propositional_logic", "number_sequence")


def roomy_model() -> LlamaForCausalLM:
    model = tiny_model()
    model.config.max_position_embeddings = 2048
    return model


def test_pool_includes_wrong_completions_marked_as_such(pool: list[Trace]) -> None:
    assert {trace.verified for trace in pool} == {True, False}
    assert all(trace.answer and trace.reasoning for trace in pool)


def test_draw_matches_its_number_of_tokens() -> None:
    items = [Trace(f"problem {i}", "so", "1", id=str(i)) for i in range(200)]
    lengths = {str(i): 50 + 3 * i for i in range(200)}
    for tokens in (80 * 200, 80 * 350, 80 * 500):
        chosen = drawn(items, lengths, 80, tokens, seed=1)
        assert len({trace.id for trace in chosen}) == 80
        assert math.isclose(sum(lengths[t.id] for t in chosen), tokens, rel_tol=evidence.SAME_TOKENS)
    assert drawn(items, lengths, 80, 28000, seed=1) == drawn(items, lengths, 80, 28000, seed=1)
    assert drawn(items, lengths, 80, 28000, seed=1) != drawn(items, lengths, 80, 28000, seed=2)
    with pytest.raises(ValueError, match="cannot have 1000 tokens"):
        drawn(items, lengths, 80, 1000, seed=1)
    with pytest.raises(ValueError, match="at least 80 items"):
        drawn(items[:79], lengths, 80, 28000, seed=1)


def test_splits_share_no_problem(pool: list[Trace]) -> None:
    shared = split(pool, TASKS, tiny_tokenizer(), 0, SETTINGS)
    trained, held_out = ({trace.problem for trace in traces} for traces in (shared.pool, shared.held_out))
    fresh = {problem.question for problem in shared.problems}
    assert trained and held_out and len(fresh) == 4
    assert not trained & held_out and not trained & fresh and not held_out & fresh
    assert all(trace.verified for trace in shared.held_out)


def test_arms_have_the_same_size_and_tokens(pool: list[Trace]) -> None:
    tokenizer = tiny_tokenizer()
    shared = split(pool, TASKS, tokenizer, 0, SETTINGS)
    chosen = arms(shared, tokenizer, 0, SETTINGS)
    assert tuple(chosen) == evidence.ARMS
    assert chosen["curated"] == chosen["curated, flat"]
    assert all(trace.verified for trace in chosen["curated"] + chosen["random, right"])
    assert not all(trace.verified for trace in chosen["random"])
    target = shared.tokens(chosen["curated"])
    for traces in chosen.values():
        assert len(traces) == len(chosen["curated"])
        assert math.isclose(shared.tokens(traces), target, rel_tol=evidence.SAME_TOKENS)
    assert {trace.id for trace in chosen["curated"]} <= {trace.id for trace in shared.pool}


def test_flat_weights_make_every_token_equal(pool: list[Trace]) -> None:
    tokenizer = tiny_tokenizer()
    objective = flat(pool[:20], tokenizer, SETTINGS)
    examples, _ = encode_all(pool[:20], tokenizer, max_tokens=SETTINGS.tokens)
    roles = torch.cat([torch.as_tensor(example.roles) for example in examples])
    per_token = objective.weights(0.7) / torch.bincount(roles[roles >= 0], minlength=3)
    assert torch.allclose(per_token, per_token[:1].expand(3))


@pytest.mark.slow
def test_seed_is_measured_once_and_becomes_a_table(pool: list[Trace], tmp_path: Path, monkeypatch) -> None:
    model, tokenizer = roomy_model(), tiny_tokenizer()
    results = [
        evidence.run_seed(model, tokenizer, pool, TASKS, seed, tmp_path, SETTINGS, quiet=True) for seed in (0, 1)
    ]
    assert all(name in ("before", *evidence.ARMS) for name in results[0])
    before, curated = results[0]["before"], results[0]["curated"]
    assert curated["loss"]["mean"] < before["loss"]["mean"]
    assert curated["loss"]["mean"] != results[0]["curated, flat"]["loss"]["mean"]
    text = section(results, SETTINGS, "the command", torch.float32)
    assert f"{(before['loss']['mean'] + results[1]['before']['loss']['mean']) / 2:.4f}" in text
    assert "| random, right | 100% |" in text
    monkeypatch.setattr(evidence, "distill", lambda *_, **__: pytest.fail("a finished part was repeated"))
    assert evidence.run_seed(model, tokenizer, pool, TASKS, 0, tmp_path, SETTINGS, quiet=True) == results[0]
    with pytest.raises(ValueError, match=r"rate 0\.01, now it is 0\.02"):
        evidence.run_seed(model, tokenizer, pool, TASKS, 0, tmp_path, replace(SETTINGS, rate=0.02), quiet=True)


@pytest.mark.slow
def test_every_setting_respects_its_budget(tmp_path: Path) -> None:
    model, tokenizer = roomy_model(), tiny_tokenizer()
    adapter = SparseAdapter.attach(model, 0.05, placement="random")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    adapter.fold()
    problems = [Problem("toy", f"What is {i} plus {i}?", str(2 * i), {}) for i in range(3)]
    budgets = (300, 400)
    cells = scaling.measure(model, tokenizer, adapter, problems, budgets, tmp_path)
    assert set(cells) == {(s, b, name) for s in scaling.SIDES for b in budgets for name in scaling.SETTINGS}
    for (_, budget, setting), cell in cells.items():
        assert all(0 < tokens <= budget for tokens in cell["tokens"])
        assert setting != "plain" or not any(cell["interventions"])
        assert setting != "wrap up" or any(cell["interventions"])
    text = scaling.section(cells, budgets, len(problems), "the command", torch.float32, "scaling.png")
    assert "| 300 | 0.0% (" in text
    assert text.count("| before |") == len(scaling.SETTINGS) - 1
    for budget in budgets:
        cells["after", budget, "plain"]["solved"] = [1.0] * len(problems)
    figure = scaling.draw(cells, budgets)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_ylim()[1] >= 100  # one scale for both sides, whichever is drawn first


def test_votes_count_every_sample_once_in_groups() -> None:
    """Three problems: always right, right in three of four samples, wrong but once."""
    results = [
        Result(Problem("toy", f"{i}?", "1", {}), Completion(f"<answer>{x}</answer>", 5, False), float(x == 1), sample)
        for i, answers in enumerate([(1, 1, 1, 1), (2, 1, 1, 1), (3, 3, 1, 4)])
        for sample, x in enumerate(answers)
    ]
    assert votes.voted(results, 1) == [1, 0.75, 0.25]
    assert votes.voted(results, 2) == [1, 0.5, 0.5]  # of a tie, the first one given
    assert votes.voted(results, 4) == [1, 1, 0]
    assert summarize_samples(results)["pass@4"] == 1
    greedy = [result for result in results if result.sample == 0]
    text = votes.section(greedy, results, {"samples": 4, "temperature": 0.6, "top_p": 0.95}, "the command")
    assert "| greedy | 5 | | 33.3% | |" in text
    assert "| 4 | 20 | 100.0% | 66.7% | +33.3 (" in text
    assert votes.draw(greedy, results).axes[0].get_ylim()[0] == 0
