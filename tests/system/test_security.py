"""Loaded files run no code, names in files never become paths, and keys are never written.

test_report_page.py and test_curation.py test that HTML pages escape their contents.
"""

import ast
import io
import json
import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from openai_server import serving
from questions import QUESTIONS, solve
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from tiny_models import attach, llama
from tiny_runs import TOKENIZER, TRACES, run

import rbfast
from rbfast.adapter.column_scores import ColumnScores
from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.cli.main import main
from rbfast.data.signal_store import SignalStore
from rbfast.grading.grade import grade
from rbfast.grading.judge import Judge
from rbfast.grading.tasks import load_problems
from rbfast.models.student import load_student, load_without_weights
from rbfast.teacher.client import Server, ServerError
from rbfast.training.checkpoints import write_digests

KEY = "sk-recognisable-0123456789"


class Planted:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    """A path where no file may appear."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def plain_pickle(mark):
    return pickle.dumps(Planted(mark))


def torch_pickle(mark):
    """The output of torch.save: a zip with a pickle in it."""
    buffer = io.BytesIO()
    torch.save({"state": Planted(mark)}, buffer)
    return buffer.getvalue()


PICKLES = {"pickle": plain_pickle, "torch": torch_pickle}


def test_planted_pickles_run_when_unpickled(tmp_path):
    for number, make in enumerate(PICKLES.values()):
        data, mark = make(tmp_path / f"ran{number}"), tmp_path / f"ran{number}"
        torch.load(io.BytesIO(data), weights_only=False) if zipfile.is_zipfile(io.BytesIO(data)) else pickle.loads(data)
        assert mark.exists()


# -------------------------------------------------------------------------------------------------------------- code


def sources():
    for path in sorted(Path(rbfast.__file__).parent.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


BETWEEN_OWN_PROCESSES = {"judge.py", "judge_worker.py", "pool.py"}  # pickles from our own processes, through a pipe


def test_no_module_unpickles_unpacks_or_evaluates():
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile", "zipfile", "yaml"}
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                imported = forbidden & {name.partition(".")[0] for name in names}
                assert not imported or (imported == {"pickle"} and path.name in BETWEEN_OWN_PROCESSES), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "np.load", "numpy.load", "os.system"}, (
                    path,
                    called,
                )
                assert not any(keyword.arg == "shell" for keyword in node.keywords), path


def test_no_module_trusts_remote_code():
    for path, tree in sources():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            trust = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
            assert trust in ([], ["False"]), path
            loads = node.func.attr == "from_pretrained" and ast.unparse(node.func.value).startswith("Auto")
            if loads:
                assert trust == ["False"], (path, ast.unparse(node))


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("known", [True, False])
def test_custom_code_of_a_model_is_not_run(model_folder, mark, monkeypatch, known):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("loading must not prompt the user"))
    code = f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (model_folder / "evil.py").write_text(code)
    config = json.loads((model_folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    if not known:
        config["model_type"] = "evil"
    (model_folder / "config.json").write_text(json.dumps(config))
    if known:
        load_student(str(model_folder))
    else:
        with pytest.raises(ValueError, match="custom code"):
            load_student(str(model_folder))


def test_attention_from_a_repository_is_not_run(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/attention"}))
    for load in (load_student, load_without_weights):
        with pytest.raises(ValueError, match="asks for the attention 'someone/attention', which is code"):
            load(str(model_folder))
    (lora := model_folder.parent / "lora").mkdir()
    about = {"peft_type": "LORA", "base_model_name_or_path": str(model_folder)}
    (lora / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="which is code"):
        load_student(str(lora))
    for wrong, complaint in (
        (about | {"base_model_name_or_path": None}, "base_model_name_or_path: expected str, got null"),
        (["peft_type"], r"expected dict, got list \['peft_type'\]"),
    ):
        (lora / "adapter_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=rf"adapter_config\.json: {complaint}"):
            load_student(str(lora))


@pytest.mark.parametrize("kind", PICKLES)
def test_pickle_in_place_of_weights_does_not_run(model_folder, mark, kind):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(PICKLES[kind](mark))
    with pytest.raises(Exception, match=r"(?i)weights.?only|unpickl|unsupported|corrupt|pickle"):
        load_student(str(model_folder))


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_in_our_own_files_do_not_run(tmp_path, mark, kind):
    data = PICKLES[kind](mark)
    adapter = tmp_path / "adapter"
    attach(llama()).save_pretrained(adapter)
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (adapter / name).write_bytes(data)  # never read
    SparseAdapter.from_pretrained(llama(), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        SparseAdapter.from_pretrained(llama(), adapter)
    (tmp_path / "scores.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        ColumnScores.load(tmp_path / "scores.safetensors")
    SignalStore(tmp_path / "signals", "teacher", 2, 9)
    (tmp_path / "signals" / "signals-00000.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="not a complete shard"):
        SignalStore.open(tmp_path / "signals")


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        run(folder, patch, cut_at=3, placement="random")
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_planted_checkpoint_does_not_run(cut, tmp_path, mark, monkeypatch, name):
    """Whoever can plant a file can write its digest too."""
    shutil.copytree(cut, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    (checkpoint / name).write_bytes(torch_pickle(mark))
    write_digests(checkpoint)
    if name == "training_args.bin":  # never read
        run(tmp_path / "run", monkeypatch, placement="random")
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            run(tmp_path / "run", monkeypatch, placement="random")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["string_insertion", "polynomial_multiplication"])
@pytest.mark.parametrize("code", ["__import__('os').system('touch {}')", "open('{}', 'w')"])
def test_code_in_an_answer_has_no_effect(mark, monkeypatch, task, code):
    """Verifiers of reasoning-gym call eval on an answer, or sympy's parse_expr, which does."""
    pytest.importorskip("reasoning_gym")
    [problem] = load_problems(task, 1, seed=0)
    own = Judge("reasoning-gym")
    monkeypatch.setattr("rbfast.grading.grade.judge", lambda kind: own)
    try:
        assert grade(problem, f"<answer>{code.format(mark)}</answer>") == 0.0 and own.killed
        assert grade(problem, f"<answer>{problem.answer}</answer>") == 1.0
    finally:
        own.close()


