import errno
import json
import math
import resource
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from real_inputs import data_path

from rbfast.data.chat_template import INSTRUCTION, format_prompt
from rbfast.data.encoding import IGNORE, NO_ROLE, collate, encode, encode_all
from rbfast.data.readers import read_traces, write_traces
from rbfast.data.spans import ANSWER, STRATEGIC, TACTICAL, Span, split_spans
from rbfast.data.trace import Trace, TraceError

ROW = {"problem": "What is 2 + 3?", "reasoning": "First, add them.\n2 + 3 = 5.", "answer": "5"}
FULL = ROW | {
    "plan": "Add. \u2028 café 😀",
    "domain": "arithmetic",
    "source": "made",
    "teacher": "by hand",
    "id": "a/1",
    "difficulty": 0.25,
    "verified": True,
    "spans": [[0, 17, "strategic"], [17, 27, "tactical"]],
    "signals": {"ids": [[5, 7], [1]], "logprobs": [[-0.1, -3.0], [0.0]]},
}


def trace(**changes) -> Trace:
    return Trace.from_dict(ROW | changes)


# Schema


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": None}, "problem: expected a string, got null"),
        ({"answer": math.nan}, "answer: expected a string, got float nan"),
        ({"answer": True}, "answer: expected a string, got bool True"),
        ({"reasoning": ["a"]}, r"reasoning: expected a string, got list \['a'\]"),
        ({"reasoning": " \n"}, "reasoning: expected text, got an empty string"),
        ({"problem": "a\ud800"}, "problem: expected Unicode text, got half a surrogate pair at character 1"),
        ({"plan": 1}, "plan: expected a string, got int 1"),
        ({"id": [7]}, r"id: expected a string, got list \[7\]"),
        ({"domain": math.nan}, "domain: expected a string, got float nan"),
        ({"difficulty": math.nan}, "difficulty: expected a finite number or null, got float nan"),
        ({"difficulty": "hard"}, "difficulty: expected a finite number or null, got str 'hard'"),
        ({"difficulty": True}, "difficulty: expected a finite number or null, got bool True"),
        ({"verified": 1}, "verified: expected true, false or null, got int 1"),
        ({"spans": "all"}, "spans: expected"),
        ({"spans": [[0, 27, "tactics"]]}, "spans: expected .* with a role of strategic, tactical, answer"),
        ({"spans": [[0, 27]]}, "spans: expected"),
        ({"spans": [[0.0, 27, "tactical"]]}, "spans: expected integers"),
        ({"spans": []}, "spans: expected the last span to end with the reasoning at character 27, got 0"),
        ({"spans": [[1, 27, "tactical"]]}, "spans: expected a span that starts at character 0"),
        ({"spans": [[0, 9, "tactical"], [8, 27, "tactical"]]}, "spans: expected a span that starts at character 9"),
        ({"spans": [[0, 0, "tactical"], [0, 27, "tactical"]]}, "spans: expected a span that .* is not empty"),
        ({"spans": [[0, 26, "tactical"]]}, "spans: .* at character 27, got 26"),
        ({"spans": [[0, 28, "tactical"]]}, "spans: .* at character 27, got 28"),
        ({"signals": [[1]]}, "signals: expected"),
        ({"signals": {"ids": [[1]]}}, "signals: expected"),
        ({"signals": {"ids": [1], "logprobs": [0.0]}}, "signals.ids: expected a list of lists"),
        ({"signals": {"ids": [["1"]], "logprobs": [[0.0]]}}, "signals.ids: expected numbers, got str"),
        ({"signals": {"ids": [[-1]], "logprobs": [[0.0]]}}, "signals.ids: .* negative"),
        ({"signals": {"ids": [[1]], "logprobs": [[None]]}}, "signals.logprobs: expected numbers, got NoneType"),
        ({"signals": {"ids": [[1]], "logprobs": [[math.nan]]}}, "signals.logprobs: expected finite .* got nan"),
        ({"signals": {"ids": [[1]], "logprobs": [[-math.inf]]}}, "signals.logprobs: expected finite .* got -inf"),
        ({"signals": {"ids": [[1]], "logprobs": [[12.5]]}}, "signals.logprobs: .* rather than logits"),
        ({"signals": {"ids": [[1, 2]], "logprobs": [[0.0]]}}, "signals: expected as many ids as logprobs"),
        ({"signals": {"ids": [[1], []], "logprobs": [[0.0], []]}}, "signals: .* got none in row 1"),
    ],
)
def test_a_field_that_is_wrong_is_named(changes: dict, message: str) -> None:
    with pytest.raises(TraceError, match=f"^here:3: {message}"):
        Trace.from_dict(ROW | changes, "here:3")


