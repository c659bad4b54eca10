"""Map a teacher's log-probs to the student's tokens, where both tokenizers split the text at the same places.

Tokens are compared as bytes. If a token of the student and one of the teacher cover the same bytes, the teacher's
candidates become the student's tokens with the same bytes. Candidates without such a token stay in the tail. All other
tokens of the student get no signal, only the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class _LoneByte(bytes):
    """The byte of a byte-fallback token such as `<0x33>`."""


class Piece(NamedTuple):
    """A teacher's token in a text, and the candidates in its place with natural log-probs."""

    written: bytes
    top: Sequence[tuple[bytes, float]]


class AlignedToken(NamedTuple):
    """The candidates for one of the student's tokens (its index): their ids and natural log-probs, at least one."""

    token: int
    ids: list[int]
    logprobs: list[float]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of each token id; None for special tokens and unused ids.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"aligning log-probs needs a fast tokenizer, got {type(tokenizer).__name__}")
    return _spelled(tokenizer, len(tokenizer))


def spellings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes | None]:
    """The bytes of each token. A special token (thinking tags may be special) is spelled by its name."""
    tokens, added = token_bytes(tokenizer), tokenizer.added_tokens_decoder

    def spell(number: int) -> bytes | None:
        if number in added:
            return added[number].content.encode()
        return tokens[number] if number < len(tokens) else None  # a model may have more rows than tokens

    return list(map(spell, ids))


@lru_cache(maxsize=4)  # called for every trace, with the same two tokenizers; `size` changes if tokens are added
def _spelled(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes | None]:
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    spell = _spell_byte_level if "ByteLevel" in decoder else _spell_sentencepiece
    vocabulary = tokenizer.get_vocab()
    spelled: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    added = tokenizer.added_tokens_decoder
    for token, number in vocabulary.items():
        if number not in added:
            spelled[number] = spell(token)
        elif not added[number].special:
            spelled[number] = added[number].content.encode()
    return spelled


def ids_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """The id of each token's bytes: the first of several tokens with the same bytes, but `3` before `<0x33>`, which a
    tokenizer uses only for characters without a token."""
    return _ids_of(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)  # as for `_spelled`
def _ids_of(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[bytes, int]:
    return _ids_by_bytes(token_bytes(tokenizer))


def _ids_by_bytes(tokens: Sequence[bytes | None]) -> dict[bytes, int]:
    ids: dict[bytes, int] = {}
    for number, written in enumerate(tokens):
        if written and (written not in ids or isinstance(tokens[ids[written]], _LoneByte)):
            ids[written] = number
    return ids


def student_ids(teacher: Sequence[bytes | None], student: Sequence[bytes | None], size: int) -> np.ndarray:
    """int64 [size]: for each id of the teacher, the student's id with the same bytes, else -1."""
    by_bytes = _ids_by_bytes(student)
    mapped = np.full(size, -1, dtype=np.int64)
    for number, written in enumerate(teacher):
        if written:
            mapped[number] = by_bytes.get(written, -1)
    return mapped


def byte_spans(tokens: Sequence[bytes | None], text: bytes) -> list[tuple[int, int]]:
    """The byte range [start, end) of each token in `text`. A space that the tokenizer prepends starts at -1.

    Raises:
        ValueError: the tokens do not spell the text, because the tokenizer normalises it or a token is special.
    """
    if any(token is None for token in tokens):
        raise ValueError("a token is special or unknown: it has no bytes")
    ends = np.cumsum([0, *(len(token or b"") for token in tokens)])
    joined = b"".join(token or b"" for token in tokens)
    opening = 0 if joined == text else 1
    if opening and joined != b" " + text:
        at = shared_length(joined, text)
        raise ValueError(f"the tokens spell {joined[at : at + 20]!r}, the text is {text[at : at + 20]!r}")
    return [(int(start) - opening, int(end) - opening) for start, end in pairwise(ends)]


def shared_length(one: bytes, other: bytes) -> int:
    """The length of the common prefix."""
    ends = min(len(one), len(other))
    return next((i for i in range(ends) if one[i] != other[i]), ends)


def align(
    student: Sequence[tuple[int, int]],
    teacher: Sequence[tuple[int, int]],
    pieces: Sequence[Piece],
    ids: Mapping[bytes, int],
) -> list[AlignedToken]:
    """The candidates for each token of the student that has the same byte range as a token of the teacher.

    Args:
        student, teacher: the byte ranges of both token sequences in the same text.
        pieces: the teacher's tokens.
        ids: `ids_by_bytes` of the student.
    """
    at = dict(zip(teacher, pieces, strict=True))
    aligned = []
    for token, span in enumerate(student):
        piece = at.get(span)
        candidates = [(ids[written], value) for written, value in piece.top if written in ids] if piece else []
        if candidates:
            numbers, logprobs = zip(*candidates, strict=True)
            aligned.append(AlignedToken(token, [*numbers], [*logprobs]))
    return aligned


def _spell_byte_level(token: str) -> bytes:
    letters = _letters()
    return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else token.encode()


@lru_cache
def _letters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes are themselves, the others follow from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _spell_sentencepiece(token: str) -> bytes:
    if match := _BYTE.fullmatch(token):
        return _LoneByte([int(match[1], 16)])
    return token.replace("▁", " ").encode()
