"""The closed-teacher recipe: real results become traces, and both experiments run on a tiny random student."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from experiments import closed_teacher
from experiments.closed_teacher import Recipe, fresh_problems, run_recipe
from experiments.closed_teacher_report import averaged, comparison_table
from experiments.teacher_results import (
    CORRECT,
    INCORRECT,
    OTHER,
    TEXT_AFTER,
    UNREASONED,
    UNTAGGED,
    one_per_problem,
    traces_from_results,
)
from publish import put_section
from real_inputs import data_path
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rbfast.data.answers import extract_answer
from rbfast.data.encoding import encode_all
from rbfast.data.trace import Trace
from rbfast.grading.grade import Problem, grade
from rbfast.training.trainer import DistillTrainer

# Of 150 completions per task, counted from the scores in the files.
CORRECT_COMPLETIONS = {
    "intermediate_integration": 104,
    "polynomial_equations": 87,
    "word_sorting": 120,
    "gcd": 150,
    "gsm_symbolic": 150,
    "codeio": 34,
    "number_sequence": 119,
    "countdown": 39,
    "mini_sudoku": 41,
    "advanced_geometry": 7,
    "shortest_path": 42,
    "list_functions": 122,
    "knights_knaves": 105,
    "propositional_logic": 74,
    "zebra_puzzles": 76,
}

# The verifier of that time accepted it; today's does not.
USES_A_NUMBER_TWICE = {"claude35_games__countdown:34:2"}


@pytest.fixture(scope="module")
def folder() -> Path:
    return data_path("reasoning_gym_claude35")


@pytest.fixture(scope="module")
def traces(folder: Path) -> list[Trace]:
    return traces_from_results(folder, "claude-3.5-sonnet")[0]


def results_of(folder: Path, trace: Trace) -> dict:
    """The file of a trace: its id names file, result and completion."""
    return json.loads((folder / f"{trace.id.split(':')[0]}.json").read_text())


def test_correct_completions_of_each_task_become_traces(folder: Path, traces: list[Trace]) -> None:
    _, fates = traces_from_results(folder, "claude-3.5-sonnet")
    assert Counter(trace.source for trace in traces) == CORRECT_COMPLETIONS
    assert fates == {
        task: Counter({CORRECT: kept, INCORRECT: 150 - kept}) - Counter() for task, kept in CORRECT_COMPLETIONS.items()
    }
    assert len({trace.id for trace in traces}) == len(traces)
    assert {trace.domain for trace in traces} == {
        "algebra",
        "algorithmic",
        "arithmetic",
        "code",
        "cognition",
        "games",
        "geometry",
        "graphs",
        "induction",
        "logic",
    }


def test_trace_matches_the_teachers_completion(folder: Path, traces: list[Trace]) -> None:
    files = {path.stem: json.loads(path.read_text())["results"] for path in folder.glob("*.json")}
    for trace in traces:
        stem, index, number = trace.id.split(":")
        item = files[stem][int(index)]
        completion = item["completions"][int(number)]
        assert completion["score"] >= 1
        assert trace == Trace.from_dict(trace.to_dict())
        assert trace.verified
        assert trace.teacher == "claude-3.5-sonnet"
        assert trace.problem == item["question"]
        assert trace.completion().endswith(f"\n\n<answer>{completion['model_answer']}</answer>")
        assert extract_answer(trace.completion()) == completion["model_answer"]
        assert "".join(trace.completion().split()) == "".join(completion["full_model_response"].split())


@pytest.mark.slow
def test_each_tasks_verifier_accepts_its_traces(folder: Path, traces: list[Trace]) -> None:
    """If the installed generator still gives the question of the file, its entry grades the trace."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    checked: Counter[str] = Counter()
    refused = set()
    entries: dict[str, dict[str, dict]] = {}
    for trace in one_per_problem(traces):
        if trace.source not in entries:
            generated = reasoning_gym.create_dataset(trace.source, **results_of(folder, trace)["config"])
            entries[trace.source] = {entry["question"]: entry for entry in generated}
        # The only prompt that has changed since the files were made. codeio now draws from another pool.
        question = trace.problem.replace("find the length of the shortest path", "find the shortest path")
        if entry := entries[trace.source].get(question):
            problem = Problem(trace.source, question, str(entry["answer"]), entry)
            checked[trace.source] += 1
            if grade(problem, trace.completion()) < 1.0:
                refused.add(trace.id)
    assert checked.keys() == CORRECT_COMPLETIONS.keys() - {"codeio"}
    assert refused == USES_A_NUMBER_TWICE


