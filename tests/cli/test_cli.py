"""The command line as a person would use it, on a tiny random model saved to disk."""

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_cache import add_repository, use_hub_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny_model_for
from tiny_models import llama
from transformers import PreTrainedTokenizerBase

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.cli.common import read_and_report_traces
from rbfast.cli.infer import _label
from rbfast.cli.main import _parser, main
from rbfast.cli.train import _distill_config, _summarize_run
from rbfast.cli.transcript import Transcript
from rbfast.data.readers import read_traces, write_traces
from rbfast.data.trace import Trace
from rbfast.models.student import load_student
from rbfast.training.checkpoints import write_digests
from rbfast.training.distill import DistillConfig, Run
from rbfast.utils.files import lock_folder


@pytest.fixture(scope="module")
def model_folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model_for(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def traces(tmp_path: Path) -> str:
    path = tmp_path / "traces.jsonl"
    write_traces(
        path,
        [
            Trace(
                problem=f"What is {n} + 1?", plan="Count on by one.", reasoning=f"{n} + 1 = {n + 1}", answer=str(n + 1)
            )
            for n in range(12)
        ],
    )
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_info_names_an_implementation_for_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert all(how.startswith(("native", "reference")) for how in facts["ops"].values())
    if facts["cpu_isa"] is not None:  # otherwise the last line gives the reason
        assert all(how != "reference" for how in facts["ops"].values()), "an op uses the reference without a reason"
    assert "column_grad" in facts["ops"]
    shown = call(capsys, "info")[1]
    assert shown.count("\n") > len(facts["ops"]) and "None" not in shown


def test_info_explains_an_invalid_instruction_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads(call(capsys, "info", "--json")[1])
    if "reference" in facts["ops"].values():
        pytest.skip("the native CPU ops are not built")
    monkeypatch.setenv("RBFAST_CPU_ISA", "neon")
    facts = json.loads(call(capsys, "info", "--json")[1])
    assert facts["cpu_isa"] is None
    assert facts["cpu_isa_reason"] == "RBFAST_CPU_ISA must be scalar, avx2, avx512, avx512_bf16 or amx, got neon"
    assert facts["ops"]["column_grad"] == "none (RBFAST_CPU_ISA is invalid)"
    shown = call(capsys, "info")[1]
    is_reference = facts["text"] == "reference"
    assert ("native CPU code, which is far faster, is not built" in shown) == is_reference and "None" not in shown


@pytest.mark.parametrize(
    ("capability", "native", "triton"),
    [
        (
            (7, 5),
            "none (the CUDA C++ needs sm_80, this GPU is sm_75: ",
            "reference (the Triton kernel needs sm_80, this GPU is sm_75)",
        ),
        ((8, 0), "CUDA C++", "triton (3.6.0)"),
    ],
)
def test_info_reports_an_unsupported_gpu(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    native: str,
    triton: str,
) -> None:
    kinds = {"a": "CUDA C++", "b": "torch.mm"} | dict.fromkeys(("column_grad", "scaled_"), "triton (3.6.0)")
    kinds |= {"grouped_column_linear_": "triton (3.6.0)", "column_linear_": "CUDA C++"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("rbfast.ops.is_old_gpu", lambda device: capability < (8, 0))
    monkeypatch.setattr("rbfast.ops.implementations", lambda device="cpu": kinds)
    ops = json.loads(call(capsys, "info", "--json")[1])["gpu_ops"]
    assert ops["a"].startswith(native) and ops["b"] == "torch.mm"
    assert ops["grouped_column_linear_"].startswith(native if capability < (8, 0) else "triton")
    assert ops["column_grad"] == triton and ops["scaled_"] == "triton (3.6.0)"


def test_info_of_a_model_reports_the_size_of_its_adapter(capsys: pytest.CaptureFixture[str], model_folder: str) -> None:
    code, out, _ = call(capsys, "info", model_folder, "--json")
    facts, model = json.loads(out), load_student(model_folder, torch.float32)[0]
    adapter = SparseAdapter.attach(model)
    assert code == 0
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["matrices"] == len(adapter.sites())
    assert facts["trained_values"] == sum(parameter.numel() for parameter in adapter.parameters())
    assert facts["adamw_bytes"] == adapter.footprint().adamw
    output = call(capsys, "info", model_folder)[1]
    assert f"{facts['parameters']:,} parameters" in output
    assert f"({facts['share_of_base']:.1%})" in output


def test_info_of_a_model_too_small_for_an_adapter_says_whose_options_help(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path)
    code, out, err = call(capsys, "info", str(tmp_path))
    assert (code, out) == (2, "")
    assert "raise density (`rbfast distill --density`) or name fewer targets (`--targets`)" in err


def test_from_traces_to_a_merged_model_and_a_lora(
    capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    distill = ["distill", model_folder, traces, "-o", run, "--density", "0.01", "--dtype", "float32", "--json"]
    code, out, err = call(capsys, *distill)
    result = json.loads(out)
    assert "already" not in out + err
    assert code == 0
    assert result["trained"] == 12
    assert 0 < result["trainable_percent"] <= 1.0
    assert not (tmp_path / "run" / "checkpoints").exists()
    code, out, err = call(capsys, *distill)
    again = json.loads(out)
    assert code == 0 and again["already_finished"] is True
    assert f"already finished: the adapter is in {run}, nothing was trained;" in err
    assert again["last_loss_tactical"] == result["last_loss_tactical"]
    assert again["seconds"] == result["seconds"]  # of the training, not of this call

    records = tmp_path / "completions.jsonl"
    code, out, _ = call(
        capsys, "eval", model_folder, "--adapter", run, "--task", "leg_counting", "-n", "2",
        "--max-new-tokens", "4", "--json", "-o", str(records),
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["leg_counting"]["n"] == 2
    assert len(records.read_text().splitlines()) == 2

    page = tmp_path / "report.html"
    records.rename(tmp_path / "run" / records.name)
    assert call(capsys, "report", run, "-o", str(page))[:2] == (0, f"wrote {page}\n")
    assert f"{result['trainable_percent']:.3f}% of " in page.read_text(encoding="utf-8")

    code, _, _ = call(capsys, "merge", model_folder, run, "-o", str(tmp_path / "merged"), "--dtype", "float32")
    assert code == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    code, _, _ = call(capsys, "export-lora", model_folder, run, "-o", str(tmp_path / "lora"), "--dtype", "float32")
    assert code == 0
    header = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (header["peft_type"], header["base_model_name_or_path"]) == ("LORA", None)  # not a path of this machine

    saved = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    base = {path.name: path.read_bytes() for path in Path(model_folder).iterdir()}
    for command, folder in (
        ("export-lora", run),
        ("export-lora", model_folder),
        ("merge", run),
        ("merge", str(tmp_path / "lora")),
        ("merge", os.path.relpath(model_folder)),
    ):
        code, _, err = call(capsys, command, model_folder, run, "-o", folder, "--dtype", "float32")
        assert code == 2 and "name another folder" in err
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == saved
    assert {path.name: path.read_bytes() for path in Path(model_folder).iterdir()} == base


def test_exported_lora_runs_on_a_written_base(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base, lora, saved = (str(tmp_path / name) for name in ("base", "lora", "saved"))
    assert call(capsys, "merge", model_folder, "--base-only", "-o", base, "--dtype", "float32")[0] == 0
    model, tokenizer = load_student(base, torch.float32)
    expected = load_student(model_folder, torch.float32)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    adapter = SparseAdapter.attach(model, density=0.05)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    ids = tokenizer("What is 2 + 2?", return_tensors="pt").input_ids
    logits = model(ids).logits
    adapter.save_pretrained(saved)
    code, _, _ = call(capsys, "export-lora", base, saved, "-o", lora, "--base", base, "--dtype", "float32")
    assert code == 0
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(lora, dtype=torch.float32)(ids).logits
    assert torch.dist(theirs, logits) <= 1e-4 * logits.norm()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": 48}, r"where .*_proj is .*, not "),
        ({"model_type": "gpt2"}, r"whose linear layer .*_proj is not in this model"),
        ({"vocab_size": 77}, "its vocabulary has 77 tokens, not"),
    ],
)
def test_export_lora_refuses_an_unsuitable_base(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path, change: dict, complaint: str
) -> None:
    SparseAdapter.attach(load_student(model_folder, torch.float32)[0], density=0.05).save_pretrained(tmp_path / "run")
    (tmp_path / "base").mkdir()
    config = json.loads((Path(model_folder) / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | change))
    code, _, err = call(
        capsys, "export-lora", model_folder, str(tmp_path / "run"),
        "-o", str(tmp_path / "lora"), "--base", str(tmp_path / "base"), "--dtype", "float32",
    )  # fmt: skip
    assert code == 2 and "not the base of this adapter" in err and re.search(complaint, err)
    assert not (tmp_path / "lora").exists()


def test_unwritable_output_is_refused_before_any_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    folder, file, pipe = "the name of a folder, found a file", "the name of a file, got '-'", "found a device or a pipe"
    for words, out, complaint in (
        ("convert none.jsonl", "-", file),
        ("convert none.jsonl", tmp_path / "pipe", pipe),
        ("eval no/model --task none.jsonl", tmp_path / "pipe", pipe),
        ("eval no/model --task none.jsonl", tmp_path / "file" / "new", "expected a folder at"),
        ("report none", tmp_path / "pipe", pipe),
        ("curate none.jsonl", tmp_path / "file", folder),
        ("teach no/model none.jsonl", tmp_path / "file", folder),
        ("distill no/model none.jsonl", tmp_path / "file", folder),
        ("merge no/model none", tmp_path / "file", folder),
        ("export-lora no/model none", tmp_path / "file", folder),
        ("demo", tmp_path / "file", folder),
    ):
        with pytest.raises(SystemExit) as done:
            main([*words.split(), "--out", str(out)])
        assert done.value.code == 2
        assert complaint in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "old" and (tmp_path / "pipe").is_fifo()


def test_merge_takes_either_an_adapter_or_base_only(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path
) -> None:
    for given in ([], [str(tmp_path), "--base-only"]):
        code, _, err = call(capsys, "merge", model_folder, *given, "-o", str(tmp_path / "out"))
        assert code == 2 and "name an adapter to merge, or give --base-only" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_weights_match_the_trained_ones_bitwise(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, _ = load_student(model_folder, dtype)
    adapter = SparseAdapter.attach(model, density=0.05)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    adapter.save_pretrained(tmp_path / "run")
    adapter.merge()
    assert call(capsys, "merge", model_folder, str(tmp_path / "run"), "-o", str(tmp_path / "out"))[0] == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    trained = model.state_dict()
    assert merged and all(torch.equal(tensor, trained[name]) for name, tensor in merged.items())


def test_adapter_of_a_command_may_be_on_the_hub(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_folder: str, tmp_path: Path
) -> None:
    SparseAdapter.attach(load_student(model_folder, torch.float32)[0], density=0.05).save_pretrained(tmp_path / "run")
    add_repository(tmp_path / "cache", "owner/name", tmp_path / "run")
    use_hub_cache(monkeypatch, tmp_path / "cache")
    assert call(capsys, "export-lora", model_folder, "owner/name", "-o", str(tmp_path / "lora"))[0] == 0
    assert call(capsys, "merge", model_folder, "owner/name", "-o", str(tmp_path / "out"))[0] == 0
    arguments = ["eval", model_folder, "--adapter", "owner/name", "--task", "gsm8k"]
    label = _label(_parser().parse_args(arguments))
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        os.utime(file, ns=(0, 0))  # downloaded again
    assert _label(_parser().parse_args(arguments)) == label
    assert "owner/name" in label
    code, _, err = call(capsys, "merge", model_folder, "owner/other", "-o", str(tmp_path / "none"))
    assert code == 2 and "owner/other: expected the folder of an adapter or a hub id" in err


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    transcript = Transcript()
    transcript.write("think", "a\x1b]0;title\x07b\r\n\x9b2J")
    transcript.write("wait", "\x1b[2J")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\n\\x9b2J [wait] \\x1b[2J"
    code, _, error = call(capsys, "convert", "\x1b[2J.jsonl", "-o", "out.jsonl")
    assert code == 2 and "\\x1b[2J.jsonl" in error and "\x1b" not in error


def test_missing_answer_is_reported() -> None:
    assert Transcript(quiet=True).last_line(None, 88, 1, 0) == "answer: none (88 tokens)"


def test_solve_keeps_to_its_budget(capsys: pytest.CaptureFixture[str], model_folder: str) -> None:
    common = ["solve", model_folder, "What is 2 + 2?", "--budget", "120", "--minimum", "20", "--dtype", "float32"]
    code, out, _ = call(capsys, *common, "--json")
    solution = json.loads(out)["solutions"][0]
    assert code == 0
    assert solution["tokens"] <= 120
    assert "<answer>" in solution["text"]
    assert solution["thinking"] and not any("answer>" in solution[part] for part in ("thinking", "answer"))
    assert {event["kind"] for event in solution["events"]} & {"wrap up", "close", "wait"}

    code, out, _ = call(capsys, *common)
    shown = "".join(out.split())
    assert code == 0
    assert "".join(f"[{solution['events'][0]['kind']}]".split()) in shown
    assert out.rstrip().splitlines()[-1].startswith("answer: ")

    code, out, _ = call(capsys, *common, "--samples", "3", "--json")
    assert code == 0
    assert len(json.loads(out)["solutions"]) == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--budget", "0"], "budget must be at least 1, got 0"),
        (["--budget", "-3"], "budget must be at least 1, got -3"),
        (["--budget", "9"], "of a budget of 9: raise the budget to "),
        (["--server", "nowhere"], "url must look like http"),
    ],
)
def test_invalid_solve_options_are_refused(
    capsys: pytest.CaptureFixture[str], model_folder: str, options: list[str], complaint: str
) -> None:
    code, out, err = call(capsys, "solve", model_folder, "2 + 2?", *options)
    assert code == 2
    assert out == ""
    assert complaint in err


def test_failed_import_reports_its_cause(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:  # like transformers with a torchvision built for another torch
        raise ImportError("Could not import module 'PreTrainedModel'.") from RuntimeError("no torchvision::nms")

    monkeypatch.setattr("rbfast.models.student.load_without_weights", fail)
    code, out, err = call(capsys, "info", "some-model")
    assert (code, out) == (2, "")
    assert err == "rbfast info: error: Could not import module 'PreTrainedModel'. (no torchvision::nms)\n"


def test_problem_in_another_encoding_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("What is the café's bill?".encode("latin-1"))))
    code, out, err = call(capsys, "solve", "smollm2-135m", "-")
    assert (code, out) == (2, "")
    assert "problem: expected UTF-8 on stdin, got byte 0xe9" in err


def test_options_for_the_other_kind_of_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, complaint in (
        (["--server", "http://localhost:1/v1", "--adapter", "run"], "--adapter is for a local model"),
        (["--tokenizer", "owner/model"], "--tokenizer is for --server"),
    ):
        code, out, err = call(capsys, "solve", "model", "1 + 1?", *options)
        assert (code, out) == (2, "") and complaint in err


def test_eval_samples_and_resumes(capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path) -> None:
    problems, records = tmp_path / "set.jsonl", tmp_path / "records.jsonl"
    problems.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+2?", "answer": "3"}\n')
    common = ["eval", model_folder, "--task", str(problems), "-n", "2", "--max-new-tokens", "4", "--samples", "3"]
    code, out, _ = call(capsys, *common, "-o", str(records), "--json")
    assert code == 0
    [summary] = json.loads(out).values()
    assert (summary["items"], summary["samples"]) == (2, 3)
    assert {"pass@1", "pass@1_se", "pass@2", "pass@3", "majority@3", "truncated", "tokens"} <= set(summary)
    before = records.read_text()
    assert json.loads(call(capsys, *common, "-o", str(records), "--json")[1]) == {str(problems): summary}
    assert records.read_text() == before
    code, _, err = call(capsys, *common, "-o", str(records), "--top-p", "0.9")
    assert code == 2 and "its top_p is 1.0, now 0.9" in err
    code, _, err = call(capsys, "eval", model_folder, "--task", str(problems), "--top-p", "0.9")
    assert code == 2 and "--top-p is for sampling" in err


def test_repaired_rows_leave_the_list_of_unreadable_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, traces: str, tmp_path: Path
) -> None:
    args, listed = SimpleNamespace(format=None, map="", teacher_field=None, json=False), tmp_path / "unreadable.jsonl"
    whole = Path(traces).read_text()
    Path(traces).write_text(f"{whole}{{}}\n")
    read_and_report_traces(args, traces, listed)
    assert listed.exists()
    Path(traces).write_text(whole)
    read_and_report_traces(args, traces, listed)
    assert not listed.exists() and capsys.readouterr().err.count(f"{traces}: ") == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert read_and_report_traces(args, traces, listed) and not capsys.readouterr().err


def test_second_call_scoring_into_a_folder_is_refused(
    capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path
) -> None:
    with lock_folder(tmp_path / "out"):
        code, _, err = call(
            capsys, "teach", model_folder, traces, "-o", str(tmp_path / "out"), "--score", "--student", model_folder
        )
    assert code == 2 and "another process is using" in err


def test_eval_resumes_only_from_the_same_weights(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path
) -> None:
    weights = Path(shutil.copytree(model_folder, tmp_path / "model")) / "model.safetensors"
    (problems := tmp_path / "problems.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    command = [
        "eval",
        str(weights.parent),
        "--task",
        str(problems),
        "--max-new-tokens",
        "1",
        "-o",
        str(tmp_path / "o.jsonl"),
    ]
    assert [call(capsys, *command)[0] for _ in range(2)] == [0, 0]
    args = SimpleNamespace(model=str(weights.parent), dtype=None, load_in=None, server=None, adapter=None)
    quantised = SimpleNamespace(**vars(args) | {"load_in": "4bit"})
    assert _label(args) != _label(quantised)
    assert _label(args) != _label(SimpleNamespace(**vars(args) | {"dtype": "bfloat16"}))
    adapter = SparseAdapter.attach(load_student(model_folder, torch.float32)[0], density=0.05)
    adapter.save_pretrained(tmp_path / "adapter")
    adapted = SimpleNamespace(**vars(args) | {"adapter": str(tmp_path / "adapter")})
    before = _label(adapted)
    assert before != _label(args)
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    adapter.save_pretrained(tmp_path / "adapter")
    assert before.split()[-1] != _label(adapted).split()[-1]
    before = _label(args)
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert before != _label(args)
    code, _, err = call(capsys, *command)
    assert code == 2 and "results with another model" in err
    (gguf := tmp_path / "model.gguf").touch()
    of_file = SimpleNamespace(**vars(args) | {"model": str(gguf)})
    before = _label(of_file)
    os.utime(gguf, ns=(0, gguf.stat().st_mtime_ns + 1))
    assert _label(of_file) != before


def test_eval_takes_50_problems_or_all_of_a_smaller_task(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path
) -> None:
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    for path, size in ((few, 2), (many, 51)):
        path.write_text("".join(f'{{"problem": "{i}+1?", "answer": "{i + 1}"}}\n' for i in range(size)))

    def counts(*words: str) -> list[int]:
        tasks = ["--task", str(few), "--task", str(many)]
        code, out, _ = call(capsys, "eval", model_folder, *tasks, "--max-new-tokens", "1", "--json", *words)
        return [task["n"] for task in json.loads(out).values()] if code == 0 else []

    assert counts() == [2, 50]
    assert counts("-n", "all") == [2, 51]
    code, _, err = call(capsys, "eval", "no/model", "--task", str(few), "-n", "3")
    assert code == 2 and "holds 2 usable problems, but 3 were requested: request fewer" in err
    few.write_text("")
    code, _, err = call(capsys, "eval", "no/model", "--task", str(few))
    assert code == 2 and err == f"rbfast eval: error: {few}: expected at least one problem, got none\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"problem": "1+1?", "reasoning": "1+1=2"}', "answer"),
        ('{"problem": "1+1?", ', "traces.jsonl:1"),
        ("", "trace"),
    ],
)
def test_invalid_traces_exit_with_code_2(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path, content: str, complaint: str
) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(content)
    code, out, err = call(capsys, "distill", model_folder, str(path), "-o", str(tmp_path / "run"))
    assert code == 2
    assert out == ""
    assert complaint in err
    assert not (tmp_path / "run").exists()