def test_numbers_are_taken_as_text() -> None:
    trace = Trace.from_dict(ROW | {"answer": 5, "id": 7})
    assert (trace.answer, trace.id) == ("5", "7")
    assert Trace.from_dict(ROW | {"answer": 0.5}).answer == "0.5"


@pytest.mark.parametrize("field", ["problem", "reasoning", "answer"])
def test_a_missing_field_is_named_beside_those_that_came(field: str) -> None:
    row = {("question" if name == field else name): text for name, text in ROW.items()}
    with pytest.raises(TraceError, match=f"^here: {field}: expected this field, got .*question"):
        Trace.from_dict(row, "here")


def test_a_trace_made_in_code_is_checked_too() -> None:
    with pytest.raises(TraceError, match=r"^spans: "):
        Trace("p", "reasoning", "a", spans=(Span(0, 3, TACTICAL),))


def test_dict_round_trip() -> None:
    assert Trace.from_dict(FULL).to_dict() == FULL
    assert trace(plan="", extra="ignored").to_dict() == ROW


def test_the_shown_value_is_short() -> None:
    with pytest.raises(TraceError) as raised:
        trace(plan=list(range(10**6)))
    assert len(str(raised.value)) < 200


# Roles of a trace


def test_role_spans_tile_the_completion() -> None:
    planned = trace(plan="Add them.")
    assert planned.completion() == "Add them.\n\nFirst, add them.\n2 + 3 = 5.\n\n<answer>5</answer>"
    assert planned.role_spans() == [
        Span(0, 11, STRATEGIC),
        Span(11, 28, STRATEGIC),
        Span(28, 38, TACTICAL),
        Span(38, 58, ANSWER),
    ]


def test_marked_spans_win_over_the_splitter() -> None:
    marked = trace(spans=[[0, 20, "tactical"], [20, 27, "strategic"]])
    assert marked.role_spans()[:2] == [Span(0, 20, TACTICAL), Span(20, 27, STRATEGIC)]
    assert marked.role_spans()[:2] != split_spans(marked.reasoning)


def test_spans_may_be_objects_as_parquet_needs() -> None:
    objects = [{"start": 0, "end": 27, "role": "tactical"}]
    assert trace(spans=objects) == trace(spans=[[0, 27, "tactical"]])


# Files


def test_jsonl_round_trip(tmp_path: Path) -> None:
    traces = [Trace.from_dict(FULL), trace()]
    write_traces(tmp_path / "new" / "traces.jsonl", iter(traces))
    assert read_traces(tmp_path / "new" / "traces.jsonl") == traces
    assert read_traces(str(tmp_path / "new" / "traces.jsonl"), limit=1) == traces[:1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["traces.jsonl"]


def test_json_and_parquet_give_the_same_traces(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "t.json").write_text(json.dumps([FULL, ROW]))
    objects = [dict(zip(("start", "end", "role"), span, strict=True)) for span in FULL["spans"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FULL | {"spans": objects}, ROW]), tmp_path / "t.parquet")
    assert read_traces(tmp_path / "t.json") == read_traces(tmp_path / "t.parquet") == [Trace.from_dict(FULL), trace()]