def test_shortest_correct_completion_of_each_problem_is_chosen(traces: list[Trace]) -> None:
    chosen = one_per_problem(traces)
    assert len(chosen) == len({trace.problem for trace in traces}) == 495
    shortest = {trace.problem: len(trace.completion()) for trace in chosen}
    assert all(shortest[trace.problem] <= len(trace.completion()) for trace in traces)


def write_results(folder: Path, *completions: dict, question: str = "1 + 1?") -> Path:
    path = folder / "task.json"
    results = [{"question": question, "completions": list(completions)}]
    path.write_text(json.dumps({"name": "task", "category": "sums", "results": results}))
    return path


@pytest.mark.parametrize(
    ("response", "more", "fate"),
    [
        ("One more. <answer> 2 </answer>\n", {}, CORRECT),
        ("One more. <answer>2</answer>", {"model_answer": "2"}, CORRECT),
        ("I use <answer> tags. One more. <answer>2</answer>", {}, CORRECT),
        ("One more. <answer>2</answer> I am sure.", {}, TEXT_AFTER),
        ("One more. <answer>2", {}, UNTAGGED),
        ("It is 2.", {}, UNTAGGED),
        ("It is <answer> </answer>", {}, UNTAGGED),
        ("<answer>2</answer>", {}, UNREASONED),
        ("One more. <answer>2</answer>", {"model_answer": "two"}, OTHER),
        ("One more. <answer>2</answer>", {"model_answer": None}, OTHER),
        ("One more. <answer>2</answer>", {"score": 0.99}, INCORRECT),
    ],
)
def test_fate_of_a_completion(tmp_path: Path, response: str, more: dict, fate: str) -> None:
    write_results(tmp_path, {"full_model_response": response, "score": 1.0} | more)
    traces, fates = traces_from_results(tmp_path, "someone")
    assert fates == {"task": {fate: 1}}
    assert [trace.answer for trace in traces] == (["2"] if fate in (CORRECT, TEXT_AFTER) else [])
    assert all(trace.reasoning.endswith("One more.") for trace in traces)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "name is not a str"),
        ('{"name": "a", "category": "b"}', "results is not a list"),
        ('{"name": "a", "category": "b", "results": [{"question": "q"}]}', "result 0: expected a question"),
        ('{"name": "a", "category": "b", "results": [{"question": "q", "completions": [{"score": 1}]}]}', "result 0"),
    ],
)
def test_file_without_results_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        traces_from_results(tmp_path, "someone")
    assert "bad.json" in str(error.value)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder of \.json files"):
        traces_from_results(tmp_path, "someone")


# The pipeline in a toy size: two tasks, a byte-level tokenizer, two layers.

RECIPE = Recipe(
    student="tiny",
    held_out=2,
    train=4,
    compare_tokens=700,
    rates=(1e-2, 3e-2),
    lora_rates=(1e-2,),
    density=0.05,
    batch_size=2,
    tokens=700,
    problems=2,
    max_new_tokens=4,
    compare_seeds=2,
)


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> Path:
    """Eight results of each of two tasks."""
    (tmp_path / "data").mkdir()
    for name in ("claude35_arithmetic__gcd.json", "claude35_cognition__number_sequence.json"):
        results = json.loads((folder / name).read_text())
        (tmp_path / "data" / name).write_text(json.dumps(results | {"results": results["results"][:8]}))
    return tmp_path / "data"


