"""Writing files whole or not at all, and files that grow by whole records."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any


@contextmanager
def replacing(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` that takes its name at the end; on an error it goes and `path` stays.

    What a process that was killed left of an earlier try goes as well. A symlink stays, and its target is replaced.
    Raises OSError if `path` is a folder, a device or a pipe.
    """
    path = target_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _left(path.parent, path.name):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with naming(path):
            with open(temporary, mode, encoding=encoding, newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def holding(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from holding this folder too; it is made if need be. A file system without locks, or
    Windows, keeps nobody.

    Raises:
        ValueError: another process holds it.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                flock(handle, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process works in {folder}: wait for its end, or name another") from None
        yield
    finally:
        os.close(handle)  # which ends the lock, as the end of the process does
        with suppress(OSError):
            folder.rmdir()  # of a call that wrote nothing


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """A temporary folder within `folder`, whose files take their places there at the end. On an error they go, and
    `folder` is as it was; so does what a process that was killed left of an earlier try."""
    folder = Path(folder)
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".files.{os.getpid()}.tmp"
    for left in _left(folder, "files"):
        shutil.rmtree(left)
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process of this number
    temporary.mkdir()
    try:
        with naming(folder):
            yield temporary
            for path in sorted(temporary.iterdir()):
                place = folder / path.name
                if path.is_dir():
                    shutil.rmtree(place, ignore_errors=True)
                os.replace(path, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def target_of(path: str | Path) -> Path:
    """The file that `path` names, symlinks followed; it need not exist yet.

    Raises OSError if a folder, a device or a pipe has that name: a rename would put a file in its place.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file, found a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected the name of a file, found a device or a pipe; name a regular file")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_output(path: str | Path, *, folder: bool = False) -> None:
    """Finds out whether a file or a folder of this name can be written, before the work that is to fill it.

    Nothing is left behind. Raises OSError, naming `path`, if it cannot be written.
    """
    path = Path(path)
    if folder and os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected the name of a folder, found a file; name another")
    target = path if folder else target_of(path)
    if not folder and target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{path}: expected a file that can be written, found a read-only one; name another")
    place = next(p for p in ((target, *target.parents) if folder else target.parents) if os.path.exists(p))
    if not place.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder at {place}, found a file; name another")
    try:
        TemporaryFile(dir=place).close()  # permissions alone do not tell: a file system may be read-only
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror} in {place}; name another") from None


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names the file in an OSError without a name: a write to a full disk says only that it is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _left(folder: Path, name: str) -> Iterator[Path]:
    """The temporary files or folders of this name that killed processes left."""
    for path in folder.glob(f".{escape(name)}.*.tmp"):
        if not _is_running(path.name.split(".")[-2]):
            yield path


def _is_running(process: str) -> bool:
    """Whether a process may still run, by its number. Only POSIX tells without touching it."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path, "w") as file:
        file.write(text)


class Journal:
    """A JSONL file that grows by whole records (objects), each on disk before `append` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> Iterator[tuple[str, Any]]:
        """The records with where they stand ("file:line"). A last line that was cut short is taken off the file.

        Raises:
            ValueError: a line that is no JSON.
        """
        if not self.path.exists():
            return
        self._mend()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.path}:{number}"
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
                    raise ValueError(f"{where}: expected a record in JSON: {error}; name another file") from None

    def append(self, records: Iterable[Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(map(_line, records))
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, records: Iterable[Any]) -> None:
        """Puts these records in place of all that are there, whole or not at all."""
        with replacing(self.path, "w") as file:
            file.writelines(map(_line, records))

    def _mend(self) -> None:
        """Cuts off a record that was torn; a whole one, to which an editor gave no line break, gets it."""
        data = self.path.read_bytes()
        last = data[data.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            json.loads(last)  # no beginning of an object is JSON
        except RecursionError:
            return
        except ValueError:
            if last.strip(b"\0 \t\r")[:1] in (b"", b"{"):  # else it was never a record: it is reported, and stays
                os.truncate(self.path, len(data) - len(last))
        else:
            with self.path.open("ab") as file:
                file.write(b"\n")


def _line(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
