"""Encoding traces as tokens: prompts, labels, roles and aligned teacher signals; packing examples end to end."""

import json
import math
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from real_inputs import data_path
from traces import trace

from rbfast.data.chat_template import format_prompt
from rbfast.data.encoding import IGNORE, NO_ROLE, Example, collate, encode, encode_all, mask_targets_from
from rbfast.data.instruction import instruction_named
from rbfast.data.spans import ANSWER
from rbfast.data.trace import Trace, TraceError

INSTRUCTION = instruction_named("answer").text


@pytest.mark.slow
def test_importing_loads_neither_datasets_nor_transformers() -> None:
    code = "import sys, rbfast.data.encoding; print(sorted({'datasets', 'transformers', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# Tokens


def test_prompt_follows_the_chat_template(tokenizer) -> None:
    prompt = format_prompt("What is 2 + 3?", tokenizer)
    assert prompt.startswith("<|im_start|>system\n")  # this student's template adds its own system prompt
    assert prompt.endswith(f"user\nWhat is 2 + 3?\n\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")


def test_prompt_is_plain_without_a_chat_template(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert format_prompt("p", tokenizer) == f"p\n\n{INSTRUCTION}\n\n"
    assert encode(trace(), tokenizer).labels[-2] == tokenizer.eos_token_id


def test_plain_prompt_starts_with_the_tokenizers_bos_token() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    llama_like = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="?")
    assert format_prompt("p", llama_like) == f"<s>p\n\n{INSTRUCTION}\n\n"
    ids = encode(trace(), llama_like).input_ids.tolist()
    assert ids.index(0) == 0
    assert ids.count(0) == 1


def test_tokenizer_without_offsets_or_end_of_turn_is_refused(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "is_fast", False)
        with pytest.raises(ValueError, match="roles need a fast tokenizer"):
            encode(trace(), tokenizer)
    endless = deepcopy(tokenizer)
    endless.chat_template = endless.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        encode(trace(), endless)


def test_end_of_turn_token_comes_from_the_template(tokenizer) -> None:
    other = deepcopy(tokenizer)
    other.eos_token = other.pad_token = "<|endoftext|>"  # like a tokenizer whose eos token is not <|im_end|>
    assert encode(trace(), other).labels[-2] == tokenizer.eos_token_id != other.eos_token_id


def test_encoding_matches_inference(tokenizer) -> None:
    source = trace(plan="Add. 😀 café", reasoning="Wait, 2 + 3 \\(= 5\\).\r\n\tYes <|im_end|> it is.", id="one")
    example = encode(source, tokenizer)
    prompt = tokenizer(format_prompt(source.problem, tokenizer), add_special_tokens=False).input_ids
    assert example.id == "one"
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert (example.labels[: len(prompt) - 1] == IGNORE).all()
    assert example.labels[-1] == IGNORE
    trained = example.labels[len(prompt) - 1 : -1]
    assert trained.tolist() == example.input_ids[len(prompt) :].tolist()
    assert tokenizer.decode(trained[:-1]) == source.completion()
    assert trained.tolist().count(tokenizer.eos_token_id) == 1  # the end of the turn; <|im_end|> in the text stays text
    assert ((example.roles == NO_ROLE) == (example.labels == IGNORE)).all()
    assert example.roles[-2] == ANSWER  # the end of the turn
    dtypes = [array.dtype for array in (example.input_ids, example.labels, example.roles)]
    assert dtypes == [np.int32, np.int32, np.int8]  # a run holds all its examples


def test_every_token_has_the_role_of_its_characters(tokenizer) -> None:
    rows = data_path("r1_math500_traces/math500_deepseek_r1.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        source = Trace(row["problem"], row["reasoning_trace"], row["ground_truth"], plan="Look 😀 first.")
        text, example = source.completion(), encode(source, tokenizer, max_tokens=100_000)
        roles = example.roles[example.labels != IGNORE]
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        role_at = {at: span.role for span in source.thought_spans() for at in range(span.start, span.end)}
        assert len(roles) == len(offsets) + 1
        assert roles[-1] == ANSWER
        for role, (start, end) in zip(roles, offsets, strict=False):
            visible = [at for at in range(start, end) if not text[at].isspace()] or [start]
            assert role == role_at.get(visible[0], ANSWER)


def test_too_long_trace_is_left_out_not_truncated(tokenizer) -> None:
    huge = trace(id="huge", reasoning="word " * 200_000)
    fits = len(encode(trace(), tokenizer).input_ids)
    examples, left_out = encode_all([trace(), huge], tokenizer, max_tokens=fits)
    assert [len(example.input_ids) for example in examples] == [fits]
    assert left_out[0][0] is huge
    assert f"huge: expected at most {fits} tokens, got 200" in left_out[0][1]
    with pytest.raises(TraceError, match=f"expected at most {fits - 1} tokens, got {fits}"):
        encode(trace(), tokenizer, max_tokens=fits - 1)


def with_signals(tokenizer, k: int = 2, **changes) -> Trace:
    """A trace with teacher signals: at each position the true token and k - 1 others."""
    labels = encode(trace(**changes), tokenizer).labels
    rows = [[int(label), *range(k - 1)] for label in labels[labels != IGNORE]]
    logprobs = [[-0.5] + [-3.0] * (k - 1) for _ in rows]
    return trace(signals={"ids": rows, "logprobs": logprobs}, **changes)


def test_batches_are_int64(tokenizer) -> None:
    batch = collate([encode(trace(), tokenizer)])
    assert {batch[name].dtype for name in ("input_ids", "labels", "roles", "position_ids")} == {torch.int64}


def test_signals_are_aligned_with_their_labels(tokenizer) -> None:
    plain = trace(problem="Another?")
    taught, wide = with_signals(tokenizer, 2), with_signals(tokenizer, 3, answer="seven")
    batch = collate([encode(one, tokenizer) for one in (taught, plain, wide)])
    ids, logprobs, rows = batch["teacher_ids"], batch["teacher_logprobs"], batch["teacher_rows"]
    assert torch.equal(batch["labels"][0, rows], ids[:, 0])
    count = len(taught.signals["ids"])
    assert logprobs.dtype == torch.float32
    assert logprobs[0].tolist() == [-0.5, -3.0, -math.inf]
    assert logprobs[count].tolist() == [-0.5, -3.0, -3.0]
    assert len(rows) == count + len(wide.signals["ids"])


def test_signals_of_untrained_tokens_are_left_out() -> None:
    labels, top = np.array([-100, 2, 3, -100]), np.array([[1], [2]])
    example = Example(np.arange(4), labels, labels, top, np.full((2, 1), -0.5, dtype=np.float32), np.array([0, 1]))
    batch = collate([example])
    assert (batch["teacher_rows"].tolist(), batch["teacher_ids"].tolist()) == ([1], [[2]])
    assert batch["text_rows"].tolist() == [2]
    mask_targets_from(batch, 2)
    assert batch["teacher_rows"].tolist() == [1] and batch["text_rows"].tolist() == []


def test_short_rows_of_a_signal_are_padded(tokenizer) -> None:
    signals = with_signals(tokenizer).signals
    ragged = {name: [rows[0][:1], *rows[1:]] for name, rows in signals.items()}
    example = encode(trace(signals=ragged), tokenizer)
    assert example.teacher_ids[0].tolist() == [signals["ids"][0][0], 0]
    assert example.teacher_logprobs[0].tolist() == [-0.5, -math.inf]


def test_mismatched_signals_are_refused(tokenizer) -> None:
    signals = with_signals(tokenizer).signals
    count = len(signals["ids"])
    short = {name: rows[1:] for name, rows in signals.items()}
    with pytest.raises(TraceError, match=f"signals: expected {count} rows.*got {count - 1}; .*another tokenizer"):
        encode(trace(signals=short), tokenizer)
    foreign = signals | {"ids": [[49152, 0], *signals["ids"][1:]]}
    with pytest.raises(TraceError, match=r"signals\.ids: expected ids below 49152, the vocabulary, got 49152"):
        encode(trace(signals=foreign), tokenizer)


# Packing


def test_packing_lays_examples_end_to_end(tokenizer) -> None:
    examples = [encode(trace(answer=answer), tokenizer) for answer in ("5", "five, or V", "5.0")]
    batch = collate(examples)
    assert set(batch) == {"input_ids", "position_ids", "labels", "roles", "text_rows", "lengths"}
    assert batch["text_rows"].tolist() == (batch["labels"][0] != IGNORE).nonzero().squeeze(1).tolist()
    for name in ("input_ids", "labels", "roles"):
        assert batch[name].dtype == torch.int64
        assert batch[name][0].tolist() == [value for one in examples for value in getattr(one, name)]
    assert batch["position_ids"][0].tolist() == [at for one in examples for at in range(len(one.input_ids))]
    with pytest.raises(ValueError, match="at least one example"):
        collate([])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_attend_to_each_other(tokenizer, student, attention: str) -> None:
    model = student()
    model.set_attn_implementation(attention)
    first, second = (encode(trace(answer=answer), tokenizer) for answer in ("5", "6"))
    batch, boundary = collate([first, second]), len(first.input_ids)
    changed = batch["input_ids"].clone()
    changed[:, :boundary] = 1000
    with torch.no_grad():
        before, after = (
            model(ids, position_ids=batch["position_ids"], use_cache=False).logits
            for ids in (batch["input_ids"], changed)
        )
    assert torch.equal(before[:, boundary:], after[:, boundary:])
    assert not torch.equal(before[:, :boundary], after[:, :boundary])