def test_invalid_epochs_are_refused_before_reading_anything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for epochs in ("0", "-1"):
        code, out, err = call(capsys, "distill", "no/model", "none.jsonl", "-o", str(tmp_path), "--epochs", epochs)
        assert (code, out) == (2, "") and f"epochs must be finite and above 0, got {float(epochs)}" in err


def test_merged_weights_follow_the_umask(capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert call(capsys, "merge", model_folder, "--base-only", "-o", str(tmp_path))[0] == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes.pop("model.safetensors") == 0o640
    assert set(modes.values()) == {0o640}


def test_full_disk_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_folder: str, tmp_path: Path
) -> None:
    def full(self: object, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    code, out, err = call(capsys, "merge", model_folder, "--base-only", "-o", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    message = f"{tmp_path / 'out'}: the weights cannot be written: I/O error: No space left on device (os error 28)"
    assert err.splitlines()[-1] == f"rbfast merge: error: {message}"
    assert not (tmp_path / "out").exists()


def test_merge_removes_the_shards_of_an_earlier_model(
    capsys: pytest.CaptureFixture[str], model_folder: str, tmp_path: Path
) -> None:
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    assert call(capsys, "merge", model_folder, "--base-only", "-o", str(tmp_path))[0] == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "notes.txt"} <= names
    assert not {name for name in names if "00001" in name or "index" in name or name.startswith(".")}


@pytest.mark.parametrize("density", ["0", "1e-9", "2"])
def test_invalid_densities_are_refused(
    capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path, density: str
) -> None:
    code, _, err = call(capsys, "distill", model_folder, traces, "-o", str(tmp_path / "run"), "--density", density)
    assert code == 2
    assert "density" in err


def config_from(*options: str) -> DistillConfig:
    return _distill_config(_parser().parse_args(["distill", "model", "traces", "-o", "out", *options]))


def test_every_setting_of_a_run_is_an_option() -> None:
    assert config_from() == DistillConfig()
    flags = {"density": "0.1", "placement": "factored", "schedule": "cosine", "warmup": "0.5", "epochs": "2.5"}
    flags["turns"] = "all"
    numbers = {"rank", "support", "placement_traces", "batch_size", "accumulation", "max_tokens", "save_steps", "seed"}
    flags |= dict.fromkeys(numbers | {"tokens_per_batch"}, "7") | {"learning_rate": "0.25"}
    options = [part for name, value in flags.items() for part in ("--" + name.replace("_", "-"), value)]
    config = config_from(*options, "--gradient-checkpointing", "--instruction", "none", "--targets", "q_proj", "v_proj")
    given = {name: type(getattr(DistillConfig(), name) or 0)(value) for name, value in flags.items()}
    given |= {"gradient_checkpointing": True, "instruction": "none", "targets": ["q_proj", "v_proj"]}
    assert given.keys() == DistillConfig.__dataclass_fields__.keys() - {"objective"}
    assert config == DistillConfig(**given)  # type: ignore[arg-type]


def test_all_linear_excludes_other_targets() -> None:
    assert config_from("--targets", "all-linear") == DistillConfig()
    with pytest.raises(ValueError, match="all-linear covers all layers, got other names too"):
        config_from("--targets", "all-linear", "q_proj")


def test_plan_is_printed_and_nothing_is_trained(
    capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = ["distill", model_folder, traces, "-o", str(out), "--density", "0.2", "--tokens-per-batch", "500", "--plan"]
    code, output, _ = call(capsys, *line)
    assert code == 0 and "activations" in output and "memory" in output
    code, output, _ = call(capsys, *line, "--json")
    plan = json.loads(output)
    assert code == 0 and plan["batches"] >= 1 and plan["needed"] > plan["weights"] > 0
    assert not out.exists()


def test_held_out_loss_is_measured_drawn_and_reported(
    capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path
) -> None:
    share, other = tmp_path / "share", tmp_path / "other"
    held_out = tmp_path / "held_out.jsonl"
    write_traces(held_out, [Trace("How many legs have 2 ants?", "2 ants x6=12", "12")])
    line = ["distill", model_folder, traces, "--density", "0.2", "--json"]
    code, out, _ = call(capsys, *line, "-o", str(share), "--held-out", "0.25", "--keep-best")
    result = json.loads(out)
    assert code == 0 and result["trained"] == 9 and result["steps"] == 2
    assert 0 < result["best_held_out_loss"] <= result["last_held_out_loss"] and result["best_step"] <= 2
    code, out, _ = call(capsys, *line, "-o", str(other), "--held-out", str(held_out))
    assert code == 0 and json.loads(out)["trained"] == 12 and json.loads(out)["first_held_out_loss"] > 0
    assert call(capsys, "report", str(share), str(other), "-o", str(tmp_path / "report.html"))[0] == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{result['last_held_out_loss']:.4f}" in page and page.count("of held-out traces") == 2


def test_invalid_held_out_options_are_refused(
    capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path
) -> None:
    line = ["distill", model_folder, traces, "-o", str(tmp_path / "run")]
    code, _, err = call(capsys, *line, "--keep-best")
    assert code == 2 and "give --held-out too" in err
    code, _, err = call(capsys, *line, "--held-out", "none.jsonl")
    assert code == 2 and "none.jsonl" in err
    for share in ("1.5", "0", "nan", "-0.1"):
        with pytest.raises(SystemExit):
            main([*line, f"--held-out={share}"])
        assert "expected a share above 0 and below 1, or a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wrong_answers_warn(capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path) -> None:
    first, *rest = read_traces(traces)
    write_traces(traces, [replace(first, verified=False), *rest])
    line = ["distill", model_folder, traces, "-o", str(tmp_path / "run"), "--density", "0.2", "--plan"]
    code, _, err = call(capsys, *line)
    assert code == 0 and "1 of 12 traces have a wrong answer (verified: false); rbfast curate leaves those out\n" in err


def test_every_setting_of_the_loss_is_an_option() -> None:
    options = "--role-weights 1 2 3 --anneal 0.25 --temperature 4 5 6 --ce-weight 0.75 --beta 1 --gradient-filter 0.5"
    assert astuple(config_from(*options.split()).objective) == (1, 2, 3, 0.25, 4, 5, 6, 0.75, 1, 0.5)
    assert config_from("--temperature", "2").objective.temperatures().tolist() == [2.0] * 3
    with pytest.raises(ValueError, match="expected 1 number, or 3"):
        config_from("--temperature", "2", "3")


def test_folder_with_another_run_is_refused(
    capsys: pytest.CaptureFixture[str], model_folder: str, traces: str, tmp_path: Path
) -> None:
    common = ["distill", model_folder, traces, "-o", str(tmp_path / "run"), "--density", "0.01", "--json"]
    assert call(capsys, *common)[0] == 0
    code, _, err = call(capsys, *common, "--epochs", "2")
    assert code == 2
    assert "epochs is 1.0, now 2.0" in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["distill", "--help"])
    assert done.value.code == 0
    assert "example: rbfast distill" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["distil"])
    assert done.value.code == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--lr 0.1", "unknown option --lr: did you mean --learning-rate?"),
        ("--bach-size=4", "unknown option --bach-size: did you mean --batch-size?"),
        ("--xyzzy", "unknown option --xyzzy"),
        ("more", "unexpected argument 'more'"),
        ("--shard=0", "argument --shard: expected a whole number above 0, got '0'"),
    ],
)
def test_invalid_option_is_reported_by_its_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, complaint: str
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["distill", "model", "traces", "-o", str(tmp_path), *words.split()])
    assert done.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: rbfast distill -o OUT model traces [options]"
    assert error == f"rbfast distill: error: {complaint}; see rbfast distill --help"