GOOD = json.dumps(ROW).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", GOOD + b"\n" + GOOD[:-5], r"t\.jsonl:2, column \d+: expected JSON"),
        (
            "t.jsonl",
            GOOD + b"\n\n[1]",
            r"t\.jsonl:3: expected an object with problem, reasoning, answer, got list \[1\]",
        ),
        ("t.jsonl", GOOD.replace(b"First", b"\xff"), r"t\.jsonl:1: expected UTF-8, got byte 0xff at 44"),
        ("t.jsonl", GOOD.replace(b'"5"', b"NaN"), r"t\.jsonl:1: answer: expected a string, got float nan"),
        ("t.jsonl", GOOD.replace(b'"5"', b"9" * 5000), r"t\.jsonl:1: expected JSON that can be read: .*digits"),
        ("t.jsonl", b"[" * 10**6, r"t\.jsonl:1: expected JSON that can be read"),
        ("t.jsonl", GOOD.replace(b"First", b"\\ud83d"), r"t\.jsonl:1: reasoning: .*surrogate"),
        ("t.jsonl", b"", "expected at least one trace, got none"),
        ("t.jsonl", b"\n \n", "expected at least one trace, got none"),
        ("t.json", b"[]", "expected at least one trace, got none"),
        ("t.json", b"{}", "expected a list of traces, got dict"),
        ("t.json", b"[" + GOOD + b",\n{}]", r"t\.json: item 1: problem: expected this field, got no fields"),
        ("t.json", b"[\n1,\n", r"t\.json: line 3: expected JSON"),
        ("t.parquet", b"PAR0", "expected a Parquet file"),
        ("t.csv", b"problem", "expected a .jsonl, .json or .parquet file, got .csv"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=message):
        read_traces(tmp_path / name)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbfast.data.readers._LONGEST_LINE", len(GOOD))
    (tmp_path / "fits.jsonl").write_bytes(GOOD)
    (tmp_path / "long.jsonl").write_bytes(GOOD + b" " * 1000)
    assert read_traces(tmp_path / "fits.jsonl") == [trace()]
    with pytest.raises(TraceError, match=r"long\.jsonl:1: expected at most \d+ bytes in a line"):
        read_traces(tmp_path / "long.jsonl")


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n")
    assert read_traces(tmp_path / "t.jsonl") == [trace(), trace()]


@pytest.mark.parametrize(
    "source", ["absent.jsonl", "data/absent.parquet", "./absent", "/absent/x", "absent", Path("a/b")]
)
def test_a_path_that_is_absent_asks_no_hub(source: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbfast.data.readers._rows_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(TraceError, match="there is no such file"):
        read_traces(source)


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="got a directory; name one of the files in it"):
        read_traces(tmp_path)


