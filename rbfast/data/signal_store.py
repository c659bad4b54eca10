"""A teacher's log-probs on disk: the top k at each trained token of each trace, in safetensors shards.

```python
with SignalStore(folder, teacher="my-teacher", k=32, vocabulary=len(tokenizer)) as store:
    if example not in store:
        store.add(example, rows, ids, logprobs)
missing = SignalStore.open(folder).fill(examples)                # before training
```

A trace is looked up by its token ids, so signals of another text or tokenizer never match. The tail's mass is 1 minus
the sum of the listed tokens, so log-probs are kept in fp32: rounding them to 16 bits would change the gradient of a
student 0.02 nats from the teacher by 2%. A token takes `k` times 6 bytes, or 8 for vocabularies above 65,536.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from rbfast.data.encoding import IGNORE, Example
from rbfast.utils.files import atomic_write, write_text
from rbfast.utils.records import show
from rbfast.utils.sealed import check_seal, seal

FORMAT, VERSION = "rbfast-signals", 1
MANIFEST = "signals.json"
_SHARD_TOKENS = 2**18
_KEY_BYTES = 16
_MASS_TOLERANCE = 1e-3  # probabilities in half precision can add up to a little more than 1


@dataclass(frozen=True)
class _Entry:
    """The top k of one trace: rows int32 [n] of its example, ids [n, k], logprobs float32 [n, k], padded with -inf."""

    key: bytes
    rows: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


class SignalStore:
    """A growing folder of shards. Only complete shards are written, so an interrupted run resumes after the last."""

    def __init__(self, folder: str | Path, teacher: str, k: int, vocabulary: int) -> None:
        """Open the folder, or create it.

        Args:
            teacher: the name of the teacher.
            k: the most candidates per token.
            vocabulary: the size of the student's vocabulary.

        Raises:
            ValueError: the folder holds signals of another teacher, k or vocabulary, or a broken file.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.folder, self.k, self.teacher = Path(folder), k, teacher
        self.vocabulary = vocabulary
        self._dtype = np.uint16 if vocabulary <= 2**16 else np.int32
        about = {"format": FORMAT, "version": VERSION, "teacher": teacher, "k": k, "vocabulary": vocabulary}
        self._shards = sorted(self.folder.glob("signals-*.safetensors"))
        self._check_manifest(about)
        self._pending: list[_Entry] = []
        self._locations: dict[bytes, tuple[int, int]] = {}  # shard and item
        self._loaded: tuple[int, dict[str, np.ndarray]] | None = None
        for number in range(len(self._shards)):
            for item, key in enumerate(self._read_keys(number)):
                self._locations[key.tobytes()] = number, item

    @classmethod
    def open(cls, folder: str | Path) -> SignalStore:
        """Open an existing folder. Raises ValueError if it holds no signals."""
        about = _read_manifest(Path(folder) / MANIFEST)
        return cls(folder, about["teacher"], about["k"], about["vocabulary"])

    def __enter__(self) -> SignalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def __len__(self) -> int:
        return len(self._locations) + len(self._pending)

    def __contains__(self, example: Example) -> bool:
        key = example_key(example)
        return key in self._locations or any(entry.key == key for entry in self._pending)

    def add(self, example: Example, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Add log-probs [n, up to k] for the labels at `rows` [n] of an example; -inf marks padding."""
        if not len(rows) == len(ids) == len(logprobs) or ids.shape != logprobs.shape or ids.shape[1] > self.k:
            raise ValueError(f"expected rows [n], ids and logprobs [n, up to {self.k}], got {rows.shape}, {ids.shape}")
        # Also refuses NaN.
        if not np.all(np.exp(logprobs.astype(np.float64)).sum(1) <= 1 + _MASS_TOLERANCE):
            raise ValueError("expected log-probs whose probabilities add up to at most 1; are they logits?")
        blank = ((0, 0), (0, self.k - ids.shape[1]))
        ids = np.pad(np.where(logprobs == -math.inf, 0, ids), blank)
        logprobs = np.pad(logprobs, blank, constant_values=-math.inf)
        entry = _Entry(
            example_key(example), rows.astype(np.int32), ids.astype(self._dtype), logprobs.astype(np.float32)
        )
        self._pending.append(entry)
        if sum(len(entry.rows) for entry in self._pending) >= _SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the pending entries as one more shard, atomically."""
        if not self._pending:
            return
        entries = self._pending
        tensors = {
            "keys": np.stack([np.frombuffer(entry.key, dtype=np.uint8) for entry in entries]),
            "ends": np.cumsum([len(entry.rows) for entry in entries]),
            **{name: np.concatenate([getattr(e, name) for e in entries]) for name in ("rows", "ids", "logprobs")},
        }
        path = self.folder / _shard_name(tensors["keys"])
        with atomic_write(path) as file:
            file.write(seal(save(tensors)))
        self._pending = []  # not before: after a full disk, the next flush writes them
        for item, entry in enumerate(entries):
            self._locations[entry.key] = len(self._shards), item
        self._shards.append(path)

    def fill(self, examples: Iterable[Example]) -> list[Example]:
        """Set the signals of each example; returns the examples without any. Raises ValueError for a broken shard."""
        self.flush()
        examples = list(examples)
        places = [self._locations.get(example_key(example)) for example in examples]
        # In the order of the shards, so that each is loaded once: they are large.
        in_order = sorted((place, index) for index, place in enumerate(places) if place is not None)
        for (number, item), index in in_order:
            self._fill_one(examples[index], number, item)
        return [example for example, place in zip(examples, places, strict=True) if place is None]

    def _fill_one(self, example: Example, number: int, item: int) -> None:
        shard = self._load_shard(number)
        ends = shard["ends"]
        part = slice(int(ends[item - 1]) if item else 0, int(ends[item]))
        rows = shard["rows"][part].astype(np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(example.labels):
            raise ValueError(f"{self._shards[number]}: rows beyond the end of a trace; remove it and teach again")
        example.teacher_rows = rows
        example.teacher_ids = shard["ids"][part].astype(np.int32)
        example.teacher_logprobs = shard["logprobs"][part].copy()  # a view would keep the shard in memory

    def _check_manifest(self, about: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        stored = _read_manifest(path) if path.exists() else None
        if stored is None or not self._shards:  # a call that got no log-probs may have had other settings
            if stored != about:
                write_text(path, json.dumps(about, indent=1))
            return
        for name, value in about.items():
            if stored[name] != value:
                raise ValueError(
                    f"{self.folder} holds signals with {name} {stored[name]!r}, expected {value!r}; "
                    "choose another folder"
                )

    def _read_keys(self, number: int) -> np.ndarray:
        """The keys of one shard, uint8 [items, 16]. The rest, which may be large, is read and checked by `fill`."""
        with _naming_shard(self._shards[number]), safe_open(self._shards[number], "np") as shard:
            keys = shard.get_tensor("keys")
            _check_keys(keys)
            if self._shards[number].name != _shard_name(keys):
                raise ValueError("its index does not match its name")
            return keys

    def _load_shard(self, number: int) -> dict[str, np.ndarray]:
        """One shard, cached until another is read. Raises ValueError, naming the file, if it is broken."""
        if self._loaded is None or self._loaded[0] != number:
            with _naming_shard(self._shards[number]):
                data = self._shards[number].read_bytes()
                tensors = load(data)
                check_seal(data)
                self._check_shard(tensors)
            self._loaded = number, tensors
        return self._loaded[1]

    def _check_shard(self, tensors: dict[str, np.ndarray]) -> None:
        keys, ends, rows, ids, logprobs = (tensors[name] for name in ("keys", "ends", "rows", "ids", "logprobs"))
        _check_keys(keys)
        dtypes = {"ends": np.int64, "rows": np.int32, "ids": self._dtype, "logprobs": np.float32}
        for name, dtype in dtypes.items():
            if tensors[name].dtype != dtype:
                raise ValueError(f"expected {name} to be {np.dtype(dtype)}, got {tensors[name].dtype}")
        n = rows.size
        if len(keys) != ends.size or rows.shape != (n,) or np.any(np.diff(ends, prepend=0) < 0):
            raise ValueError("its index does not fit its rows")
        if (ends[-1] if ends.size else 0) != n:
            raise ValueError("its index does not fit its rows")
        if ids.shape != (n, self.k) or logprobs.shape != (n, self.k):
            raise ValueError(f"expected ids and logprobs [{n}, {self.k}]")
        if n and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise ValueError(f"expected ids below {self.vocabulary}")
        if not np.all(np.exp(logprobs.astype(np.float64)).sum(1) <= 1 + _MASS_TOLERANCE):  # also refuses NaN
            raise ValueError("expected log-probs whose probabilities add up to at most 1")


@contextmanager
def _naming_shard(path: Path) -> Iterator[None]:
    """Raises ValueError, naming the shard, if the block finds it broken."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a complete shard of signals ({error}); remove it and teach again") from error


def _shard_name(keys: np.ndarray) -> str:
    """A name after the traces: no other process writes another shard under it, and it shows a damaged index."""
    return f"signals-{blake2b(keys.tobytes(), digest_size=8).hexdigest()}.safetensors"


def _check_keys(keys: np.ndarray) -> None:
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != _KEY_BYTES:
        raise ValueError(f"expected keys to be uint8 [items, {_KEY_BYTES}], got {keys.dtype} {list(keys.shape)}")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        valid = about["format"] == FORMAT and about["version"] == VERSION
        kinds = {"teacher": str, "k": int, "vocabulary": int}
        if wrong := [name for name, kind in kinds.items() if type(about[name]) is not kind]:
            raise TypeError(f"{wrong[0]}: expected {kinds[wrong[0]].__name__}, got {show(about[wrong[0]])}")
        if min(about["k"], about["vocabulary"]) < 1:
            raise ValueError(f"k and vocabulary must be at least 1, got {about['k']} and {about['vocabulary']}")
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: expected a folder that `rbfast teach --score` wrote, got none") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected the manifest of a folder of signals: {error!r}") from None
    if not valid:
        raise ValueError(f"{path}: expected {FORMAT} of version {VERSION}, got another")
    return dict(about)


def example_key(example: Example) -> bytes:
    """A hash of an example's tokens and of where its trained tokens start."""
    first = np.flatnonzero(example.labels != IGNORE)[:1]
    data = np.concatenate([first, example.input_ids]).astype("<i8")
    return blake2b(data.tobytes(), digest_size=_KEY_BYTES).digest()
