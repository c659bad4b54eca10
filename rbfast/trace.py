"""Traces: what a teacher wrote, checked, read, written, and turned into packed training batches.

    traces = read_traces("traces.jsonl")                     # or .json, .parquet, or a hub id
    examples, left_out = encode_all(traces, tokenizer, max_tokens=2048)
    batch = collate(examples[:8])                            # input_ids, position_ids, labels, roles: [1, T]

A `Trace` that exists is valid: its fields are checked when it is made. What is wrong is a `TraceError` that reads
"file:line: field: expected ..., got ...; what to do".
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rbfast import hub
from rbfast.files import replacing
from rbfast.schema import Trace, TraceError, show
from rbfast.spans import ANSWER, ROLES, STRATEGIC, TACTICAL, Span, split_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ANSWER",
    "IGNORE",
    "INSTRUCTION",
    "NO_ROLE",
    "ROLES",
    "STRATEGIC",
    "TACTICAL",
    "Example",
    "Span",
    "Trace",
    "TraceError",
    "collate",
    "encode",
    "encode_all",
    "format_prompt",
    "read_rows",
    "read_traces",
    "split_spans",
    "write_traces",
]

NO_ROLE = -1
IGNORE = -100
INSTRUCTION = "Think step by step, then give the final answer between <answer> and </answer>."

_LONGEST_LINE = 64 * 2**20  # bytes; 32k tokens with a top-20 each are a quarter of it

# Reading and writing


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
    place = hub.place(source, split) if isinstance(source, str) and path.suffix not in readers else None
    if place is None:
        raise TraceError(f"{source}: expected a file or a dataset on the hub ({hub.FORMS}); there is no such file")
    return _rows_hub(place, streaming)


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


def _rows_hub(place: hub.Place, streaming: bool) -> Iterator[tuple[str, Any]]:
    try:
        rows = hub.load(place, streaming)
    except ValueError as error:
        raise TraceError(f"{place.name}: there is no such file, and {error}") from error
    for number, row in enumerate(rows):
        yield f"{place}: row {number}", row


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


# Tokens


@dataclass
class Example:
    """One tokenised trace: prompt, completion, end of turn.

    Labels are already shifted: `labels[i]` is `input_ids[i + 1]` where that token is the student's to write, else
    IGNORE; `roles[i]` is the role of `labels[i]`, else NO_ROLE. The teacher's top-k for `labels[teacher_rows[j]]` is
    row j of `teacher_ids` and `teacher_logprobs`; where a row is short it ends in id 0 at log-prob -inf.
    """

    input_ids: np.ndarray  # int64 [n], and so are labels and roles
    labels: np.ndarray
    roles: np.ndarray
    teacher_ids: np.ndarray | None = None  # int64 or int32 [m, k]
    teacher_logprobs: np.ndarray | None = None  # float32 [m, k]
    teacher_rows: np.ndarray | None = None  # int64 [m]
    id: str | None = None


def format_prompt(problem: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt that asks for a solution, special tokens included: tokenise it with `add_special_tokens=False`."""
    request = f"{problem}\n\n{INSTRUCTION}"
    if tokenizer.chat_template is not None:
        return _render(tokenizer, [{"role": "user", "content": request}], open_reply=True)
    opens_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return f"{tokenizer.bos_token if opens_with_bos else ''}{request}\n\n"


def _render(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], open_reply: bool) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_reply))


