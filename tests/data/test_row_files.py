"""Rows from every kind of trace file, gzipped or not, and from folders of them."""

import csv
import gzip
import json
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_api import answering, chat_reply
from trace_shapes import PLAIN, conversation

from rbfast.cli.main import main
from rbfast.curation.curate import curate
from rbfast.data.answers import answer_text
from rbfast.data.readers import read_traces
from rbfast.data.row_files import rows_of_path
from rbfast.data.trace import TraceError
from rbfast.grading.tasks import load_problems
from rbfast.teacher.solutions import Question, read_questions, teach

ROW = conversation(("user", PLAIN["problem"]), ("assistant", f"<think>{PLAIN['reasoning']}</think>42"))
BROKEN = conversation(("user", PLAIN["problem"]), ("assistant", "<think>Hm"))
ROWS = [ROW, BROKEN, ROW]


def _write(path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    lines = "\n".join(map(json.dumps, ROWS))
    kind = "".join(path.suffixes)
    writers = {
        ".parquet": lambda: table.to_parquet(path),
        ".arrow": lambda: table.save_to_disk(path.parent / "saved"),
        ".jsonl.gz": lambda: path.write_bytes(gzip.compress(lines.encode())),
        ".ndjson": lambda: path.write_text(lines),
        ".json": lambda: path.write_text(json.dumps({"version": 1, "data": ROWS})),
        ".json.gz": lambda: path.write_bytes(gzip.compress(lines.encode())),
    }
    writers[kind]()
    if kind == ".arrow":
        next((path.parent / "saved").glob("*.arrow")).rename(path)


@pytest.mark.parametrize(
    ("name", "second"),
    [("t.parquet", "row 1"), ("t.arrow", "row 1"), ("t.jsonl.gz", ":2"), ("t.ndjson", ":2"), ("t.json", "item 1"),
     ("t.json.gz", ":2")],
)  # fmt: skip
def test_every_kind_of_file_is_read_past_a_bad_row(name: str, second: str, tmp_path: Path) -> None:
    path, out = tmp_path / name, tmp_path / "out.jsonl"
    _write(path)
    assert main(["convert", str(path), "-o", str(out)]) == 0
    assert [trace.to_dict() for trace in read_traces(out)] == [PLAIN] * 2
    [unreadable] = [json.loads(line) for line in (tmp_path / "out.unreadable.jsonl").read_text().splitlines()]
    assert second in unreadable["where"] and "never closed" in unreadable["reason"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_decimals_and_float32_are_read_as_written(kind: str, tmp_path: Path) -> None:
    decimals = [Decimal("0.50"), Decimal("5.00"), None, Decimal("12345678901234567890.00")]
    singles = [0.1, 5.0, None, -2.5e-7]
    columns = {"d": pa.array(decimals, pa.decimal128(30, 2)), "f": pa.array(singles, pa.float32())}
    path, table = tmp_path / f"t.{kind}", pa.table(columns)
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    rows = [row for _, row in rows_of_path(path, "train")]
    assert [row["d"] for row in rows] == [0.5, 5, None, 12345678901234567890]
    assert [row["f"] for row in rows] == [0.1, 5.0, None, -2.5e-7]
    json.dumps(rows)
    assert [answer_text(row["d"]) for row in rows[:2]] == ["0.5", "5"] and answer_text(rows[0]["f"]) == "0.1"


def test_folders_are_read_by_split(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list([ROW] * 3), datasets.Dataset.from_list([ROW])
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    assert len(read_traces(tmp_path / "saved")) == 3
    assert len(read_traces(tmp_path / "saved", split="test")) == 1
    assert len(read_traces(tmp_path / "saved" / "train")) == 3
    with pytest.raises(TraceError, match="expected a split 'dev', got test, train; name the folder of one split"):
        read_traces(tmp_path / "saved", split="dev")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    for name, table in (("train-00000-of-00002", train), ("train-00001-of-00002", test), ("test-00000-of-00001", test)):
        table.to_parquet(tmp_path / "clone" / "data" / f"{name}.parquet")
    assert len(read_traces(tmp_path / "clone")) == 4


def test_teach_and_curate_output_folders_are_read_as_traces(tmp_path: Path) -> None:
    with answering(chat_reply("<plan>Add.</plan>1 + 1 = 2\n<answer>2</answer>")) as api:
        teach(api.client(), [Question("What is 1 + 1?", None)], tmp_path / "taught")
    (tmp_path / "taught" / "sums.csv").write_text("a,b\n1,2\n")
    assert [trace.answer for trace in read_traces(tmp_path / "taught")] == ["2"]
    curate([tmp_path / "taught"], tmp_path / "reason1k")
    assert [trace.answer for trace in read_traces(tmp_path / "reason1k")] == ["2"]


def test_a_folder_of_shards_is_read_without_its_other_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROW))
    (tmp_path / "a.unreadable.jsonl").write_text('{"where": "x:1", "reason": "cut"}')
    (tmp_path / "index.csv").write_text("file,rows\na.jsonl,1\n")
    assert len(read_traces(tmp_path)) == 2


def test_hidden_files_of_a_folder_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "shard.jsonl").write_text(json.dumps(PLAIN))
    (tmp_path / "._shard.jsonl").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert len(read_traces(tmp_path)) == 1


