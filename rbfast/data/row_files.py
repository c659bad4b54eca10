"""Read the rows of files and folders one at a time, each with its location: JSON lines, JSON, Parquet, Arrow, CSV,
gzipped or not.

for where, row in rows_of_path(Path("data/"), "train"): ...             # ("data/train-0.parquet: row 0", {...})
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rbfast.data.trace import TraceError
from rbfast.utils.records import check_shape, json_error_location, objects_of, show

_LONGEST_LINE = 64 * 2**20  # bytes; 32k tokens, each with a top-20, take a quarter of it
_LINES = (".jsonl", ".ndjson")
_CELLS = {".csv": ",", ".tsv": "\t"}  # delimiters
SUFFIXES = (*_LINES, ".json", ".parquet", ".arrow", *_CELLS)
KINDS = ".jsonl, .json, .parquet, .arrow, .csv or .tsv file (.gz too)"
_WRITTEN = {"datasheet.json": "reason1k.jsonl", "teach.json": "traces.jsonl"}  # of curate and teach, beside other files
_NO_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")

Rows = Iterator[tuple[str, Any]]


def is_file_of_rows(path: Path) -> bool:
    return _suffix_of(path) in SUFFIXES


def _suffix_of(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def is_path_of_rows(text: str) -> bool:
    """Whether a text names a file of rows or an existing folder, rather than a task or a dataset on the hub."""
    return is_file_of_rows(Path(text)) or ("/" in text and Path(text).is_dir())


def rows_of_path(path: Path, split: str, lenient: bool = False) -> Rows:
    """The rows of a file, or of a folder's files of that split. If `lenient`, a TraceError replaces a broken line.

    Raises TraceError for a file that is broken or of an unknown kind.
    """
    if path.is_dir():
        for file in _files_of(path, split):
            yield from rows_of_path(file, split, lenient)
        return
    if not is_file_of_rows(path):
        raise TraceError(f"{path}: expected a {KINDS}, got {path.suffix or 'no suffix'}")
    readers: dict[str, Callable[[Path], Rows]] = {
        ".json": partial(_rows_json, lenient=lenient),
        ".parquet": _rows_parquet,
        ".arrow": _rows_arrow,
        **{suffix: partial(_rows_csv, lenient=lenient, delimiter=delimiter) for suffix, delimiter in _CELLS.items()},
    }
    suffix = _suffix_of(path)
    try:
        yield from readers.get(suffix, partial(_rows_jsonl, lenient=lenient))(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}: expected a whole gzip file: {error}") from error


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a folder, in order.

    If `teach` or `curate` wrote the folder, their traces; if `save_to_disk` did, its files; else the files named after
    the split; else all. CSV files count only if there is nothing else, because many of them are file lists. Hidden
    files do not count: macOS leaves "._data.jsonl" beside "data.jsonl" on other file systems.
    """
    for mark, traces in _WRITTEN.items():
        if (folder / mark).is_file() and (folder / traces).is_file():
            return [folder / traces]
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            names = ", ".join(sorted(inner.name for inner in folder.iterdir() if inner.is_dir()))
            raise TraceError(f"{folder}: expected a split {split!r}, got {names}; name the folder of one split")
        folder = folder / split
    if (folder / "state.json").is_file():
        return _files_of_state(folder / "state.json")
    files = [path for inner in (folder, folder / "data") for path in sorted(inner.glob("*")) if is_file_of_rows(path)]
    files = [path for path in files if path.is_file() and not path.name.endswith(("_infos.json", "unreadable.jsonl"))]
    files = [path for path in files if path.name not in _NO_ROWS and not path.name.startswith(".")]
    files = [path for path in files if _suffix_of(path) not in _CELLS] or files
    if not files:
        raise TraceError(f"{folder}: expected a folder with a {KINDS} in it, got none; name a file")
    return [path for path in files if path.name.startswith(split)] or files