def test_hub_ids_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    table = datasets.Dataset.from_list([ROW, ROW | {"answer": "six"}, {"problem": "p"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *place, **options: asked.append((*place, options)) or table)
    assert [one.answer for one in read_traces("owner/name", split="test", limit=2)] == ["5", "six"]
    assert [one.answer for one in read_traces("owner/name:main:test[:2]", limit=2)] == ["5", "six"]
    assert asked == [
        ("owner/name", None, {"split": "test", "streaming": True}),
        ("owner/name", "main", {"split": "test[:2]", "streaming": False}),  # datasets refuses to stream a slice
    ]
    with pytest.raises(TraceError, match=r"^owner/name\[train\]: row 2: reasoning: expected a string, got null"):
        read_traces("owner/name")


def test_a_hub_id_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str, *_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TraceError, match=r"^owner/name: there is no such file, and the dataset .* doesn't exist"):
        read_traces("owner/name")


def test_real_parquet_of_another_layout_is_read_by_what_its_columns_mean() -> None:
    traces = read_traces(data_path("s1k_gemini_sample/reasoning_dataset.parquet"))
    assert [trace.teacher for trace in traces] == ["gemini"] * 5
    assert traces[0].answer == r"a^2 + b^2 \leq 2, A^2 + B^2 \leq 1"


@pytest.mark.slow
def test_importing_loads_neither_datasets_nor_transformers() -> None:
    code = "import sys, rbfast.data.encoding; print(sorted({'datasets', 'transformers', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, [trace()])

    def broken():
        yield trace(answer="6")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_traces(path, broken())
    assert read_traces(path) == [trace()]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            write_traces(tmp_path / "traces.jsonl", [trace()] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


# Tokens


def test_the_chat_template_survives_and_opens_the_reply(tokenizer) -> None:
    prompt = format_prompt("What is 2 + 3?", tokenizer)
    assert prompt.startswith("<|im_start|>system\n")  # this student's template brings a system prompt of its own
    assert prompt.endswith(f"user\nWhat is 2 + 3?\n\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_chat_template_the_prompt_is_plain(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert format_prompt("p", tokenizer) == f"p\n\n{INSTRUCTION}\n\n"
    assert encode(trace(), tokenizer).labels[-2] == tokenizer.eos_token_id


def test_without_a_chat_template_a_bos_token_opens_the_prompt_where_the_tokenizer_adds_one() -> None:
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


def test_a_tokenizer_without_offsets_or_end_of_turn_is_refused(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "is_fast", False)
        with pytest.raises(ValueError, match="roles need a fast tokenizer"):
            encode(trace(), tokenizer)
    endless = deepcopy(tokenizer)
    endless.chat_template = endless.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        encode(trace(), endless)


def test_the_end_of_turn_is_the_templates_own(tokenizer) -> None:
    other = deepcopy(tokenizer)
    other.eos_token = other.pad_token = "<|endoftext|>"  # as where <|im_end|> has no other name
    assert encode(trace(), other).labels[-2] == tokenizer.eos_token_id != other.eos_token_id


def test_encoding_is_what_inference_sees(tokenizer) -> None:
    one = trace(plan="Add. 😀 café", reasoning="Wait, 2 + 3 \\(= 5\\).\r\n\tYes <|im_end|> it is.", id="one")
    example = encode(one, tokenizer)
    prompt = tokenizer(format_prompt(one.problem, tokenizer), add_special_tokens=False).input_ids
    assert example.id == "one"
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert (example.labels[: len(prompt) - 1] == IGNORE).all()
    assert example.labels[-1] == IGNORE
    trained = example.labels[len(prompt) - 1 : -1]
    assert trained.tolist() == example.input_ids[len(prompt) :].tolist()
    assert tokenizer.decode(trained[:-1]) == one.completion()
    assert trained.tolist().count(tokenizer.eos_token_id) == 1  # the end of the turn, and none out of the text
    assert ((example.roles == NO_ROLE) == (example.labels == IGNORE)).all()
    assert all(array.dtype == np.int64 for array in (example.input_ids, example.labels, example.roles))


def test_every_token_has_the_role_of_its_characters(tokenizer) -> None:
    rows = data_path("r1_math500_traces/math500_deepseek_r1.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        one = Trace(row["problem"], row["reasoning_trace"], row["ground_truth"], plan="Look 😀 first.")
        text, example = one.completion(), encode(one, tokenizer, max_tokens=100_000)
        roles = example.roles[example.labels != IGNORE]
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        role_at = {at: span.role for span in one.role_spans() for at in range(span.start, span.end)}
        assert len(roles) == len(offsets) + 1
        assert roles[-1] == ANSWER
        for role, (start, end) in zip(roles, offsets, strict=False):
            ink = [at for at in range(start, end) if not text[at].isspace()] or [start]
            assert role == role_at[ink[0]]


def test_a_trace_that_is_too_long_is_left_out_whole(tokenizer) -> None:
    huge = trace(id="huge", reasoning="word " * 200_000)
    fits = len(encode(trace(), tokenizer).input_ids)
    examples, left_out = encode_all([trace(), huge], tokenizer, max_tokens=fits)
    assert [len(example.input_ids) for example in examples] == [fits]
    assert left_out[0][0] is huge
    assert f"huge: expected at most {fits} tokens, got 200" in left_out[0][1]
    with pytest.raises(TraceError, match=f"expected at most {fits - 1} tokens, got {fits}"):
        encode(trace(), tokenizer, max_tokens=fits - 1)


def with_signals(tokenizer, k: int = 2, **changes) -> Trace:
    """A trace whose teacher gave the true token and k - 1 others."""
    labels = encode(trace(**changes), tokenizer).labels
    rows = [[int(label), *range(k - 1)] for label in labels[labels != IGNORE]]
    logprobs = [[-0.5] + [-3.0] * (k - 1) for _ in rows]
    return trace(signals={"ids": rows, "logprobs": logprobs}, **changes)


def test_signals_stand_at_the_labels_they_teach(tokenizer) -> None:
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


def test_short_rows_of_a_signal_end_in_nothing(tokenizer) -> None:
    signals = with_signals(tokenizer).signals
    ragged = {name: [rows[0][:1], *rows[1:]] for name, rows in signals.items()}
    example = encode(trace(signals=ragged), tokenizer)
    assert example.teacher_ids[0].tolist() == [signals["ids"][0][0], 0]
    assert example.teacher_logprobs[0].tolist() == [-0.5, -math.inf]


def test_signals_that_do_not_fit_are_an_error(tokenizer) -> None:
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
def test_packed_examples_do_not_see_each_other(tokenizer, student, attention: str) -> None:
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
