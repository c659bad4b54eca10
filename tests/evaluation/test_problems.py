"""Loading problems from generators, files, benchmarks and the hub."""

import json
import subprocess
import sys

import pytest
from real_inputs import ROOT, data_path

from rbfast.grading.grade import grade
from rbfast.grading.tasks import load_problems


@pytest.mark.slow
def test_generated_problems_are_distinct_and_the_same_in_every_process():
    pytest.importorskip("reasoning_gym")
    here = [problem.question for problem in load_problems("reasoning-gym:family_relationships", 5, seed=3)]
    assert len(set(here)) == 5
    code = (
        "import json; from rbfast.grading.tasks import load_problems;"
        "print(json.dumps([p.question for p in load_problems('family_relationships', 5, seed=3)]))"
    )
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT), "PATH": ""}
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert json.loads(output.stdout.splitlines()[-1]) == here


def test_neighbouring_seeds_share_no_problems():
    # The generators seed item i with seed + i: unspread, seeds 0 and 1 would share all items but one.
    pytest.importorskip("reasoning_gym")
    questions = [{problem.question for problem in load_problems("leg_counting", 40, seed=seed)} for seed in range(4)]
    assert len(set.union(*questions)) == 160


def test_excluded_questions_are_replaced():
    pytest.importorskip("reasoning_gym")
    first = load_problems("chain_sum", 10, seed=0)
    rest = load_problems("chain_sum", 10, seed=0, exclude={problem.question for problem in first[:4]})
    assert rest[:6] == first[4:] and len(rest) == 10


def test_unknown_task_and_negative_count_are_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="reasoning-gym's generators, got 'leg_countin'"):
        load_problems("leg_countin", 3, seed=0)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        load_problems("leg_counting", -1, seed=0)


def test_problems_are_read_from_a_file(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [{"problem": f"p{i}", "answer": str(i)} for i in range(9)] + [
        {"question": "q", "answer": "6*7 steps\n#### 42"}
    ]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])) + "\n\n")
    problems = load_problems(str(path), 10, seed=1)
    assert sorted(p.question for p in problems) == sorted([*(f"p{i}" for i in range(9)), "q"])
    assert next(p.answer for p in problems if p.question == "q") == "42"
    assert load_problems(str(path), 4, seed=1) == load_problems(str(path), 4, seed=1)
    with pytest.raises(ValueError, match=r"holds 9 usable problems, but 10 were requested"):
        load_problems(str(path), 10, seed=1, exclude={"q"})
    assert len(load_problems(str(path), 10, seed=1, exclude={"q"}, fewer=True)) == 9
    assert load_problems(str(path), 4, seed=1, fewer=True) == load_problems(str(path), 4, seed=1)


def test_unsupported_file_is_not_taken_for_a_hub_dataset(tmp_path):
    path = tmp_path / "set.xlsx"
    path.write_text("problem,answer\np,1\n")
    with pytest.raises(ValueError, match=r"set\.xlsx: expected a \.jsonl, \.json, \.parq"):
        load_problems(str(path), None, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"set\.jsonl:2, column 2: expected JSON"),
        ("[1]", r"set\.jsonl:2: expected a JSON object, got list"),
        ('{"answer": "1"}', r"set\.jsonl:2: problem: expected this field, got answer; name"),
        (
            '{"problem": "p", "answer": null}',
            r"set\.jsonl:2: answer: expected text or a number, got none; name its field",
        ),
    ],
)
def test_error_names_the_malformed_line(tmp_path, line, message):
    path = tmp_path / "set.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n' + line)
    with pytest.raises(ValueError, match=message):
        load_problems(str(path), 1, seed=0)


# ----------------------------------------------------------------------------------------------------- files, the hub


def test_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes('{"problem": "caf\u00e9", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"set\.jsonl:1: expected UTF-8, got byte 0xe9"):
        load_problems(str(path), 1, seed=0)


def test_benchmark_or_hub_id_selects_a_dataset_and_a_split(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split))
        return [{"problem": "p", "answer": "\\frac{1}{2}"}, {"problem": "q", "answer": "3"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems = load_problems("math-500", None, seed=0)
    assert [problem.answer for problem in problems] == ["\\frac{1}{2}", "3"]
    load_problems("gsm8k", 1, seed=0)
    for place in (
        "owner/name",
        "owner/name:validation",
        "owner/name:main:train",
        "owner/name:train[:9]+test[2:]",
        "owner/name:main:test[:100]",
    ):
        load_problems(place, 1, seed=0)
    assert calls == [
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("openai/gsm8k", "main", "test"),
        ("owner/name", None, "test"),
        ("owner/name", None, "validation"),
        ("owner/name", "main", "train"),
        ("owner/name", None, "train[:9]+test[2:]"),
        ("owner/name", "main", "test[:100]"),
    ]
    with pytest.raises(ValueError, match=r"generates endless problems: set n \(-n"):
        load_problems("leg_counting", None, seed=0)
    with pytest.raises(ValueError, match="one of reasoning-gym's generators, got 'leg_cuonting'"):
        load_problems("leg_cuonting", None, seed=0)


@pytest.mark.parametrize(
    "task", ["owner/name:", "owner/name::test", "owner/name:main:", "owner/name:a:b:c", "owner/name:test[", ":main:o/n"]
)
def test_malformed_hub_id_is_refused_before_the_hub_is_asked(monkeypatch, task):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **_: pytest.fail("asked the hub"))
    forms = r"\(owner/name, owner/name:split or owner/name:config:split\)"
    with pytest.raises(ValueError, match=rf"expected a \.jsonl, .* {forms}; there is no such file"):
        load_problems(task, 1, seed=0)


def test_error_for_a_missing_config_says_how_to_name_it(monkeypatch):
    import datasets

    def load_dataset(name, config, split, streaming):
        raise ValueError("Config name is missing. Please pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"n \(split test\) .* \['main', 'socratic'\]; if .* name one: owner/name:config:split"
    ):
        load_problems("owner/n", 1, seed=0)
    with pytest.raises(ValueError, match=r"n \(config main, split test\) could not be loaded"):
        load_problems("owner/n:main:test", 1, seed=0)


@pytest.mark.parametrize(
    ("task", "place", "row"),
    [
        ("aime24", ("HuggingFaceH4/aime_2024", None, "train"), {"id": 61, "solution": "s", "url": "u", "year": "2024"}),
        ("aime25", ("math-ai/aime25", None, "test"), {"id": "0"}),
    ],
)
def test_aime_rows_are_read_as_they_are_on_the_hub(monkeypatch, task, place, row):
    import datasets

    calls = []
    rows = [row | {"problem": "Find $n$.", "answer": "025"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, split, **_: calls.append((*where, split)) or rows)
    [problem] = load_problems(task, None, seed=0)
    assert calls == [place] and problem.question == "Find $n$."
    assert [grade(problem, f"\\boxed{{{answer}}}") for answer in ("25", "025", "26")] == [1.0, 1.0, 0.0]


def test_real_benchmarks_are_read():
    math500 = load_problems(str(data_path("math500/math500_test.jsonl")), None, seed=0)
    assert len(math500) == 500
    for year, first in (("24", "204"), ("25", "70")):
        aime = load_problems(str(data_path(f"aime24_25/aime{year}.jsonl")), None, seed=0)
        assert len(aime) == 30 and aime[0].answer == first and all(0 <= int(p.answer) <= 999 for p in aime)
    assert len(load_problems(str(data_path("gsm8k/gsm8k_test.jsonl")), None, seed=0)) == 1319
