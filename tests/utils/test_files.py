"""Files appear whole or not at all: atomic writes, staged files, output checks, folder locks and journals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbfast.utils.files import Journal, atomic_write, check_output, lock_file, lock_folder, staged_files, write_text


def test_new_file_takes_its_name_only_on_close(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    with path.open("rb") as reader:
        with atomic_write(path) as file:
            file.write(b"later")
            assert path.read_bytes() == "é\n".encode()
        assert path.read_bytes() == b"later" and reader.read() == "é\n".encode()  # the open file is the old one


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file", "w") as file:
        file.write("half")
        raise RuntimeError("power cut")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_staged_files_appear_together(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with staged_files(folder) as files:
        (files / "first").write_text("1")
        (files / "inner").mkdir()
        (files / "inner" / "second").write_text("2")
        assert not (folder / "first").exists()
    with staged_files(folder) as files:
        (files / "inner").mkdir()
        (files / "inner" / "third").write_text("3")
    assert sorted(path.name for path in folder.iterdir()) == ["first", "inner"]
    assert [path.name for path in (folder / "inner").iterdir()] == ["third"]


def test_an_error_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty", tmp_path / "old"):
        if folder.name == "old":
            write_text(folder / "file", "old")
            (folder / f".files.{killed.pid}.tmp").mkdir()
        with pytest.raises(RuntimeError), staged_files(folder) as files:
            (files / "file").write_text("half")
            raise RuntimeError("power cut")
    assert not (tmp_path / "new").exists() and (tmp_path / "empty").exists()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["file"]
    assert (tmp_path / "old" / "file").read_text() == "old"


def test_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for start in (None, "old"):  # the target may not exist yet
        name, link = f"{start}.txt", tmp_path / f"{start}-link"
        if start is not None:
            (tmp_path / "far" / name).write_text(start)
        link.symlink_to(Path("far") / name)
        check_output(link)
        write_text(link, "new")
        assert link.is_symlink()
        assert (tmp_path / "far" / name).read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["None.txt", "old.txt"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("old")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to("theirs")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "theirs").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_only_temporary_files_of_dead_processes_are_deleted(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    for process in (killed.pid, os.getppid()):
        (tmp_path / f".file[1].{process}.tmp").touch()
    write_text(tmp_path / "file[1]", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"file[1]", f".file[1].{os.getppid()}.tmp"}


def test_lone_surrogate_is_written_as_a_json_escape(tmp_path: Path) -> None:
    record = {"id": "é\ud800"}  # from a row or a server that escaped it
    write_text(tmp_path / "file", json.dumps(record, ensure_ascii=False))
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([record])
    assert json.loads((tmp_path / "file").read_bytes()) == record
    assert [entry for _, entry in journal.read()] == [record]


def test_a_pipe_or_a_folder_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name, found in (("pipe", "a device or a pipe"), ("link", "a device or a pipe"), ("folder", "a folder")):
        for write in (check_output, lambda path: write_text(path, "new")):
            with pytest.raises(OSError, match=f"{name}: expected the name of a file, found {found}"):
                write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink() and (tmp_path / "folder").is_dir()
    assert len(list(tmp_path.iterdir())) == 3


def test_checking_an_output_leaves_no_files(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "file")
    check_output(tmp_path / "a" / "b", folder=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("file", True, "file: expected the name of a folder, found a file"),
        ("file/a/b", True, "b: expected a folder at .*file, found a file"),
        ("file/b", False, "b: expected a folder at .*file, found a file"),
    ],
)
def test_an_output_under_a_file_is_refused(tmp_path: Path, name: str, folder: bool, message: str) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError, match=message):
        check_output(tmp_path / name, folder=folder)
    assert (tmp_path / "file").read_text() == "old"


def test_a_read_only_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to every file
    with pytest.raises(PermissionError, match="file: expected a file that can be written, found a read-only one"):
        check_output(tmp_path / "file")


def test_second_lock_is_refused_and_an_unused_folder_is_removed(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        with lock_folder(tmp_path / name), pytest.raises(ValueError, match=f"another process is using .*{name}"):
            if name == "full":
                write_text(tmp_path / name / "file", "new")
            with lock_folder(tmp_path / name):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_refused_lock_leaves_the_first_in_force(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"):
        for _ in range(2):
            with pytest.raises(ValueError, match="another process is using"), lock_folder(tmp_path / "out"):
                pass


def test_second_lock_of_a_file_is_refused_and_an_empty_file_is_removed(tmp_path: Path) -> None:
    for text in ("", "written"):
        with lock_file(tmp_path / "file"):
            (tmp_path / "file").write_text(text)
            with pytest.raises(ValueError, match=r"another process is using .*file"), lock_file(tmp_path / "file"):
                pass
        assert [path.read_text() for path in tmp_path.iterdir()] == [text] * bool(text)


def test_output_on_a_read_only_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:  # as a read-only file system does
        raise OSError(30, "Read-only file system", f"{dir}/tmp123")

    monkeypatch.setattr("rbfast.utils.files.TemporaryFile", refuse)
    with pytest.raises(OSError, match="new/file: cannot be written: Read-only file system in "):
        check_output(tmp_path / "new" / "file")


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


def test_whole_last_line_without_a_line_break_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for left in (LINES, LINES[:-1]):
        journal.path.write_bytes(left)
        assert [record for _, record in journal.read()] == RECORDS
        assert journal.path.read_bytes() == LINES
        journal.append(RECORDS[:1])
        assert [record for _, record in journal.read()] == [*RECORDS, RECORDS[0]]


def test_failed_append_leaves_the_other_records(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(RECORDS)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: .*journal\.jsonl"):
        patch.setattr(os, "fsync", full)
        journal.append(RECORDS[:1])
    assert journal.path.read_bytes() == LINES


def test_last_line_torn_anywhere_is_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    first = LINES.index(b"\n") + 1
    for end in range(first, len(LINES) - 1):
        for padding in (b"", b"\0" * 7):  # as after a power cut if the file had grown already
            journal.path.write_bytes(LINES[:end] + padding)
            assert [record for _, record in journal.read()] == RECORDS[:1]
            assert journal.path.read_bytes() == LINES[:first]
    for end in range(first - 1):
        journal.path.write_bytes(LINES[:end])
        assert list(journal.read()) == [] and journal.path.read_bytes() == b""


def test_long_torn_last_line_is_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    long = {"text": "é" * 2**21}  # 4 MiB
    first = journal.append([long])
    second = journal.append([{"n": 2}, long])
    assert (first, second) == (0, len(json.dumps(long, ensure_ascii=False).encode()) + 1)
    os.truncate(journal.path, journal.path.stat().st_size - 5)
    assert [(offset, record) for _, offset, record in journal.read_with_offsets()] == [(0, long), (second, {"n": 2})]
    assert journal.read_at(second) == {"n": 2} and journal.read_at(0) == long


@pytest.mark.parametrize("text", ["my notes", "[" * 100_000, "{}\nmy notes"])
def test_file_that_is_not_a_journal_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    journal = Journal(tmp_path / "notes.txt")
    journal.path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.txt:\d: expected a record in JSON"):
        list(journal.read())
    assert journal.path.read_text() == text