def encode(trace: Trace, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int = 4096) -> Example:
    """Tokenise prompt and completion apart, as they meet at inference, and give every trained token its role.

    A token has the role of its first character that is no white space. Special tokens that are spelled out in a
    completion stay text. Raises TraceError where the trace is longer than `max_tokens` (it is never cut) or its
    signals do not fit the tokens; ValueError where the tokenizer gives no offsets or has no end of turn.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"roles need a fast tokenizer (one that gives offsets), got {type(tokenizer).__name__}")
    where = trace.id or repr(trace.problem[:40])
    prompt = tokenizer(format_prompt(trace.problem, tokenizer), add_special_tokens=False, verbose=False).input_ids
    written = tokenizer(
        trace.completion(),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = np.array([*prompt, *written.input_ids, end_of_turn(tokenizer)], dtype=np.int64)
    if len(ids) > max_tokens:
        raise TraceError(f"{where}: expected at most {max_tokens} tokens, got {len(ids)}; raise max_tokens or drop it")
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[len(prompt) - 1 : -1] = ids[len(prompt) :]
    roles = np.full(len(ids), NO_ROLE, dtype=np.int64)
    offsets = np.array(written.offset_mapping, dtype=np.int64).reshape(-1, 2)
    roles[len(prompt) - 1 : -2] = _token_roles(trace, offsets)
    roles[-2] = ANSWER
    example = Example(ids, labels, roles, id=trace.id)
    if trace.signals is not None:
        _add_signals(example, trace.signals, max(len(tokenizer), tokenizer.vocab_size), where)
    return example


def _token_roles(trace: Trace, offsets: np.ndarray) -> np.ndarray:
    """The role of each token of the completion, int64 [tokens], from its character offsets [tokens, 2]."""
    text = trace.completion()
    spans = np.array(trace.role_spans(), dtype=np.int64)
    role_of = np.repeat(spans[:, 2], spans[:, 1] - spans[:, 0])
    blank = np.array([character.isspace() for character in text])
    next_ink = np.minimum.accumulate(np.where(blank, len(text), np.arange(len(text)))[::-1])[::-1]
    start, end = np.minimum(offsets[:, 0], len(text) - 1), offsets[:, 1]
    ink = next_ink[start]
    return role_of[np.where(ink < end, ink, start)]


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends an assistant's turn: the added token the chat template puts there, else the eos token."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
        after = _render(tokenizer, turns, open_reply=False).rpartition("reply")[2].lstrip()
        first = tokenizer(after, add_special_tokens=False).input_ids[:1]
        if first and first[0] in tokenizer.added_tokens_decoder:
            return first[0]
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, and its chat template ends no turn; set tokenizer.eos_token")
    return tokenizer.eos_token_id


def _add_signals(example: Example, signals: Mapping[str, list[list[Any]]], vocabulary: int, where: str) -> None:
    rows = np.flatnonzero(example.labels != IGNORE)
    ids, logprobs = signals["ids"], signals["logprobs"]
    if len(ids) != len(rows):
        raise TraceError(
            f"{where}: signals: expected {len(rows)} rows, one for each trained token, got {len(ids)}; "
            "were they made with another tokenizer?"
        )
    if (largest := max(chain.from_iterable(ids))) >= vocabulary:
        raise TraceError(f"{where}: signals.ids: expected ids below {vocabulary}, the vocabulary, got {largest}")
    width = max(map(len, ids))
    example.teacher_rows = rows
    example.teacher_ids = np.array([row + [0] * (width - len(row)) for row in ids], dtype=np.int64)
    padded = [row + [-math.inf] * (width - len(row)) for row in logprobs]
    example.teacher_logprobs = np.array(padded, dtype=np.float32)


def encode_all(
    traces: Iterable[Trace], tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int = 4096, progress: bool = False
) -> tuple[list[Example], list[tuple[Trace, str]]]:
    """Encode what can be encoded; returns the examples, and the traces that were left out with the reason."""
    if progress:
        from rich.progress import track

        traces = track(traces, description="tokenising")
    examples: list[Example] = []
    left_out: list[tuple[Trace, str]] = []
    for trace in traces:
        try:
            examples.append(encode(trace, tokenizer, max_tokens=max_tokens))
        except TraceError as error:
            left_out.append((trace, str(error)))
    return examples, left_out


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pack examples end to end without padding.

    Returns `input_ids`, `position_ids` (from 0 in each example), `labels` and `roles`, int64 [1, T]; and where an
    example has signals `teacher_ids` int64 [N, k], `teacher_logprobs` float32 [N, k] and `teacher_rows` int64 [N],
    rows of the T axis. A model keeps the examples apart by the restarting positions: give it no attention mask
    and `use_cache=False`.
    """
    if not examples:
        raise ValueError("collate needs at least one example, got none")
    packed = {
        name: torch.from_numpy(np.concatenate([getattr(example, name) for example in examples]))[None]
        for name in ("input_ids", "labels", "roles")
    }
    lengths = [len(example.input_ids) for example in examples]
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    return packed | _collate_signals(examples, lengths)


def _collate_signals(examples: Sequence[Example], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    ids, logprobs, rows = [], [], []
    for example, start in zip(examples, np.cumsum([0, *lengths[:-1]]), strict=True):
        if example.teacher_ids is None or example.teacher_logprobs is None or example.teacher_rows is None:
            continue
        ids.append(example.teacher_ids)
        logprobs.append(example.teacher_logprobs)
        rows.append(example.teacher_rows + start)
    if not rows:
        return {}
    return {
        "teacher_ids": torch.from_numpy(_stack_rows(ids, 0)).long(),
        "teacher_logprobs": torch.from_numpy(_stack_rows(logprobs, -math.inf)),
        "teacher_rows": torch.from_numpy(np.concatenate(rows)),
    }


def _stack_rows(blocks: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Blocks [m_i, k_i] under each other, [sum m_i, max k_i], short rows ended with `fill`."""
    width = max(block.shape[1] for block in blocks)
    padded = [np.pad(block, ((0, 0), (0, width - block.shape[1])), constant_values=fill) for block in blocks]
    return np.concatenate(padded)
