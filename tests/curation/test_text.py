"""The text loops: the native code against the Python reference, and the reference against its specification."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_inputs import data_path

from rbfast.curation import text, text_reference
from rbfast.curation.text import Ragged, fold, pack
from rbfast.curation.text_reference import tokens

MARKS = ["\\frac", "\\", "12", "[asy]", "[/asy]", "x", "\\left", "\\text1", "\\begin{a*}", "\\end{b", "c}", "{", "}"]
MARKS += ["½", "π", "ßé", "≤", "中文", "-", "<", "=", "\u200b", "\ud800", "İ", "١٢"]
MARKS += ["(", ")", "[", "]", "|", "!", "'", "%", "^", "+", "*", "/", ",", "&", ".", "000", "\\frac1", "0/", "f'", "x²"]
MARKS += ["~", "~p", "{1", ",2}", " {", "\\in", "\\t ", "_"]
MARKS += ["{,}", ",\\!", "\\{", "\\}", "\\%", "\\|", "\\\\", "^\\circ", "^{\\prime", "\\lvert", "!=", "’", "("]
TEXTS = st.lists(st.lists(st.sampled_from([*MARKS, " "]) | st.text(max_size=6), max_size=12).map("".join), max_size=8)


def tokens_of(problem: str) -> list[str]:
    return tokens(fold(problem))


def same(ours: object, theirs: object) -> bool:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    return all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in pairs)


@pytest.fixture(scope="module")
def native():
    if text._NATIVE is None:
        pytest.skip("rbfast._text is not built")
    return text._NATIVE


@pytest.fixture(scope="module")
def problems() -> list[str]:
    with data_path("s1k_questions/s1k_questions.json").open(encoding="utf-8") as file:
        return [row["problem"] for row in json.load(file)]


@pytest.mark.parametrize(
    "notations",
    [
        ["$\\frac12+1$", "\\(\\dfrac{1}{2} + 1\\)", "\\[\\tfrac {1}{2}+1.\\]"],
        ["Is $a\\leq b$?", "Is a ≤ b?", "is \\(a \\le b\\)"],
        ["$2\\pi r\\times 3$", "2πr·3", "$2\\pi\\,r \\cdot 3$"],
        ["$\\left( x^{2} \\right)$", "$(x^2)$", "(x²)"],
        ["$f'(x)$", "f′(x)", "f’(x)", "$f^{\\prime}(x)$"],
        ["$\\left| x \\right|$", "|x|", "$\\lvert x\\rvert$"],
        ["\\begin{align*}x=1\\end{align*}", "$$x=1$$"],
        ["A hexagon [asy]draw((0,0)--(1,1));[/asy] is", "A hexagon is"],
        ["Straße", "STRASSE", "straße"],
        ["$2^{n+1}$", "2^(n+1)", "$2^{\\left(n+1\\right)}$"],
        ["$x^{n}$", "$x^n$", "$x^{{n}}$"],
        ["naïve", "nai\u0308ve", "na\u00adïve"],
        ["３ ٤", "3 4"],
        ["求解x", "求 解 x"],
        ["the set {1, 2}", "the set $\\{1, 2\\}$", "the set $\\left\\lbrace 1,2 \\right\\rbrace$"],
        ["$A={1,2}$", "$A = \\{ 1, 2 \\}$"],
        ["$x\\in{a,b}$", "$x \\in {a, b}$", "x ∈ {a, b}"],
        ["$f({1,2})$", "$f(\\{1,2\\})$"],
        ["$(x+{1,2})^2$", "$(x+\\{1,2\\})^2$"],
        ["~p | (~q & ~(r))", "¬p | (¬q & ¬(r))", "$\\neg p | (\\lnot q & \\neg(r))$"],
        ["p -> ~~q", "$p -> \\neg\\neg q$"],
        # Marks that only set type, or may do no more: usually the same text is meant.
        ["It costs $5 now", "It costs \\$5 now", "It costs $5$ now", "It costs 5 now"],
        ["$x_1$", "$x_{1}$", "x1"],
        ["5~cm", "5 cm", "$5\\mathrm{~cm}$"],
        ["the point (1, 2)", "the point 1, 2"],
        ["$10{,}000$", "10,000"],
        ["$x_{1,2}$", "$x_ {1,2}$", "$x_(1,2)$"],
        ["$\\gcd {a,b}$", "$\\gcd(a,b)$"],
        ["{\\bf see a, b}", "(\\bf see a, b)"],
        ["\\text{if a, b}", "if a, b"],
    ],
)
def test_notations_of_one_text_have_the_same_tokens(notations: list[str]) -> None:
    assert len({tuple(tokens_of(notation)) for notation in notations}) == 1
    assert len(np.unique(text.fingerprints(pack(notations)))) == 1


def test_tokens() -> None:
    assert tokens_of("Let $f(x)=\\sqrt23-1$") == ["let", "f", "x", "=", "sqrt", "2", "3", "-", "1"]
    assert tokens("x12 \\sqrt23", mask_digits=True) == ["x", "0", "sqrt", "0", "0"]
    assert tokens_of("και λ") == ["και", "lambda"]
    assert tokens_of("[asy] open") == ["[", "asy", "]", "open"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Calculate (8 - 3) * 2", "Calculate 8 - 3 * 2"),
        ("$|x-3|=5$", "$x-3=5$"),
        ("$f'(2)$", "$f(2)$"),
        ("$5!$", "$5$"),
        ("5% of 20", "5 of 20"),
        ("$x^2$", "$x_2$"),
        ("$[0, 1)$", "$(0, 1]$"),
        ("$\\{x\\}$", "$x$"),
        ("x != 3", "x = 3"),
        ("$2^{n+1}$", "$2^n+1$"),
        ("$\\frac{a}{b+c}$", "$\\frac{a}{b}+c$"),
        ("$\\frac{1}{2x}$", "$\\frac{1}{2}x$"),
        ("$\\sqrt{2x}$", "$\\sqrt{2}x$"),
        ("$(2x)^2$", "$2x^2$"),
        ("$1/(2x)$", "$1/2x$"),
        ("(1.5, 2)", "(1, 5, 2)"),
        ("the set {1, 2}", "the point (1, 2)"),
        ("the set {1, 2}", "1, 2"),
        ("Simplify ~p & q", "Simplify p & ~q"),
        ("(~p)", "(p)"),
    ],
)
def test_different_signs_give_different_tokens(one: str, other: str) -> None:
    assert tokens_of(one) != tokens_of(other)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("Don’t! It's 5.", "don t it s 5"),
        ("A'B'C' is 'x'", "a ' b ' c ' is x"),
        ("(see f(x), below) a)", "see f x below a"),
        ("((a+b)c)", "( ( a + b ) c )"),
        ("3!! f''(x) \\alpha' (n+1)!", "3 ! ! f ' ' x alpha ' ( n + 1 ) !"),
        ("60^\\circ 60^{\\circ} 60° f^\\prime", "60 circ 60 circ 60 circ f '"),
        ("\\lvert x\\rvert 7\\%", "| x | 7 %"),
        ("~p and~q ~5 \\~n {~km} ~", "neg p and q 5 n km"),
        ("{1, {2, 3}} {4} {,} {1,} {1, 2) {3, 4", "{ 1 { 2 3 } } 4 1 1 2 3 4"),
        ("{1, 2}^{n+1}", "{ 1 2 } ^ ( n + 1 )"),
    ],
)
def test_tokens_of_signs(problem: str, expected: str) -> None:
    assert tokens_of(problem) == expected.split()


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("3x - 5 = -44", "0 x + 0 = 0"),
        ("is 1,000,000.5 or $10{,}000$ or 3, 4", "is 0 or 0 or 0 0"),
        ("(3,-4) and (3, 4)", "0 0 and 0 0"),
        ("\\begin{pmatrix} -1 & -2 \\\\ -3 \\end{pmatrix}", "0 0 0"),
        ("x - \\frac{-3}{4} + 2/7", "x + 0 + 0"),
        ("x^{-1} - y", "x ^ 0 - y"),
        ("x = {5}, {-5, 3}", "x = 0 { 0 0 }"),
    ],
)
def test_a_masked_numeral_is_one_token(problem: str, expected: str) -> None:
    assert tokens(fold(problem), mask_digits=True) == expected.split()


@given(TEXTS, st.integers(1, 6), st.booleans(), st.integers(1, 5))
def test_native_shingles_match_the_reference(native, texts: list[str], k: int, masked: bool, threads: int) -> None:
    packed = pack(texts)
    expected = text_reference.shingles(*packed, k, masked, 1)
    assert same(native.shingles(*packed, k, masked, threads), expected)


def test_many_braces_are_read_in_linear_time() -> None:
    start = time.process_time()
    assert len(tokens(r"\frac{1}{2} + " * 20_000)) == 20_000 * 4
    assert time.process_time() - start < 10  # 0.7 s; a minute if every brace copied the text before it


def test_native_shingles_match_the_reference_on_real_problems(native, problems: list[str]) -> None:
    packed = pack(problems)
    for k, masked in ((1, True), (5, False), (2**62, False)):
        expected = text_reference.shingles(*packed, k, masked, 1)
        assert same(native.shingles(*packed, k, masked, 3), expected)


def test_hashes_never_change() -> None:
    """Hashes may be stored: FNV-1a of "a" and the first value of splitmix64 are the published ones."""
    assert text_reference.hash_token("a") == 0xAF63DC4C8601EC8C
    assert int(text_reference.mix(np.zeros(1, dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF  # splitmix64 from 0
    rows, counts = text.shingles(pack(["a b c", ""]), 5)
    assert rows.lengths.tolist() == [1, 0]
    assert counts.tolist() == [3, 0]


rows_of_numbers = st.lists(st.lists(st.integers(0, 30), max_size=8, unique=True).map(sorted), max_size=8)


def as_rows(lists: list[list[int]], dtype: type) -> Ragged:
    values = np.array([value for row in lists for value in row], dtype=dtype)
    return Ragged(values, np.append(0, np.cumsum([len(row) for row in lists], dtype=np.int64)))


@given(TEXTS, TEXTS, st.integers(1, 3), st.booleans(), st.integers(1, 4))
def test_native_find_matches_the_reference(native, texts, others, k: int, masked: bool, threads: int) -> None:
    index = np.unique(text.shingles(pack(others + texts[:1]), k, mask_digits=masked)[0].values)
    expected = text_reference.find(*pack(texts), k, masked, index, 1)
    assert same(native.find(*pack(texts), k, masked, index, threads), expected)


@given(rows_of_numbers, st.randoms(use_true_random=False), st.integers(1, 4))
def test_native_containment_matches_the_reference(native, lists, random, threads: int) -> None:
    terms = [sorted(random.sample(range(5), random.randrange(4))) for _ in range(31)]
    postings, rows = as_rows(terms, np.int32), as_rows(lists, np.int32)
    weights = np.array([random.randrange(4) for _ in range(31)], dtype=np.int64)
    totals = np.array([1 + sum(int(w) for w, t in zip(weights, terms, strict=True) if e in t) for e in range(5)])
    held = [sum(int(weights[term]) for term in row) + random.randrange(3) for row in lists]
    own = np.array(held if random.choice([False, True]) else [], dtype=np.int64)
    arguments = (*rows, *postings, weights, totals, own, random.choice([0.0, 0.3, 0.5, 1.0]))
    assert same(native.containment(*arguments, threads), text_reference.containment(*arguments, 1))


@given(rows_of_numbers, st.integers(1, 4))
def test_native_minhash_matches_the_reference(native, lists, threads: int) -> None:
    rows = as_rows(lists, np.uint64)
    multipliers = text_reference.mix(np.arange(7, dtype=np.uint64)) | np.uint64(1)
    hashes = text_reference.mix(rows.values)
    expected = text_reference.minhash(hashes, rows.starts, multipliers, 1)
    assert same(native.minhash(hashes, rows.starts, multipliers, threads), expected)


def test_signatures_estimate_the_jaccard_index() -> None:
    shared, mine, theirs = (text_reference.mix(np.arange(i * 1000, i * 1000 + 300, dtype=np.uint64)) for i in range(3))
    rows = as_rows([sorted({*shared, *mine}), sorted({*shared, *theirs})], np.uint64)
    one, other = text.minhash(rows, 1024)
    assert abs(np.mean(one == other) - 1 / 3) < 4 * np.sqrt(1 / 3 * 2 / 3 / 1024)


@given(rows_of_numbers, st.randoms(use_true_random=False), st.integers(1, 4))
def test_native_facility_location_matches_the_reference(native, lists, random, threads: int) -> None:
    rows = as_rows(lists, np.int32)
    values = np.array([random.randrange(4) for _ in rows.values], dtype=np.int32)
    size = random.randrange(len(lists) + 1)
    arguments = (rows.starts, *rows[:1], values, 31, size)
    assert same(native.facility_location(*arguments, threads), text_reference.facility_location(*arguments, 1))


def test_lazy_greedy_matches_plain_greedy(problems: list[str]) -> None:
    """Plain greedy computes every gain at every step, from the whole similarity matrix."""
    vectors, values = text.unit_vectors(pack(problems[:150]))
    dense = np.zeros((150, vectors.values.max() + 1), dtype=np.int64)
    dense[np.repeat(np.arange(150), vectors.lengths), vectors.values] = values
    similarity = dense @ dense.T
    best, expected, gains = np.zeros(150, dtype=np.int64), [], []
    for _ in range(20):
        gain = np.maximum(similarity - best, 0).sum(1)
        gain[expected] = -1
        expected.append(int(gain.argmax()))
        gains.append(int(gain.max()))
        best = np.maximum(best, similarity[expected[-1]])
    chosen, added = text.facility_location(vectors, values, 20, threads=2)
    assert chosen.tolist() == expected
    assert added.tolist() == gains


def test_vectors_have_unit_length_and_omit_words_of_most_texts() -> None:
    vectors, values = text.unit_vectors(pack(["find the cat", "find the dog 1", "find a bird 2", "owl", ""]))
    lengths = np.sqrt(
        np.bincount(np.repeat(np.arange(5), vectors.lengths), weights=values.astype(float) ** 2, minlength=5)
    )
    assert np.allclose(lengths, [2**15] * 4 + [0], rtol=1e-4)
    assert vectors.lengths.tolist() == [2, 3, 3, 1, 0]  # "find" is in three of five texts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, a: m.shingles(a["bytes"], a["bad"], 5, False, 1), "starts must run from 0 to 4"),
        (lambda m, a: m.shingles(a["bytes"], a["starts"], 0, False, 1), "k must be at least 1, got 0"),
        (lambda m, a: m.shingles(a["bytes"], a["starts"], 5, False, 0), "threads must be at least 1, got 0"),
        (lambda m, a: m.find(a["bytes"], a["starts"], 5, False, a["hashes"][::-1].copy(), 1), "index must be sorted"),
        (lambda m, a: m.facility_location(a["starts"], a["ids"], a["ids"], 4, 3, 1), r"size must lie in \[0, 2\]"),
        (lambda m, a: m.facility_location(a["starts"], a["ids"], a["ids"], 2, 1, 1), r"features must lie in \[0, 2\)"),
    ],
)
def test_native_functions_check_their_arguments(native, call, message: str) -> None:
    arrays = {
        "bytes": np.frombuffer(b"a bc", dtype=np.uint8),
        "starts": np.array([0, 1, 4]),
        "bad": np.array([0, 1, 3]),
        "hashes": np.arange(4, dtype=np.uint64),
        "ids": np.arange(4, dtype=np.int32),
    }
    with pytest.raises(ValueError, match=message):
        call(native, arrays)
    with pytest.raises(TypeError):
        native.shingles(arrays["ids"], arrays["starts"], 5, False, 1)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ids", [0, 2], r"ids must lie in \[0, 2\)"),
        ("ids", [-1, 0], r"ids must lie in \[0, 2\)"),
        ("starts", [0, 3, 2], "starts must not decrease, but does at 2"),
        ("starts", [1, 1, 2], "starts must run from 0 to 2"),
        ("postings", [0, 1], r"postings must lie in \[0, 1\)"),
        ("posting_starts", [0, 2], "weights must have one value for each row of postings"),
        ("totals", [0], "totals must be more than 0"),
        ("own", [1], "own must have one value for each row, or none"),
    ],
)
def test_native_containment_checks_its_arguments(native, name: str, values: list[int], message: str) -> None:
    lists = {"ids": [0, 1], "starts": [0, 1, 2], "postings": [0, 0], "posting_starts": [0, 1, 2], "weights": [1, 1]}
    lists |= {"totals": [2], "own": []}

    def call(lists: dict[str, list[int]]) -> object:
        is_short = {"ids", "postings"}
        arrays = [np.array(x, dtype=np.int32 if key in is_short else np.int64) for key, x in lists.items()]
        return native.containment(*arrays, 0.5, 1)

    assert call(lists)[0].tolist() == [0, 0]
    with pytest.raises(ValueError, match=message):
        call(lists | {name: values})


def test_first_item_is_reported_if_shares_are_equal(native) -> None:
    ids, starts = as_rows([[0, 1]], np.int32)
    postings, posting_starts = as_rows([[1], [0]], np.int32)  # the second item comes first in the postings
    ones, twos, none = np.array([1, 1]), np.array([2, 2]), np.array([], dtype=np.int64)
    for module in (native, text_reference):
        best, share = module.containment(ids, starts, postings, posting_starts, ones, twos, none, 0.5, 1)
        assert best.tolist() == [0] and share.tolist() == [0.5]


def test_native_facility_location_needs_a_value_for_each_feature(native) -> None:
    starts, features = np.array([0, 1, 2]), np.array([0, 1], dtype=np.int32)
    with pytest.raises(ValueError, match="values must have one value for each feature"):
        native.facility_location(starts, features, features[:1].copy(), 2, 1, 1)


def test_reference_is_used_if_the_extension_is_not_built() -> None:
    code = (
        "import sys; sys.modules['rbfast._text'] = None\n"
        "from rbfast.curation import text\n"
        "print(text.implementation(), text.shingles(text.pack(['a b']), 1)[1].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["reference", "[2]"], done.stderr


def test_one_thread_is_used_if_no_other_can_start(native) -> None:
    code = (
        "import resource\n"
        "from rbfast.curation import text\n"
        "packed = text.pack(['a b c', 'd e f'])\n"
        "expected = text.shingles(packed, 1)[0].values.tolist()\n"
        "room = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**22\n"
        "resource.setrlimit(resource.RLIMIT_AS, (room, room))\n"  # a thread's stack takes more
        "print(text.shingles(packed, 1, threads=8)[0].values.tolist() == expected)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr
