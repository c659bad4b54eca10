"""Traces and rows from files and the hub, and traces into files.

traces = read_traces("traces.jsonl")                     # or .json, .parquet, or a hub id
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rbfast.data import hub
from rbfast.data.trace import Trace, TraceError
from rbfast.utils.files import replacing
from rbfast.utils.records import show

_LONGEST_LINE = 64 * 2**20  # bytes; 32k tokens with a top-20 each are a quarter of it


def read_traces(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Trace]:
    """The traces of a .jsonl, .json or .parquet file, or of a dataset on the hub (`owner/name`, of which `split`;
    `owner/name:split` or `owner/name:config:split`).

    Reads the first `limit` where given. Raises TraceError at the first trace that is not valid.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    rows = islice(_rows(source, split, streaming=limit is not None), limit)
    traces = [Trace.from_dict(row, where) for where, row in rows]
    if not traces:
        raise TraceError(f"{source}: expected at least one trace, got none")
    return traces


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Every row, unchecked, with where it stands ("file:line"), one at a time; sources as for `read_traces`."""
    return _rows(source, split, streaming=True)


def _rows(source: str | Path, split: str, streaming: bool) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    readers = {".jsonl": _rows_jsonl, ".json": _rows_json, ".parquet": _rows_parquet}
    if path.is_dir():
        raise TraceError(f"{source}: expected a file or a hub id, got a directory; name one of the files in it")
    if path.is_file():
        if path.suffix not in readers:
            raise TraceError(f"{source}: expected a .jsonl, .json or .parquet file, got {path.suffix or 'no suffix'}")
        return readers[path.suffix](path)
    dataset = hub.named(source, split) if isinstance(source, str) and path.suffix not in readers else None
    if dataset is None:
        raise TraceError(f"{source}: expected a file or a dataset on the hub ({hub.FORMS}); there is no such file")
    return _rows_hub(dataset, streaming)


def _rows_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > _LONGEST_LINE:
                raise TraceError(
                    f"{where}: expected at most {_LONGEST_LINE} bytes in a line; is this one trace a line?"
                )
            if line.strip():
                yield where, _parse_json(line, where)


def _rows_json(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parse_json(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise TraceError(f"{path}: expected a list of traces, got {show(rows)}; name it .jsonl if it has one a line")
    for number, row in enumerate(rows):
        yield f"{path}: item {number}", row


def _rows_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TraceError(f"{path}: expected a Parquet file: {error}") from error


def _rows_hub(dataset: hub.HubDataset, streaming: bool) -> Iterator[tuple[str, Any]]:
    try:
        rows = hub.load_rows(dataset, streaming)
    except ValueError as error:
        raise TraceError(f"{dataset.name}: there is no such file, and {error}") from error
    for number, row in enumerate(rows):
        yield f"{dataset}: row {number}", row


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{where}: expected UTF-8, got byte {data[error.start]:#04x} at {error.start}; convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        at = f"{where}, column {error.colno}" if error.lineno == 1 else f"{where}: line {error.lineno}"
        raise TraceError(f"{at}: expected JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise TraceError(f"{where}: expected JSON that can be read: {error}") from None


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Write JSONL, whole or not at all: a temporary file in the same folder takes the name at the end."""
    with replacing(path, "w") as file:
        for trace in traces:
            file.write(json.dumps(trace.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
