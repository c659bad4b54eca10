"""Reading JSON records and checking their shape; errors name the location, the field and what was found."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from itertools import zip_longest
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_UNIONS = (Union, UnionType)


def from_json(cls: type, entry: object, where: str) -> Any:
    """Builds a flat dataclass from a JSON object. Raises ValueError if a field without a default is missing, or a field
    has the wrong type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {entry!r}")
    values = {}
    for field in fields(cls):
        if field.name not in entry and field.default is not MISSING:
            continue
        if field.name not in entry:
            raise ValueError(f"{where}: {field.name} is missing; write the file again")
        value = entry[field.name]
        expected = dict if get_origin(field.type) is dict else field.type
        if expected is float and type(value) is int:
            with suppress(OverflowError):  # reported below
                value = float(value)
        if isinstance(value, bool) or not isinstance(value, expected):  # type: ignore[arg-type]
            raise ValueError(f"{where}: {field.name}: expected {field.type}, got {value!r}")
        values[field.name] = value
    return cls(**values)


def to_json(record: Any) -> dict[str, Any]:
    """The fields of a flat dataclass, without those at their defaults; the inverse of `from_json`."""
    values = {field: getattr(record, field.name) for field in fields(record)}
    return {field.name: value for field, value in values.items() if value != field.default}


def check_numbers(config: Any) -> None:
    """Raises TypeError if a field of a dataclass is annotated as a number or None, but holds something else. Converts
    NumPy numbers to Python's, which JSON can hold."""
    for name, hint in _hints_of(config.__class__).items():
        value, kinds = getattr(config, name), get_args(hint) if get_origin(hint) in _UNIONS else (hint,)
        if any(kind not in (int, float, NoneType) for kind in kinds) or (value is None and NoneType in kinds):
            continue
        words, kind = ("a number", Real) if float in kinds else ("a whole number", Integral)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} must be {words}, got {value!r}")
        if not isinstance(value, int | float):
            object.__setattr__(config, name, int(value) if isinstance(value, Integral) else float(value))


@cache
def _hints_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)  # takes 0.2 ms


def show(value: object) -> str:
    if value is None:
        return "null"
    text = repr(value[:60] if isinstance(value, str | bytes | list | tuple) else value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def objects_of(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Converts a mapping of lists, as `datasets` stores it, back to a list of objects; None if it is not one."""
    if not value or not all(isinstance(column, list | tuple) for column in value.values()):
        return None
    return [dict(zip(value, item, strict=True)) for item in zip_longest(*value.values())]


def read_json(path: Path, shape: Any) -> Any:
    """The JSON in a file, or None if there is no such file. Raises ValueError if its shape does not match."""
    if not path.is_file():
        return None
    return _parse(path.read_bytes(), shape, str(path))


def json_lines(path: Path, shape: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its location. Skips a last line without a line break (truncated)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield f"{path}:{number}", _parse(line.rstrip(b"\r\n"), shape, f"{path}:{number}")


def _parse(text: bytes, shape: Any, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{json_error_location(error, where)}: expected JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON: {error}") from None
    check_shape(value, shape, where)
    return value


def json_error_location(error: json.JSONDecodeError, where: str) -> str:
    """The location of a JSON error: the column if the text is a single line, else the line."""
    return f"{where}, column {error.colno}" if error.lineno == 1 else f"{where}: line {error.lineno}"


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises ValueError, naming the first mismatch, if a value does not have this shape."""
    kinds: Any = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{where}: expected {names}, got {show(value)}")
    if isinstance(shape, list):
        for number, item in enumerate(value, start=1):
            check_shape(item, shape[0], f"{where}: entry {number}")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            if name is str:
                for key, item in value.items():
                    check_shape(item, inner, f"{where}: {key}")
            elif name not in value:
                raise ValueError(f"{where}: {name} is missing")
            else:
                check_shape(value[name], inner, f"{where}: {name}")


def check_present_fields(value: Mapping[str, Any], shape: Mapping[str, Any], where: str) -> None:
    """Like `check_shape`, but fields may be missing."""
    check_shape(value, {name: inner for name, inner in shape.items() if name in value}, where)