def test_fewer_than_one_problem_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("eval no/model --task none.jsonl -n 0", "teach no/model none.jsonl -o none -n -1"):
        with pytest.raises(SystemExit) as done:
            main(words.split())
        assert done.value.code == 2
        assert "argument -n: expected a whole number above 0, got " in capsys.readouterr().err


def test_interrupted_command_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rbfast.report.run_report.write_report", interrupt)
    code, _, err = call(capsys, "report", "run", "-o", str(tmp_path / "page.html"))
    assert code == 130
    assert err == "rbfast report: interrupted\n"


def test_interrupted_command_without_progress_offers_no_resumption(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rbfast.cli.infer.load_model", interrupt)
    code, _, err = call(capsys, "solve", "model", "1 + 1?")
    assert (code, err) == (130, "rbfast solve: interrupted\n")
    monkeypatch.setattr("rbfast.curation.curate.curate", interrupt)
    code, _, err = call(capsys, "curate", "pool.jsonl", "-o", str(tmp_path / "reason1k"))
    assert (code, err) == (130, "rbfast curate: interrupted\n")


@pytest.mark.parametrize(
    ("checkpoint", "message"), [(None, "it will start over"), ("checkpoint-4", "it will resume from ")]
)
def test_interrupted_training_reports_where_it_will_resume(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    checkpoint: str | None,
    message: str,
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rbfast.training.distill.distill", interrupt)
    monkeypatch.setattr("rbfast.cli.train._load_models", lambda args: (None, None, None))
    (tmp_path / "traces.jsonl").write_text('{"problem": "1 + 1?", "reasoning": "One more.", "answer": "2"}\n')
    if checkpoint is not None:
        (folder := tmp_path / "run" / "checkpoints" / checkpoint).mkdir(parents=True)
        write_digests(folder)
    code, _, err = call(capsys, "distill", "model", str(tmp_path / "traces.jsonl"), "-o", str(tmp_path / "run"))
    assert code == 130 and message in err
    assert err.endswith("rbfast distill: interrupted; run the same command to resume\n")


def test_role_losses_come_from_steps_that_have_the_role() -> None:
    log = [{"loss_tactical": 3.0}, {"loss_strategic": 2.0, "loss_tactical": 2.5}, {"loss_tactical": 2.0}]
    run = Run(SimpleNamespace(trainable_percent=0.3), log, [], 1.0, traces=1)
    losses = {name: value for name, value in _summarize_run(run, Path("run")).items() if "loss" in name}
    assert losses == {
        "first_loss_strategic": 2.0,
        "first_loss_tactical": 3.0,
        "last_loss_strategic": 2.0,
        "last_loss_tactical": 2.0,
    }


@pytest.mark.slow
def test_json_output_has_no_progress_bars(model_folder: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rbfast", "merge", model_folder, "--base-only", "-o", str(tmp_path / "out")]
    run = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert (json.loads(run.stdout), run.stderr) == ({"out": str(tmp_path / "out")}, "")
    assert "Loading weights" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.slow
def test_closed_pipe_is_no_error():
    command = f"{sys.executable} -m rbfast info | true"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.stderr == ""


@pytest.mark.slow
def test_unencodable_text_is_escaped(tmp_path: Path) -> None:
    row = {"problem": "How many legs have 2 cows?", "reasoning": "Each has 4.\n2 x 4 = 8", "answer": "8"}
    (pool := tmp_path / "é中.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "rbfast", "curate", str(pool), "-o", str(tmp_path / "out"), "--size", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and r"\xe9\u4e2d.jsonl: read as" in run.stdout