def test_csv_and_tsv_files_are_read(tmp_path: Path) -> None:
    rows = [["problem", "solution", "answer", "", ""], ["Who, 1?", 'First:\n"so".', "036"], ["Who?", "", "4", "", ""]]
    for name, dialect in (("t.csv", "excel"), ("t.tsv", "excel-tab")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, dialect).writerows(rows)
        [first] = read_traces(tmp_path / name, on_error="skip")
        assert (first.problem, first.reasoning, first.answer) == ("Who, 1?", 'First:\n"so".', "036")
        assert [problem.answer for problem in load_problems(str(tmp_path / name), None, 0)] == ["036", "4"]
        assert [question.text for question in read_questions(str(tmp_path / name))] == ["Who, 1?", "Who?"]


def test_error_for_a_broken_table_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('problem,solution,answer\n"1?",so,1\n"2"?,so,2\n')
    with pytest.raises(TraceError, match=r"t\.csv:3: expected a valid table"):
        read_traces(tmp_path / "t.csv")


def test_problems_are_read_from_the_same_kinds_of_file(tmp_path: Path) -> None:
    rows = [{"question": "2+2?", "choices": ["3", "4"], "answer": 1}, {"question": "Is it?", "answer": True}]
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    expected = "2+2?\n\nA. 3\nB. 4"
    problems = load_problems(str(tmp_path / "set.jsonl.gz"), None, 0)
    assert [(problem.question, problem.answer) for problem in problems] == [(expected, "B"), ("Is it?", "True")]
    assert [question.text for question in read_questions(str(tmp_path / "set.jsonl.gz"))] == [expected, "Is it?"]
    assert len(load_problems(str(tmp_path), None, 0)) == 2


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(TraceError, match=r"t\.jsonl\.gz: expected a whole gzip file"):
        read_traces(tmp_path / "t.jsonl.gz")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "state.json: _data_files is missing"),
        ({"_data_files": 3}, "state.json: _data_files: expected list, got int 3"),
        ({"_data_files": [3]}, "state.json: _data_files: entry 1: expected dict, got int 3"),
        *(
            ({"_data_files": [{"filename": name}]}, f"state.json: expected the name of .* beside it, got str '{name}'")
            for name in ("../other.jsonl", "/other.jsonl", ".", "..", "")
        ),
    ],
)
def test_a_saved_dataset_may_list_only_files_beside_it(tmp_path, files, message):
    (tmp_path / "other.jsonl").write_text(json.dumps(PLAIN) + "\n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps(files or {}))
    with pytest.raises(TraceError, match=message):
        read_traces(tmp_path / "saved")


def test_files_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "train-2.jsonl"):
        (tmp_path / name).write_text(json.dumps(PLAIN | {"id": name}))
    assert [trace.id for trace in read_traces(tmp_path)] == ["train-0.jsonl", "train-1.jsonl", "train-2.jsonl"]
