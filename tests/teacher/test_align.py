"""Tokens as bytes, and the alignment of a teacher's tokens with the student's."""

import math
from itertools import pairwise

import numpy as np
import pytest
from tiny_tokenizers import END, byte_fallback, byte_level

from rbfast.teacher.align import Piece, align, byte_spans, ids_by_bytes, student_ids, token_bytes

TEXT = "Add 12 and 30: é, 你好, 😀.\n  Then 42."
TOKENIZERS = {"byte level": byte_level(TEXT), "byte fallback": byte_fallback(TEXT)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def pieces_of(tokenizer, text):
    tokens = token_bytes(tokenizer)
    return [tokens[number] for number in tokenizer(text, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("text", [TEXT, "x", " two blanks", "\x00\x7f\u00ad\u0142", "never seen: ∑ₙ Ж 🧮"])
def test_token_bytes_spell_the_text(tokenizer, text):
    tokens = pieces_of(tokenizer, text)
    spans = byte_spans(tokens, text.encode())
    assert spans[0][0] in (-1, 0) and spans[-1][1] == len(text.encode())
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert b"".join(text.encode()[max(0, start) : end] for start, end in spans) == text.encode()


def test_token_bytes_of_the_real_tokenizer_spell_the_text(tokenizer, request):
    real = request.getfixturevalue("pristine")[1]
    assert byte_spans(pieces_of(real, TEXT), TEXT.encode())[-1][1] == len(TEXT.encode())
    assert token_bytes(real)[real.eos_token_id] is None


def test_special_tokens_have_no_bytes(tokenizer):
    tokens = token_bytes(tokenizer)
    assert tokens[tokenizer.convert_tokens_to_ids(END)] is None
    with pytest.raises(ValueError, match="special or unknown"):
        byte_spans([b"a", None], b"a")
    with pytest.raises(ValueError, match="the tokens spell b'b', the text is b'c'"):
        byte_spans([b"a", b"b"], b"ac")


def test_rows_align_where_both_tokens_have_the_same_bytes():
    ids = {b"ab": 0, b"c": 1, b"cd": 2, b"x": 3}
    student = byte_spans([b"ab", b"c", b"d", b"x"], b"abcdx")
    pieces = [Piece(b"ab", [(b"ab", -0.1), (b"abc", -3.0)]), Piece(b"cd", [(b"cd", -0.1)]), Piece(b"x", [(b"y", -0.1)])]
    rows = align(student, byte_spans([p.written for p in pieces], b"abcdx"), pieces, ids)
    assert rows == [(0, [0], [-0.1])]  # "cd" is split differently, and "x" shares no candidate


def test_ids_map_by_bytes_between_tokenizer_kinds():
    teacher, student = (token_bytes(TOKENIZERS[kind]) for kind in ("byte fallback", "byte level"))
    mapped = student_ids(teacher, student, len(teacher) + 3)
    shared = [n for n in range(len(teacher)) if mapped[n] >= 0]
    assert len(shared) >= 256 and all(student[mapped[n]] == teacher[n] for n in shared)
    assert mapped[-3:].tolist() == [-1] * 3
    assert ids_by_bytes(TOKENIZERS["byte level"])[b"\n"] == mapped[teacher.index(b"\n")]


def test_vocabulary_is_indexed_once_for_all_replies():
    tokenizer = byte_level(TEXT)
    ids = ids_by_bytes(tokenizer)
    assert ids_by_bytes(tokenizer) is ids and b"<new>" not in ids
    tokenizer.add_tokens(["<new>"])
    assert ids_by_bytes(tokenizer)[b"<new>"] == len(tokenizer) - 1


def test_character_token_takes_precedence_over_its_byte_token():
    """Text is split into `1`, never `<0x31>`, although the byte tokens come first in such a vocabulary."""
    tokenizer = TOKENIZERS["byte fallback"]
    ids, known = ids_by_bytes(tokenizer), tokenizer.get_vocab()
    for letter in set(TEXT) - set(" \n"):
        assert ids[letter.encode()] == known[letter]
    for byte in (b"~", b"\xff"):
        assert ids[byte] == known[f"<0x{byte[0]:02X}>"]


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        token_bytes(Slow())


def test_probabilities_of_shared_tokens_never_grow():
    """Dropping candidates only moves their mass to the tail."""
    top = [(bytes([65 + i]), math.log(0.1)) for i in range(10)]
    [row] = align([(0, 1)], [(0, 1)], [Piece(b"A", top)], {bytes([65 + i]): i for i in range(0, 10, 2)})
    assert row.ids == [0, 2, 4, 6, 8] and np.exp(row.logprobs).sum() == pytest.approx(0.5)
