"""A merged checkpoint in lm-evaluation-harness: its measurements match those of the model."""

import json

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_models import attach, disturb

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[harness]'")
from lm_eval.tasks import TaskManager  # noqa: E402

from rbfast.inference.decoding import complete  # noqa: E402

pytestmark = pytest.mark.slow

QUESTIONS = [f"Which word follows number {n}?" for n in range(12)]
CHOICES = ["red", "a longer answer", "7"]
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSING = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
WRITING = """
task: tiny_text
output_type: generate_until
doc_to_target: "{{text}}"
generation_kwargs: {until: ["<end>"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def log_likelihood(model, tokenizer, question, choice):
    prompt, completion = (tokenizer(text, add_special_tokens=False).input_ids for text in (question, f" {choice}"))
    with torch.no_grad():
        table = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(completion))


def test_harness_measures_a_merged_checkpoint_as_its_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = [log_likelihood(model, tokenizer, question, CHOICES[0]) for question in QUESTIONS]
    adapter = attach(model)
    disturb(adapter, size=1.0)
    scores = [[log_likelihood(model, tokenizer, question, choice) for choice in CHOICES] for question in QUESTIONS]
    assert all(abs(row[0] - old) > 0.01 for row, old in zip(scores, before, strict=True)), "the adapter must matter"
    best = [max(range(len(CHOICES)), key=row.__getitem__) for row in scores]
    texts = [completion.text for completion in complete(model, tokenizer, QUESTIONS, max_new_tokens=16)]
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    # Two of three labels are the model's own choice, so an accuracy of 2/3 is no accident. Likewise the texts.
    labels = [(choice + (i % 3 == 0)) % 3 for i, choice in enumerate(best)]
    wanted = [text if i % 3 else "other" for i, text in enumerate(texts)]
    rows = [
        {"question": question, "choices": CHOICES, "label": label, "text": text}
        for question, label, text in zip(QUESTIONS, labels, wanted, strict=True)
    ]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("choice", CHOOSING), ("text", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(DATA.format(file=file, cache=tmp_path / "cache") + task)
    report = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "merged"), "dtype": "float32"},
        tasks=["tiny_choice", "tiny_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    assert report["results"]["tiny_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert report["results"]["tiny_text"]["exact_match,none"] == pytest.approx(2 / 3)
    for sample in report["samples"]["tiny_choice"]:
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(scores[sample["doc_id"]], rel=1e-4)
    written = {sample["doc_id"]: sample["resps"][0][0] for sample in report["samples"]["tiny_text"]}
    assert written == dict(enumerate(texts))
