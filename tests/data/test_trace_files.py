"""Files and datasets of traces: round trips, errors that name the line, atomic writes."""

import errno
import json
import resource
from pathlib import Path

import pytest
from real_inputs import data_path
from traces import FULL, ROW, trace

from rbfast.data.readers import read_traces, write_traces
from rbfast.data.trace import Trace, TraceError


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
        ("t.jsonl", GOOD.replace(b'"5"', b"9" * 5000), r"t\.jsonl:1: expected JSON that Python can read: .*digits"),
        ("t.jsonl", b"[" * 10**6, r"t\.jsonl:1: expected JSON that Python can read"),
        ("t.jsonl", GOOD.replace(b"First", b"\\ud83d"), r"t\.jsonl:1: reasoning: .*surrogate"),
        ("t.jsonl", b"", "expected at least one trace, got none"),
        ("t.jsonl", b"\n \n", "expected at least one trace, got none"),
        ("t.json", b"[]", "expected at least one trace, got none"),
        ("t.json", b"{}", "expected a list of traces, got dict"),
        ("t.json", b"[" + GOOD + b",\n{}]", r"t\.json: item 1: problem: expected this field, got no fields"),
        ("t.json", b"[\n1,\n", r"t\.json: line 3: expected JSON"),
        ("t.parquet", b"PAR0", "expected a Parquet file"),
        ("t.jsonl", GOOD + b"\n" + GOOD[:-1] + b"\n" + GOOD, r"t\.jsonl:2, column \d+: expected JSON"),
        ("t.csv", b"problem", "expected at least one trace, got none"),
        ("t.csv", b"problem,reasoning,answer\np,r,a\np,r,a,b\n", r"t\.csv:3: expected 3 cells, got more"),
        ("t.csv", b"answer,problem,answer\n1,p,2\n", r"t\.csv:1: expected different columns, got 'answer' twice"),
        ("t.csv", b"problem\n\xff\n", r"t\.csv: expected UTF-8"),
        ("t.csv", b'problem\n"p', r"t\.csv:\d: expected a valid table: unexpected end"),
        ("t.xlsx", b"PK", r"expected a \.jsonl, .*, \.csv or \.tsv file \(\.gz too\), got \.xlsx"),
    ],
)
def test_error_for_a_broken_file_names_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=message):
        read_traces(tmp_path / name)


def test_line_over_the_length_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbfast.data.row_files._LONGEST_LINE", len(GOOD))
    (tmp_path / "fits.jsonl").write_bytes(GOOD)
    (tmp_path / "long.jsonl").write_bytes(GOOD + b" " * 1000)
    assert read_traces(tmp_path / "fits.jsonl") == [trace()]
    with pytest.raises(
        TraceError, match=r"long\.jsonl:1: expected at most \d+ bytes in a line.* leave out one that is longer"
    ):
        read_traces(tmp_path / "long.jsonl")


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n")
    assert read_traces(tmp_path / "t.jsonl") == [trace(), trace()]


@pytest.mark.parametrize(
    "source", ["absent.jsonl", "data/absent.parquet", "./absent", "/absent/x", "absent", Path("a/b")]
)
def test_a_missing_path_is_not_looked_up_on_the_hub(source: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbfast.data.readers._rows_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(TraceError, match="there is no such file"):
        read_traces(source)


def test_folder_without_trace_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"expected a folder with a .*, got none; name a file"):
        read_traces(tmp_path)


def test_hub_ids_are_loaded_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []
    table = datasets.Dataset.from_list([ROW, ROW | {"answer": "six"}, {"problem": "p"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *place, **options: calls.append((*place, options)) or table)
    assert [trace.answer for trace in read_traces("owner/name", split="test", limit=2)] == ["5", "six"]
    assert [trace.answer for trace in read_traces("owner/name:main:test[:2]", limit=2)] == ["5", "six"]
    assert calls == [
        ("owner/name", None, {"split": "test", "streaming": True}),
        ("owner/name", "main", {"split": "test[:2]", "streaming": False}),  # datasets refuses to stream a slice
    ]
    with pytest.raises(TraceError, match=r"^owner/name\[train\]: row 2: reasoning: expected a string, got null"):
        read_traces("owner/name")


def test_error_for_a_hub_id_that_cannot_be_loaded_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str, *_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TraceError, match=r"^owner/name: there is no such file, and the dataset .* doesn't exist"):
        read_traces("owner/name")


def test_real_parquet_is_read_by_column_meaning() -> None:
    traces = read_traces(data_path("s1k_gemini_sample/reasoning_dataset.parquet"))
    assert [trace.teacher for trace in traces] == ["gemini"] * 5
    assert traces[0].answer == r"a^2 + b^2 \leq 2, A^2 + B^2 \leq 1"


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


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            write_traces(tmp_path / "traces.jsonl", [trace()] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
