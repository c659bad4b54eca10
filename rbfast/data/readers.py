"""Read traces and rows from files and the hub, and write traces.

traces = read_traces("traces.jsonl")                     # or .json, .parquet, .arrow, .csv, a folder of them, a hub id
traces = read_traces("pool.jsonl", on_error="skip", unreadable="pool.unreadable.jsonl")
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rbfast.data import hub
from rbfast.data.answers import as_text
from rbfast.data.formats import AUTO, FormatOptions, interpret
from rbfast.data.replies import END_FIELDS, cut_by_server
from rbfast.data.row_files import is_file_of_rows, rows_of_path
from rbfast.data.trace import Trace, TraceError
from rbfast.utils.files import atomic_write, write_text

log = logging.getLogger(__name__)

# The fields that `interpret` may set. Any other field is the source row's own.
_TRACE_FIELDS = {*Trace.__dataclass_fields__, "reference", "finished", "truncated", *END_FIELDS}


def read_traces(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    options: FormatOptions = AUTO,
    on_error: Literal["raise", "skip"] = "raise",
    unreadable: str | Path | None = None,
) -> list[Trace]:
    """The traces of a file, a folder or a dataset on the hub, in any format of docs/formats.md.

    Args:
        source: a .jsonl, .json, .parquet, .arrow, .csv or .tsv file (.gz too); a folder of them, or one that `rbfast
            teach` or `rbfast curate` wrote; or `owner/name`, `owner/name:split` or `owner/name:config:split`.
        split: the split of a folder, or of a dataset named without one.
        limit: read only the first `limit` traces.
        options: how to read rows if their field names are not enough.
        on_error: "raise" stops at the first row without a trace; "skip" skips it with a warning.
        unreadable: JSONL file for the skipped rows: the location of each, and the reason.

    Raises:
        TraceError: a row without a trace; with "skip", a source without any trace, or with none in its first 100 rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error: expected "raise" or "skip", got {on_error!r}')
    reader = TraceReader(source, split=split, options=options, skip=on_error == "skip", streaming=limit is not None)
    traces = reader.all(limit)
    if reader.unreadable:
        log.warning("%s: %s, the first: %s", source, reader.summary(), reader.unreadable[0][1])
        if unreadable is not None:
            reader.write_unreadable(unreadable)
    return traces


PATIENCE = 100  # give up after this many rows without a trace at the start of a source


class TraceReader:
    """Iterate over the traces of a source.

    `counts` counts the formats of its rows, `unreadable` lists skipped rows with the reason. With `skip` it raises
    TraceError if none of the first `patience` rows holds a trace.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        split: str = "train",
        options: FormatOptions = AUTO,
        skip: bool = False,
        streaming: bool = True,
        patience: int | None = PATIENCE,
    ) -> None:
        self.source, self.options, self.skip, self.patience = source, options, skip, patience
        self.counts: Counter[str] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self._rows = _open_rows(source, split, streaming, lenient=skip)

    def __iter__(self) -> Iterator[Trace]:
        return (trace for trace, _ in self.with_rows())

    def with_rows(self) -> Iterator[tuple[Trace, Mapping[str, Any]]]:
        """Each trace, and the row from `interpret` that it was made from."""
        for where, row in self._rows:
            try:
                name, traces = _traces_of(row, self.options)
            except TraceError as error:
                reason = str(error) if error is row else f"{where}: {error}"
                if not self.skip:
                    raise TraceError(reason) from None
                self._skip(where, reason)
                continue
            self.counts[name] += 1
            yield from traces

    def all(self, limit: int | None = None) -> list[Trace]:
        """The traces, or the first `limit`. Raises TraceError if there are none."""
        traces = list(islice(self, limit))
        if not traces:
            raise TraceError(self.error_message())
        return traces

    def _skip(self, where: str, reason: str) -> None:
        self.unreadable.append((where, reason))
        if len(self.unreadable) == self.patience and not self.counts:
            raise TraceError(self.error_message())

    def error_message(self) -> str:
        """Why nothing was read."""
        if not self.unreadable:
            return f"{self.source}: expected at least one trace, got none"
        rows, first = len(self.unreadable), self.unreadable[0][1]
        return first if rows == 1 else f"{first} (none of the first {rows} rows can be read)"

    def summary(self) -> str:
        """The formats found: "reads 17,398 rows as OpenThoughts conversations"."""
        read = " and ".join(f"{_rows_in_words(count)} as {name}" for name, count in self.counts.most_common())
        left = f"; {_rows_in_words(len(self.unreadable))} not read" if self.unreadable else ""
        return f"reads {read or 'no rows'}{left}"

    def write_unreadable(self, path: str | Path) -> None:
        """Write the rows that were not read as JSONL: the location of each, and the reason."""
        lines = [
            json.dumps({"where": where, "reason": reason}, ensure_ascii=False) for where, reason in self.unreadable
        ]
        write_text(path, "\n".join(lines) + "\n")


def _rows_in_words(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _traces_of(row: Any, options: FormatOptions) -> tuple[str, list[tuple[Trace, Mapping[str, Any]]]]:
    if isinstance(row, TraceError):
        raise row
    interpretation = interpret(row, options)
    if reason := next(filter(None, map(cut_by_server, interpretation.rows)), None):
        raise TraceError(f"{reason}; leave the row out")
    return interpretation.name, [(Trace.from_dict(fields), fields) for fields in interpretation.rows]


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Every row, unchecked, with its location ("file:line"), one at a time. Sources as for `read_traces`."""
    return _open_rows(source, split, streaming=True)


