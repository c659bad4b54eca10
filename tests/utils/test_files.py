"""Files appear whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rbfast.utils.files import Journal, replacing, write_text


def test_the_new_file_takes_the_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    with replacing(path) as file:
        file.write(b"later")
        assert path.read_bytes() == "é\n".encode()
    assert path.read_bytes() == b"later"


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file", "w") as file:
        file.write("half")
        raise RuntimeError("power cut")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    code = (
        "import resource, signal, sys; from rbfast.utils.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(sys.argv[1], 5000 * ' ')"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True)
    assert run.returncode == 1
    assert "OSError" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


RECORDS = [{"n": 1, "text": "é\n"}, {"n": 2, "of": {"n": [2, {}]}}]
LINES = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)


def test_a_whole_last_line_without_its_line_break_is_kept_and_gone_on_from(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for left in (LINES, LINES[:-1]):
        journal.path.write_bytes(left)
        assert [record for _, record in journal.read()] == RECORDS
        assert journal.path.read_bytes() == LINES
        journal.append(RECORDS[:1])
        assert [record for _, record in journal.read()] == [*RECORDS, RECORDS[0]]


def test_a_last_line_torn_anywhere_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    first = LINES.index(b"\n") + 1
    for end in range(first, len(LINES) - 1):
        for padding in (b"", b"\0" * 7):  # what a power cut leaves where the file had grown already
            journal.path.write_bytes(LINES[:end] + padding)
            assert [record for _, record in journal.read()] == RECORDS[:1]
            assert journal.path.read_bytes() == LINES[:first]
    for end in range(first - 1):
        journal.path.write_bytes(LINES[:end])
        assert list(journal.read()) == [] and journal.path.read_bytes() == b""


@pytest.mark.parametrize("text", ["my notes", "[" * 100_000, "{}\nmy notes"])
def test_a_file_that_is_no_journal_is_named_and_stays(tmp_path: Path, text: str) -> None:
    journal = Journal(tmp_path / "notes.txt")
    journal.path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.txt:\d: expected a record in JSON"):
        list(journal.read())
    assert journal.path.read_text() == text