def _files_of_state(path: Path) -> list[Path]:
    """The files beside it that the state.json of `save_to_disk` lists."""
    state = _parse_json(path.read_bytes(), str(path))
    try:
        check_shape(state, {"_data_files": [{"filename": str}]}, str(path))
    except ValueError as error:
        raise TraceError(f"{error}; save the dataset again") from None
    names = [entry["filename"] for entry in state["_data_files"]]
    if odd := [name for name in names if Path(name).name != name or not is_file_of_rows(Path(name))]:
        raise TraceError(f"{path}: expected the name of a {KINDS} beside it, got {show(odd[0])}")
    return [path.with_name(name) for name in names]


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _rows_jsonl(path: Path, lenient: bool) -> Rows:
    with _open(path) as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > _LONGEST_LINE:
                raise TraceError(
                    f"{where}: expected at most {_LONGEST_LINE} bytes in a line, got more; write one trace a "
                    "line, and leave out one that is longer"
                )
            if line.strip():
                try:
                    row = _parse_json(line.rstrip(b"\r\n"), where)
                except TraceError as error:
                    if not lenient:
                        raise
                    row = error
                yield where, row


def _rows_json(path: Path, lenient: bool) -> Rows:
    """The rows of a JSON list, of an object with one list, or of an object of columns; or JSON lines."""
    with _open(path) as file:
        data = file.read()
    try:
        value = _parse_json(data, str(path))
    except TraceError:
        if not _are_json_lines(data):
            raise
        yield from _rows_jsonl(path, lenient)
        return
    rows = value
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        rows = lists[0] if len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]) else objects_of(value)
    if not isinstance(rows, list):
        raise TraceError(f"{path}: expected a list of traces, got {show(value)}; name it .jsonl if each line is one")
    for number, row in enumerate(rows):
        yield f"{path}: item {number}", row


def _are_json_lines(data: bytes) -> bool:
    """Whether the first line is a complete JSON object."""
    try:
        return isinstance(json.loads(data.lstrip().split(b"\n", 1)[0].decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _rows_parquet(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        with _open(path) as source, pyarrow.parquet.ParquetFile(source) as file:
            yield from _rows_of_batches(path, file.iter_batches(batch_size=256))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TraceError(f"{path}: expected a Parquet file: {error}") from error


def _rows_arrow(path: Path) -> Rows:
    """The rows of an Arrow file, or of an Arrow stream, which `datasets` writes."""
    import pyarrow

    try:
        with _open(path) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
            yield from _rows_of_batches(path, batches)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TraceError(f"{path}: expected an Arrow file: {error}") from error


def _rows_of_batches(path: Path, batches: Iterable[Any]) -> Rows:
    rows = (row for batch in batches for row in _rows_of_batch(batch))
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows))


def _rows_of_batch(batch: Any) -> Iterator[dict[str, Any]]:
    columns = list(map(_values_of_column, batch.columns))
    return (dict(zip(batch.schema.names, (column[n] for column in columns), strict=True)) for n in range(len(batch)))


def _values_of_column(column: Any) -> list[Any]:
    """The values of an Arrow array. Decimals become ints or floats, and a float32 0.1 becomes 0.1."""
    import pyarrow

    if column.type == pyarrow.float32():
        column = column.cast(pyarrow.string()).cast(pyarrow.float64())
    values = column.to_pylist()
    if pyarrow.types.is_decimal(column.type):
        return [None if value is None else int(value) if value == int(value) else float(value) for value in values]
    return values


def _rows_csv(path: Path, lenient: bool, delimiter: str) -> Rows:
    """The rows of a CSV file whose first row names the columns. An empty cell is None, any other is text."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_LINE))
    with _open(path) as source, io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            names = rows.fieldnames or ()
            if repeated := [name for name, count in Counter(names).items() if name and count > 1]:
                raise TraceError(
                    f"{path}:{rows.line_num}: expected different columns, got {repeated[0]!r} twice; rename one"
                )
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None not in row:
                    yield where, {name: cell or None for name, cell in row.items()}
                    continue
                error = TraceError(f"{where}: expected {len(names)} cells, got more; quote those with {delimiter!r}")
                if not lenient:
                    raise error
                yield where, error
        except csv.Error as error:
            raise TraceError(f"{path}:{rows.reader.line_num}: expected a valid table: {error}") from error
        except UnicodeDecodeError as error:
            raise TraceError(f"{path}: expected UTF-8, got {error.reason}; convert the file to UTF-8") from None


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{where}: expected UTF-8, got byte {data[error.start]:#04x} at {error.start}; convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise TraceError(f"{json_error_location(error, where)}: expected JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise TraceError(f"{where}: expected JSON that Python can read: {error}") from None
