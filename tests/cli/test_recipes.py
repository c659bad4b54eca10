"""The commands of docs/recipes.md, on small files in the formats they name and tiny students."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
from thinking_students import save_student

from rbfast.cli.main import _parser, main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
LINES = re.findall(r"^rbfast .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
SMALLER = {
    "--max-new-tokens": "8",
    "--size": "4",
    "-n": "2",
    "--processes": "1",
    "--budget": "300",
    "--max-tokens": "2000",
    "--rounds": "3",
}


def s1k(n: int) -> dict:
    thought = (
        f"Let me add {n} and {3 * n}.\n\nFirst, {n} + {3 * n} = {4 * n}. Let me check: {4 * n} - {n} = {3 * n}. Right."
    )
    return {
        "question": f"A shop sells {n} pens and {3 * n} pencils on day {n * n}. How many things is that?",
        "solution": str(4 * n),
        "cot_type": "math",
        "deepseek_thinking_trajectory": thought,
        "deepseek_attempt": f"Together they are $\\boxed{{{4 * n}}}$.",
        "gemini_thinking_trajectory": "I guess.",
        "gemini_attempt": "\\boxed{1}",
        "deepseek_grade": "Yes",
        "gemini_grade": "No",
    }


WORDS = ["triangle", "orchard", "ledger", "violin", "harbour", "comet", "lantern", "bakery", "glacier", "puzzle"]


def openr1(n: int) -> dict:
    product = (n + 2) * (n + 5)
    steps = f"The {WORDS[n]} has {n + 2} rows.\n\nSo {n + 2} * {n + 5} = {product}. Wait, let me check. Yes."
    reply = f"<think>\n{steps}\n</think>\n\nThe product is $\\boxed{{{product}}}$."
    return {
        "problem": f"The {WORDS[n]} of {WORDS[-1 - n]} {n} holds {n + 2} rows of {n + 5} seats; how many is that?",
        "answer": str(product),
        "problem_type": "Algebra",
        "generations": [reply, reply.replace("So", "Thus"), "<think>\nHm"],
        "correctness_math_verify": [True, False, False],
        "is_reasoning_complete": [True, True, False],
    }


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Stand-ins for the data sets and models of the page."""
    monkeypatch.chdir(tmp_path)
    tests = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3)]
    write(Path("problems.jsonl"), tests)
    write(Path("own.jsonl"), [{"problem": "3+3?", "reasoning": "I add.\n3+3=6", "answer": "6"}] * 3)
    write(Path("taught/traces.jsonl"), [{"problem": "2+2?", "reasoning": "I add.\n2+2=4", "answer": "4"}] * 3)
    return {
        "simplescaling/s1K-1.1": write(Path("s1k11.jsonl"), [s1k(n) for n in range(2, 10)]),
        "open-r1/OpenR1-Math-220k": write(Path("openr1.jsonl"), [openr1(n) for n in range(10)]),
        "aime25": "problems.jsonl",
        "math-500": "problems.jsonl",
        "Qwen/Qwen2.5-7B-Instruct": str(save_student(tmp_path / "qwen2.5", "qwen2.5")),
        "Qwen/Qwen3-8B": str(save_student(tmp_path / "qwen3", "qwen3")),
        "Qwen/Qwen3-32B": str(save_student(tmp_path / "qwen3-32b", "qwen3")),
    }


def solve(tries: Path) -> None:
    """Makes the first sample of every problem right: the tiny student solves none."""
    results = [json.loads(line) for line in tries.read_text().splitlines()]
    for result in results:
        if result["sample"] == 0:
            reply = f"<think>\nI add the two.\n</think>\n\nThe sum is $\\boxed{{{result['answer']}}}$."
            result |= {"completion": reply, "correct": True, "score": 1.0, "truncated": False}
    write(tries, results)


def smaller(words: list[str]) -> list[str]:
    options = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "distill":
        options += ["--dtype", "float32", "--device", "cpu"]
    is_new = words[0] == "distill" and "--adapter" not in words
    return [*options, *(["--density", "0.1"] if is_new else [])]


@pytest.mark.slow
def test_every_command_of_the_page_runs(names, capsys):
    ran = []
    for line in LINES:
        words = [names.get(word, word) for word in shlex.split(line)[1:]]
        if words[0] == "teach":
            continue  # needs a provider
        assert main(smaller(words)) == 0, f"{line}\n{capsys.readouterr().err}"
        ran.append(words[0])
        if words[0] == "eval" and "tries.jsonl" in words:
            solve(Path("tries.jsonl"))
    assert set(ran) == {"convert", "distill", "eval", "report", "merge", "curate", "solve"}
    assert len(Path("s1k.jsonl").read_text().splitlines()) == 8
    assert {json.loads(line)["teacher"] for line in Path("s1k.jsonl").read_text().splitlines()} == {"deepseek"}
    assert len(Path("reason1k/reason1k.jsonl").read_text().splitlines()) == 4
    right = [json.loads(line) for line in Path("right/reason1k.jsonl").read_text().splitlines()]
    assert [trace["verified"] for trace in right] == [True] * 2
    assert "\\boxed{}" in json.loads(Path("s1k-7b/prompt.json").read_text())["instruction"]


def test_provider_command_of_the_page_is_valid():
    [line] = [line for line in LINES if line.startswith("rbfast teach")]
    parser = _parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if "--provider" not in commands.choices["teach"].format_help():
        pytest.skip("this build only queries OpenAI-compatible servers")
    args = parser.parse_args(shlex.split(line)[1:])
    assert args.provider == "anthropic" and args.max_cost == 20.0