def student() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("peft")
    model = tiny_model()
    model.config.max_position_embeddings = 2048
    return model, tiny_tokenizer()


@pytest.mark.slow
def test_pipeline_runs_both_experiments_and_resumes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[list[int]]] = []
    compute_loss, train = DistillTrainer.compute_loss, DistillTrainer.train

    def watch_run(self: DistillTrainer, *args: object, **kwargs: object) -> object:
        batches.append([])
        return train(self, *args, **kwargs)

    def watch_batch(self: DistillTrainer, model: object, inputs: dict, *args: object, **kwargs: object) -> object:
        batches[-1].append(inputs["input_ids"][0].tolist())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "train", watch_run)
    monkeypatch.setattr(DistillTrainer, "compute_loss", watch_batch)
    out = tmp_path / "out"
    model, tokenizer = student()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    text = run_recipe(model, tokenizer, data, out, RECIPE, "the command", quiet=True)

    results = [
        [json.loads(path.read_text())["result"] for path in sorted((out / "compare" / seed).glob("*.json"))]
        for seed in ("0", "1")
    ]
    before = next(entry for entry in results[0] if entry["method"] == "before")
    trained = [entry for entry in results[0] if entry["method"] != "before"]
    swept = [(method, rate) for method in ("columns by gradient", "rbfast") for rate in (0.01, 0.03)]
    assert sorted((e["method"], e["rate"]) for e in trained) == [("LoRA", 0.01), *swept]
    parameters = sum(p.numel() for p in tiny_model().parameters())
    for entry in trained:
        assert entry["mean"] < before["mean"]
        assert f"{entry['mean']:.4f}" in text
        assert entry["values"] > 0
    assert all(e["values"] <= RECIPE.density * parameters for e in trained if e["method"] != "LoRA")
    assert batches[0] == batches[1] == batches[2] == batches[3] == batches[4]  # all runs of a seed see the same batches
    assert batches[5] == batches[6] == batches[7] == batches[8] == batches[9] != batches[0]
    assert len(batches[0]) == 2
    assert len(batches) == 11

    chosen = one_per_problem(traces_from_results(data, RECIPE.teacher)[0])
    fitting, _ = encode_all(chosen, tokenizer, max_tokens=RECIPE.tokens)
    training = json.loads((out / "training.json").read_text())["result"]
    assert training["traces"] == len(fitting) > RECIPE.train
    assert training["steps"] == len(batches[10]) == -(-len(fitting) // 2)
    rates = {e["rate"]: [e["mean"]] for e in results[0] if e["method"] == "rbfast"}
    for entry in (e for e in results[1] if e["method"] == "rbfast"):
        rates[entry["rate"]].append(entry["mean"])
    assert training["rate"] == min(rates, key=lambda rate: sum(rates[rate]))
    solved = {when: json.loads((out / f"{when}.json").read_text())["result"] for when in ("before", "after")}
    questions = {when: [record["problem"] for record in records] for when, records in solved.items()}
    assert questions["before"] == questions["after"]
    assert len(set(questions["before"])) == 4
    assert not set(questions["before"]) & {trace.problem for trace in chosen}
    assert any(a["completion"] != b["completion"] for a, b in zip(solved["before"], solved["after"], strict=True))
    for row in ("| gcd | ", "| number_sequence | ", f"| **all** | {len(fitting)} | 4 | "):
        assert row in text
    assert "`the command`" in text
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    monkeypatch.setattr(DistillTrainer, "train", lambda *_, **__: pytest.fail("a finished run was repeated"))
    monkeypatch.setattr(closed_teacher, "evaluate", lambda *_, **__: pytest.fail("a finished part was repeated"))
    assert run_recipe(*student(), data, out, RECIPE, "the command", quiet=True) == text
    with pytest.raises(ValueError, match="max_new_tokens 4, now it is 5"):
        run_recipe(*student(), data, out, replace(RECIPE, max_new_tokens=5), "the command", quiet=True)


def test_too_few_traces_are_refused_with_a_hint(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower --train"):
        run_recipe(*student(), data, tmp_path / "out", replace(RECIPE, train=1000), "", quiet=True)


def test_fresh_problems_exclude_trained_ones() -> None:
    pytest.importorskip("reasoning_gym")
    drawn = fresh_problems(["gcd"], [], RECIPE)
    seen = Trace(drawn[0].question, "reasoning", "answer")
    again = [problem.question for problem in fresh_problems(["gcd"], [seen], RECIPE)]
    assert seen.problem not in again
    assert len(again) == RECIPE.problems


def test_lowest_loss_is_bold_and_a_rate_at_the_edge_is_noted() -> None:
    def entry(method: str, rate: float | None, mean: float) -> dict:
        return {
            "method": method,
            "rate": rate,
            "values": 9,
            "strategic": 1.0,
            "tactical": 1.0,
            "answer": 1.0,
            "mean": mean,
            "seconds": 1.0,
        }

    middle = [entry("rbfast", 0.1, 0.7), entry("rbfast", 0.2, 0.5), entry("rbfast", 0.3, 0.9)]
    middle.append(entry("columns by gradient", 0.1, 0.75))
    first = [entry("before", None, 2.0), *middle, entry("LoRA", 0.1, 0.6), entry("LoRA", 0.2, 0.7)]
    second = [entry("before", None, 2.0), *middle, entry("LoRA", 0.1, 0.8), entry("LoRA", 0.2, 0.9)]
    entries = averaged([first, second])
    assert entries[0]["seconds"] == 2.0
    table = comparison_table(entries)
    assert "| rbfast | 9 | 0.2 | **1.0000** | **1.0000** | **1.0000** | **0.5000** | 0.5000, 0.5000 |" in table
    assert "| 0.7000 | 0.6000, 0.8000 |" in table
    assert "Best of rbfast: 0.5000 at 0.2.\n" in table
    assert "Best of LoRA: 0.7000 at 0.1 (the lowest tried: its best may lie beyond).\n" in table
    assert "rbfast minus columns by gradient there: -0.2500 (-0.2500, -0.2500).\n" in table
    assert table.endswith("rbfast minus LoRA there: -0.2000 (-0.1000, -0.3000).")


def test_section_is_replaced_and_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "results.md"
    put_section(path, "x", "first")
    assert path.read_text() == "# Results\n\n<!-- x -->\nfirst\n<!-- /x -->\n"
    path.write_text("above\n<!-- x -->\nfirst\n<!-- /x -->\n\n<!-- y -->\nother\n<!-- /y -->\nbelow")
    put_section(path, "x", "second\n")
    assert path.read_text() == "above\n<!-- x -->\nsecond\n<!-- /x -->\n\n<!-- y -->\nother\n<!-- /y -->\nbelow"
    put_section(path, "z", "third")
    assert path.read_text().endswith("<!-- /y -->\nbelow\n\n<!-- z -->\nthird\n<!-- /z -->\n")


@pytest.mark.parametrize(
    "text", ["<!-- x -->", "<!-- /x -->", "<!-- /x --><!-- x -->", "<!-- x --><!-- x --><!-- /x -->"]
)
def test_malformed_markers_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected one <!-- x -->"):
        put_section(path, "x", "text")
    assert path.read_text() == text


def test_every_setting_is_an_option_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        closed_teacher.main(["--help"])
    shown = capsys.readouterr().out
    for name in asdict(Recipe()):
        assert "--" + name.replace("_", "-") in shown


def test_wrong_folder_exits_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_teacher, "load_student", lambda *_: student())
    results = tmp_path / "results.md"
    assert closed_teacher.main(["--data", str(tmp_path), "--out", str(tmp_path), "--results", str(results)]) == 2
    assert "expected a folder of .json files" in capsys.readouterr().err
    assert not results.exists()
