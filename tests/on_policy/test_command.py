"""`rbfast distill --rounds`, the command for on-policy rounds."""

import json
import re
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cli_jobs import Setup
from openai_server import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from rbfast.cli.main import main
from rbfast.on_policy import rounds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "on_policy.md"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    made = Setup(tmp_path_factory.mktemp("models"), "cpu")
    made.prepare()
    return made


def distill(setup, out, *options):
    folder = setup.folder
    line = [
        f"{folder}/models/student",
        f"{folder}/problems.jsonl",
        "-o",
        f"{out}",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    return main(["distill", *line, "--density", "0.2", "--batch-size", "3", *options])


def round_options(setup, *options):
    return ("--teacher", f"{setup.folder}/models/teacher", "--rounds", "2", "--max-new-tokens", "4", *options)


def test_command_writes_trains_and_reports(setup, tmp_path, capsys):
    assert distill(setup, tmp_path / "run", *round_options(setup, "--samples", "2")) == 0
    output, progress = capsys.readouterr()
    assert (
        re.search(r"round 1 of 2: 12 completions of 4 tokens, \d+% cut off, 0% right", progress)
        and "round 2 of 2" in progress
    )
    assert "steps: 8" in output and "trained: 24" in output and "last_loss_answer:" in output
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert settings["objective"] == settings["objective"] | {"beta": 1.0, "ce_share": 0.0}
    assert settings["on_policy"] == {
        "rounds": 2, "epochs": 1.0, "samples": 2, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"losses.png", "adapter_config.json", "samples"}
    assert main(["report", f"{tmp_path}/run", "-o", f"{tmp_path}/report.html"]) == 0


def test_plan_is_printed_and_nothing_written(setup, tmp_path, capsys):
    assert distill(setup, tmp_path / "run", *round_options(setup, "--plan", "--samples", "2")) == 0
    assert "of key-value cache" in capsys.readouterr().out
    assert not (tmp_path / "run").exists() and not Path("samples").exists()


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_teacher_may_be_on_a_server(setup, tmp_path, capsys, dialect):
    student, teacher = (f"{setup.folder}/models/{name}" for name in ("student", "teacher"))
    with serving(
        AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(student)
    ) as server:
        options = ("--server", f"http://127.0.0.1:{server.port}/v1", "--dialect", dialect, "-k", "7")
        assert distill(setup, tmp_path / "run", *round_options(setup, *options)) == 0
    assert "round 2 of 2" in capsys.readouterr().err
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert settings["on_policy"]["top_k"] == 7 and settings["teacher"] == teacher
    wanted = {"vllm": "prompt_logprobs", "sglang": "top_logprobs_num"}[dialect]
    assert {request[wanted] for request in server.requests} == {7}
    assert main(["report", f"{tmp_path}/run", "-o", f"{tmp_path}/report.html"]) == 0


def test_unreachable_server_is_reported(setup, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        assert distill(setup, tmp_path / "run", *round_options(setup, "--server", url)) == 1
    assert url in capsys.readouterr().err


def test_beta_selects_another_divergence(setup, tmp_path):
    assert distill(setup, tmp_path, *round_options(setup, "--beta", "0.5", "--json")) == 0
    assert json.loads((tmp_path / "run.json").read_text())["objective"]["beta"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "2"), "--rounds needs --teacher"),
        (("--samples", "2"), "--samples needs --rounds"),
        (("--max-new-tokens", "9"), "--max-new-tokens needs --rounds"),
        (("--sample-batch-size", "9"), "--sample-batch-size needs --rounds"),
        (("--teacher", "x", "--server", "http://localhost/v1"), "--server needs --rounds"),
        (("-k", "9"), "-k needs --rounds"),
        (("--rounds", "2", "--teacher", "x", "-k", "9"), "-k needs --server"),
        (("--rounds", "2", "--teacher", "x", "--concurrency", "9"), "--concurrency needs --server"),
        (("--rounds", "2", "--teacher", "x", "--dialect", "sglang"), "--dialect needs --server"),
        (("--rounds", "2", "--teacher", "x", "--server", "localhost"), "url must look like http://host:8000/v1"),
        (("--rounds", "2", "--server", "http://localhost/v1"), "--rounds needs --teacher"),
        (("--rounds", "2", "--signals", "x"), "--signals has no meaning with --rounds"),
        (("--rounds", "2", "--held-out", "0.1"), "--held-out has no meaning with --rounds"),
        (("--rounds", "2", "--teacher", "x", "--ce-weight", "0.5"), "ce_share (--ce-weight) must be 0, got 0.5"),
        (("--rounds", "2", "--teacher", "x", "--max-tokens", "99"), "max_tokens (--max-tokens) is for traces"),
    ],
    ids=str,
)
def test_conflicting_options_are_refused_before_loading(setup, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr("rbfast.cli.train._load_models", None)
    assert distill(setup, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_reports_where_the_run_will_resume(setup, tmp_path, capsys, monkeypatch):
    def stop(self, number, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds._Rounds, "start", stop)
    assert distill(setup, tmp_path, *round_options(setup)) == 130
    assert "the completions are kept; training: there is no checkpoint yet" in capsys.readouterr().err


def test_python_of_the_page_runs(setup, tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    model, tokenizer = setup.random_model(2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rbfast.models.student.load_student", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr("rbfast.models.student.load_teacher", lambda *_: setup.random_model(3)[0])
    tiny = partial(rounds.distill_on_policy, config=replace(rounds.DEFAULTS, density=0.2))
    monkeypatch.setattr(rounds, "distill_on_policy", tiny)
    (tmp_path / "problems.jsonl").write_text((setup.folder / "problems.jsonl").read_text())
    exec(block.replace("samples=2", "samples=2, max_new_tokens=4"), names := {})
    assert names["run"].traces == 24 and (tmp_path / "runs/own/log.json").exists()