# -------------------------------------------------------------------------------------------------------------- paths


def everything_under(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "..\\escaped", "a/../../escaped"])
def test_no_name_in_a_file_becomes_a_path(tmp_path, name):
    """Matrices, ids, domains, sources and teachers named like paths do not change where files are written."""
    inner = tmp_path / "in" / "ner"
    adapter = inner / "adapter"
    attach(llama()).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    old = next(iter(config["modules"]))
    config["modules"] = {name if key == old else key: value for key, value in config["modules"].items()}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {key.replace(old, name): value for key, value in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not in this model"):
        SparseAdapter.from_pretrained(llama(), adapter)
    rows = [trace.to_dict() | {"id": name, "domain": name, "source": name, "teacher": name} for trace in TRACES]
    (inner / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = everything_under(tmp_path)
    rbfast.curate([inner / "pool.jsonl"], inner / "out", rbfast.CurateConfig(size=5))
    new = everything_under(tmp_path) - before
    files = ("reason1k.jsonl", "dropped.jsonl", "datasheet.json", "datasheet.html")
    assert new == {"in/ner/out", *(f"in/ner/out/{file}" for file in files)}
    assert not Path("/tmp/escaped").exists()


# --------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", KEY)
    with serving(llama(vocab_size=len(TOKENIZER)), TOKENIZER, script=solve) as server:
        refusal = {"error": f"Incorrect API key provided: Bearer {KEY}. " + "x" * 470 + KEY}
        server.refusal_body = json.dumps(refusal).encode()
        yield server


@pytest.mark.parametrize("mode", [[], ["--json"]])
def test_key_reaches_the_server_and_nothing_else(server, tmp_path, capfd, caplog, mode):
    """The server repeats the key in every refusal, as some do."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps({"problem": q.text}) + "\n" for q in QUESTIONS))
    command = ["teach", "tiny", str(tmp_path / "problems.jsonl"), "-o", str(tmp_path / "out"), *mode]
    command += ["--server", f"http://127.0.0.1:{server.port}/v1", "--concurrency", "1"]
    server.faults = [None, 400, None, 400]
    codes = [main(command)]
    server.faults = [401]
    codes.append(main(command))
    codes.append(main(command))
    assert codes == [1, 1, 0] and server.headers[0]["Authorization"] == f"Bearer {KEY}"
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    printed = capfd.readouterr()
    assert "Incorrect API key" in printed.err
    for text in (*written.values(), printed.out.encode(), printed.err.encode(), caplog.text.encode()):
        assert KEY[:12].encode() not in text


def test_key_stays_out_of_errors_and_representations(server):
    server.faults = [401]
    client = server.client()
    with pytest.raises(ServerError, match=r"Incorrect API key provided: Bearer \*+") as caught:
        client.ask("/chat/completions", {"messages": []})
    shown = repr(client) + str(client) + repr(caught.value) + str(caught.value)
    assert KEY[:12] not in shown


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_whitespace_after_a_key_is_removed(server, monkeypatch, end):
    monkeypatch.setenv("RBFAST_API_KEY", KEY + end)
    teach_one = {"messages": [{"role": "user", "content": QUESTIONS[0].text}], "max_tokens": 50}
    server.client().ask("/chat/completions", teach_one)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("odd", [KEY + "\nX-Evil: 1", KEY + "…", "\x00" + KEY])
def test_invalid_key_is_refused_and_not_shown(monkeypatch, odd):
    if "\x00" in odd:
        monkeypatch.setattr(os, "environ", os.environ | {"RBFAST_API_KEY": odd})
    else:
        monkeypatch.setenv("RBFAST_API_KEY", odd)
    with pytest.raises(ValueError, match="RBFAST_API_KEY must contain only printable ASCII") as caught:
        Server("http://127.0.0.1:9/v1", "m")
    assert KEY[:12] not in str(caught.value)


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"http://{KEY}@host/v1", f"https://host/v1?api_key={KEY}"])
def test_key_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="without a key in it; set RBFAST_API_KEY") as caught:
        Server(url, "m")
    assert KEY[:12] not in str(caught.value)


def test_key_stays_out_of_a_training_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RBFAST_API_KEY", KEY)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, monkeypatch, cut_at=3, placement="random")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "optimizer.pt" for path in files)
    assert all(KEY.encode() not in path.read_bytes() for path in files)