def read_native_rows(
    source: str | Path,
    options: FormatOptions = AUTO,
    *,
    note: Callable[[str], None] | None = None,
    keep_fields: bool = False,
) -> Iterator[tuple[str, Any]]:
    """Every trace as an unchecked row with the fields of a trace; a TraceError in place of a row without a trace.

    Sources as for `read_traces`. `note` is called with the format of each row. With `keep_fields` a row also has the
    other fields of its source row, whatever the format.
    """
    for where, row in _open_rows(source, "train", streaming=True, lenient=True):
        try:
            if isinstance(row, TraceError):
                raise row
            interpretation = interpret(row, options)
        except TraceError as error:
            yield where, error
            continue
        if note is not None:
            note(interpretation.name)
        rows = interpretation.rows
        if keep_fields and isinstance(row, Mapping):
            others = {name: value for name, value in row.items() if name not in _TRACE_FIELDS}
            rows = [{**others, **fields} for fields in rows]
        if len(rows) == 1:
            yield where, rows[0]
        else:
            yield from ((f"{where} ({number})", fields) for number, fields in enumerate(rows, start=1))


def _open_rows(source: str | Path, split: str, streaming: bool, lenient: bool = False) -> Iterator[tuple[str, Any]]:
    """Rows with their locations; if `lenient`, a TraceError in place of a line that is not JSON."""
    path = Path(source)
    if path.exists():
        return rows_of_path(path, split, lenient)
    dataset = hub.parse_name(source, split) if isinstance(source, str) and not is_file_of_rows(path) else None
    if dataset is None:
        raise TraceError(f"{source}: expected a file or a dataset on the hub ({hub.FORMS}); there is no such file")
    return _rows_hub(dataset, streaming)


def _rows_hub(dataset: hub.HubDataset, streaming: bool) -> Iterator[tuple[str, Any]]:
    try:
        rows = hub.load_rows(dataset, streaming)
    except ValueError as error:
        raise TraceError(f"{dataset.name}: there is no such file, and {error}") from error
    for number, row in enumerate(rows):
        yield f"{dataset}: row {number}", row


def record_of(trace: Trace, row: Mapping[str, Any]) -> dict[str, Any]:
    """The trace as JSON, with the fields of its row that curation also reads: the reference answer, and the fields that
    show whether the text is complete."""
    values = {name: row.get(name) for name in ("reference", "finished", *END_FIELDS)}
    plain = {name: value if isinstance(value, bool) else as_text(value) for name, value in values.items()}
    return trace.to_dict() | {name: value for name, value in plain.items() if value is not None}


def write_traces(path: str | Path, traces: Iterable[Trace]) -> int:
    """Write traces by `write_records`. A row's known answer (`reference`) is not a field of a trace, so it is lost: to
    curate by it, give `rbfast curate` the source file, or the output of `rbfast convert`."""
    return write_records(path, (trace.to_dict() for trace in traces))


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write JSONL atomically, through a temporary file in the same folder. Returns the number of records."""
    count = 0
    with atomic_write(path, "w") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count
