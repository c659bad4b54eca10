"""Atomic writes of files and folders, and append-only files of whole records."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it to `path` at the end. On an error it is deleted, and `path`
    stays as it was.

    Text is UTF-8; a lone surrogate, which UTF-8 cannot encode, is written as its JSON escape. Also deletes temporary
    files that killed processes left. If `path` is a symlink, its target is replaced.
    Raises OSError if `path` is a folder, a device or a pipe.
    """
    path = resolve_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _leftovers(path.parent, path.name):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by an earlier process with the same id
    mode = mode.replace("w", "x")  # do not follow a symlink that someone planted under this name
    text = {} if "b" in mode else _TEXT
    try:
        with name_file_in_errors(path):
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Locks a folder against other processes within the block; it is created if needed, and removed if it stays empty.
    Has no effect on Windows or on a file system without locks.

    Raises:
        ValueError: another process holds the lock.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, os.O_RDONLY):
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def lock_file(path: str | Path) -> Iterator[None]:
    """Like `lock_folder`, for a file. A file that replaces it within the block is not locked."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, os.O_RDWR | os.O_CREAT):
        try:
            yield
        finally:
            if path.exists() and not path.stat().st_size:
                path.unlink()


@contextmanager
def _lock(path: Path, flags: int) -> Iterator[None]:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        yield
        return
    handle = os.open(path, flags, 0o666)
    try:
        with suppress(OSError):
            try:
                flock(handle, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is using {path}: wait until it ends, or name another") from None
        yield
    finally:
        os.close(handle)  # releases the lock


@contextmanager
def staged_files(folder: str | Path) -> Iterator[Path]:
    """A temporary folder within `folder`, whose files move into `folder` at the end. On an error they are deleted, and
    `folder` is unchanged. Also deletes temporary folders that killed processes left."""
    folder = Path(folder)
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".files.{os.getpid()}.tmp"
    for left in _leftovers(folder, "files"):
        shutil.rmtree(left)
    shutil.rmtree(temporary, ignore_errors=True)  # left by an earlier process with the same id
    temporary.mkdir()
    try:
        with name_file_in_errors(folder):
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


def resolve_target(path: str | Path) -> Path:
    """The file that `path` names, with symlinks resolved. It need not exist.

    Raises OSError if it is a folder, a device or a pipe, which a rename would replace by a file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file, found a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected the name of a file, found a device or a pipe; name a regular file")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_output(path: str | Path, *, folder: bool = False) -> None:
    """Checks that a file or folder of this name can be written, before the work that produces it.

    Leaves nothing behind. Raises OSError, naming `path`, if it cannot be written.
    """
    path = Path(path)
    if folder and os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected the name of a folder, found a file; name another")
    target = path if folder else resolve_target(path)
    if not folder and target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{path}: expected a file that can be written, found a read-only one; name another")
    place = next(p for p in ((target, *target.parents) if folder else target.parents) if os.path.exists(p))
    if not place.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder at {place}, found a file; name another")
    try:
        TemporaryFile(dir=place).close()  # permissions do not show whether the file system is read-only
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror} in {place}; name another") from None


@contextmanager
def name_file_in_errors(path: str | Path) -> Iterator[None]:
    """Adds the file name to an OSError without one, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _leftovers(folder: Path, name: str) -> Iterator[Path]:
    """The temporary files or folders for this name that killed processes left."""
    for path in folder.glob(f".{escape(name)}.*.tmp"):
        if not _is_running(path.name.split(".")[-2]):
            yield path


def _is_running(process: str) -> bool:
    """Whether a process with this id may still run. Always True outside POSIX, where probing it could kill it."""
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
    """Writes `text` as UTF-8, atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


class Journal:
    """An append-only JSONL file of records (objects). Records are on disk when `append` or `sync` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> Iterator[tuple[str, Any]]:
        """The records, each with its location ("file:line"). A truncated last line is removed from the file.

        Raises:
            ValueError: a line is not JSON.
        """
        return ((where, record) for where, _, record in self.read_with_offsets())

    def read_with_offsets(self) -> Iterator[tuple[str, int, Any]]:
        """As `read`, with the offset of each record, for `read_at`."""
        if not self.path.exists():
            return
        self._repair_end()
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.path}:{number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
                    raise ValueError(f"{where}: expected a record in JSON: {error}; name another file") from None
                yield where, offset, record
                offset += len(line)

    def read_at(self, offset: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def append(self, records: Iterable[Any], *, sync: bool = True) -> int:
        """Returns the offset of the first record. If the disk is full, the file stays as it was.

        sync: wait until the records are on disk. Otherwise call `sync` after the last of them.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(map(_line, records)).encode(_TEXT["encoding"], _TEXT["errors"])
        start = self.path.stat().st_size if self.path.exists() else 0
        try:
            with name_file_in_errors(self.path), self.path.open("ab") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, start)  # a record after half a record could not be read
            raise
        return start

    def sync(self) -> None:
        """Waits until all records are on disk."""
        if self.path.exists():
            with name_file_in_errors(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())

    def rewrite(self, records: Iterable[Any]) -> None:
        """Replaces all records by these, atomically."""
        with atomic_write(self.path, "w") as file:
            file.writelines(map(_line, records))

    def _repair_end(self) -> None:
        """Removes a truncated last record. Adds the line break if a complete last record lacks it."""
        last = self._last_line()
        if not last:
            return
        try:
            json.loads(last)  # a truncated object is never valid JSON
        except RecursionError:
            return
        except ValueError:
            if last.strip(b"\0 \t\r")[:1] in (b"", b"{"):  # anything else was no record: `read` reports it
                os.truncate(self.path, self.path.stat().st_size - len(last))
        else:
            with self.path.open("ab") as file:
                file.write(b"\n")

    def _last_line(self) -> bytes:
        """The bytes after the last line break, read backwards: the file may not fit in memory."""
        last = b""
        with self.path.open("rb") as file:
            start = file.seek(0, os.SEEK_END)
            while start and b"\n" not in last:
                size = min(start, max(2**20, len(last)))
                start = file.seek(start - size)
                last = file.read(size) + last
        return last[last.rfind(b"\n") + 1 :]


def _line(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
