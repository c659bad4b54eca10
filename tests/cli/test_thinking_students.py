"""Students with thinking templates: every command uses the same instruction."""

import json

import pytest
from hub_cache import add_repository, use_hub_cache
from thinking_students import save_student
from transformers import AutoTokenizer, GenerationConfig

from rbfast.cli.main import main
from rbfast.data.chat_template import default_instruction, end_of_turn, format_prompt
from rbfast.data.encoding import IGNORE, encode
from rbfast.data.instruction import ANSWER, BOXED, NONE, Instruction, saved_instruction
from rbfast.data.readers import write_traces
from rbfast.data.signal_store import SignalStore
from rbfast.data.trace import Trace
from rbfast.models.student import load_student
from rbfast.teacher.logprobs import add_local_logprobs

TRACES = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}", str(n + 1)) for n in range(8)]


@pytest.fixture
def work(tmp_path):
    write_traces(tmp_path / "traces.jsonl", TRACES)
    problems = [json.dumps({"problem": trace.problem, "answer": trace.answer}) + "\n" for trace in TRACES]
    (tmp_path / "problems.jsonl").write_text("".join(problems))
    return tmp_path


def call(capsys, *argv):
    capsys.readouterr()
    code = main([str(word) for word in (*argv, "--json")])
    assert code == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


FLAGS = ("--dtype", "float32", "--device", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("template", "choice"), [("qwen3", None), ("r1-distill", "none"), ("qwen3", "answer")])
def test_instruction_follows_the_student(capsys, work, template, choice):
    student, run, merged = save_student(work / "student", template), work / "run", work / "merged"
    option = ("--instruction", choice) if choice else ()
    instruction = {None: BOXED, "none": NONE, "answer": ANSWER}[choice]
    train = ("distill", student, work / "traces.jsonl", "-o", run, "--density", "0.05", *option, *FLAGS)
    assert call(capsys, *train)["trained"] == 8
    assert saved_instruction(run) == instruction
    assert (
        json.loads((run / "prompt.json").read_text())["thinking"]
        == {"qwen3": "reply", "r1-distill": "prompt"}[template]
    )
    call(capsys, "merge", student, run, "-o", merged, *FLAGS)
    call(capsys, "export-lora", student, run, "-o", work / "lora", *FLAGS)
    assert saved_instruction(merged) == saved_instruction(work / "lora") == instruction
    for number, (model, *adapter) in enumerate(((student, "--adapter", run), (merged,))):
        kept = work / f"{number}.jsonl"
        task = ("--task", work / "problems.jsonl", "-n", 2, "--max-new-tokens", 4, "-o", kept)
        call(capsys, "eval", model, *adapter, *task, *FLAGS)
        for line in kept.read_text().splitlines():
            assert Instruction(**json.loads(line)["decoding"]["instruction"]) == instruction
        solved = call(capsys, "solve", model, TRACES[0].problem, *adapter, "--budget", 300, *FLAGS)
        [solution] = solved["solutions"]
        assert "</think>" in solution["text"] and solution["tokens"] <= 300
    tokenizer = AutoTokenizer.from_pretrained(merged)
    page = (merged / "README.md").read_text()
    assert format_prompt("PROBLEM", tokenizer, instruction) in page and str(work) not in page
    assert (f"```\n{instruction.text}\n```" in page) == bool(instruction.text) and "ends with `</think>`" in page
    assert end_of_turn(tokenizer) in GenerationConfig.from_pretrained(merged).eos_token_id


@pytest.mark.slow
def test_merged_student_keeps_its_instruction_when_retrained(capsys, work):
    student = save_student(work / "student", "qwen3")
    (student / "prompt.json").write_text(json.dumps({"instruction": "Be brief: \\boxed{}", "style": "box"}))
    call(capsys, "distill", student, work / "traces.jsonl", "-o", work / "run", "--density", "0.05", *FLAGS)
    assert saved_instruction(work / "run") == Instruction("Be brief: \\boxed{}", "box")


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["qwen3", "qwen3-2507-thinking", "qwen2.5"])
def test_teacher_scores_the_students_turn_in_its_own_template(work, teacher):
    """Same tokens, another template: the thought and the answer are scored, the markers only if both write them."""
    _, tokenizer = load_student(str(save_student(work / "student", "qwen3")))
    model, other = load_student(str(save_student(work / "teacher", teacher)))
    # One vocabulary for all three, as Qwen's are.
    other.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer))
    assert other.get_vocab() == tokenizer.get_vocab()
    with SignalStore(work / "signals", teacher, 4, len(tokenizer)) as store:
        assert add_local_logprobs(model, other, TRACES, tokenizer, store) == []
    examples = [encode(trace, tokenizer) for trace in TRACES]
    assert SignalStore.open(work / "signals").fill(examples) == []
    for trace, example in zip(TRACES, examples, strict=True):
        scored = example.labels[example.teacher_rows]
        if teacher == "qwen3":
            assert len(scored) == (example.labels != IGNORE).sum()
            continue
        text = tokenizer.decode(scored)
        assert trace.reasoning in text and "<think>" not in text
        assert (f"{trace.answer}" in text.removeprefix(trace.reasoning)) and default_instruction(tokenizer) == BOXED


def test_instruction_of_a_student_on_the_hub(tmp_path, monkeypatch):
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    (ours / "prompt.json").write_text(json.dumps({"instruction": "Be brief.", "style": "plain"}))
    (other / "prompt.json").write_text(json.dumps([{"role": "user"}]))
    add_repository(tmp_path / "cache", "owner/ours", ours)
    add_repository(tmp_path / "cache", "owner/other", other)
    use_hub_cache(monkeypatch, tmp_path / "cache")
    assert saved_instruction("owner/ours") == Instruction("Be brief.", "plain")
    assert saved_instruction("owner/other") is None  # another program's file
    assert saved_instruction("owner/none", "gpt2", None) is None
    assert saved_instruction("owner/none", "owner/ours") == Instruction("Be brief.", "plain")


def test_broken_prompt_file_is_refused(tmp_path):
    assert saved_instruction(tmp_path) is None
    (tmp_path / "prompt.json").write_text('{"instruction": "", "style": "loud"}')
    with pytest.raises(ValueError, match=r"prompt\.json: style: expected tags, box or plain, got 'loud'"):
        saved_instruction(tmp_path)
