"""Finished parts of an experiment: each is kept in its own file, so that an interrupted script resumes.

    record = part(out / "before.json", {"seed": 0, "data": digest(rows)}, measure)      # the second call reads the file
    record["result"]

A record with other settings is refused, never reused.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rbfast.utils.files import write_text


def part(path: Path, asked: Mapping[str, Any], measure: Callable[[], Any]) -> dict[str, Any]:
    """The record in `path`; if there is none, runs `measure` and stores its result with `asked` and the seconds.

    Raises:
        ValueError: the record was made with another `asked`.
    """
    wanted = json.loads(json.dumps(asked))
    if path.exists():
        record = json.loads(path.read_text())
        for name in wanted | record["asked"]:
            held, now = record["asked"].get(name), wanted.get(name)
            if held != now:
                raise ValueError(f"{path} was made with {name} {held!r}, now it is {now!r}: choose another --out")
        return record
    start = time.monotonic()
    record = {"result": measure(), "asked": wanted, "seconds": time.monotonic() - start}
    write_text(path, json.dumps(record, indent=1))
    return record


def digest(items: Iterable[Any]) -> str:
    return blake2b(json.dumps(list(items), sort_keys=True).encode(), digest_size=16).hexdigest()
