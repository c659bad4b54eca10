"""Find the problems of a pool that leak a problem of an evaluation set.

    evaluations = read_evaluations(["math500.jsonl", "aime25.jsonl"])
    found = contaminated(["Find the number of integer values of $k$ ...", ...], evaluations)
    found[0]            # None, or Match(item=80, tier="text", share=1.0)

A problem is judged by the share of an evaluation problem that it contains, in 5-shingles of LaTeX-aware tokens weighted
by rarity (idf): "find the number of integer values" weighs little, the equation much. Sentences about the form of the
answer ("Express your answer as a common fraction.") are ignored. Five tiers:

- text: at least half of an evaluation problem is contained. An evaluation problem of fewer than five tokens is a single
  shingle; it also counts if a sentence or line ends with it, and it has `_LEAST_RUN` tokens or more, one a numeral;
- template: with all numbers masked, at least four fifths is contained: the same problem with other numbers;
- variant: with all numbers masked, 55% of both problems is shared, in 3-shingles, and with the numbers a tenth is
  contained: the same problem with other numbers, other names or one more clause;
- renamed: with all numbers and variables masked, 65% of both problems is shared, in 3-shingles;
- paraphrase: the two embeddings are close (only if an embedding function is given).

The earlier turns and the system prompt of a trace are judged too (`strongest_matches`).

The rarity of a shingle is known only once the whole pool is read. So `Decontaminator.find` runs on each part of a pool,
and `Decontaminator.judge` runs once, on everything found.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rbfast.curation import text
from rbfast.curation.instructions import may_contain_instruction, without_instructions
from rbfast.curation.text import Ragged, Texts, fold
from rbfast.curation.text_reference import tokens
from rbfast.data import hub
from rbfast.data.formats import question_of
from rbfast.data.readers import read_rows
from rbfast.data.trace import TraceError
from rbfast.utils.records import check_numbers

SHINGLE = 5
_SHORT_SHINGLE = 3  # for variants: a changed name or number breaks fewer short shingles
_LEAST_RUN = 3  # tokens; "Find $x$." ends many problems
# The share of an evaluation problem that a variant must contain with its numbers, beyond common formulas.
_LEAST_TEXT_SHARE = 0.1
_BYTES_PER_HIT = 40  # a variant must share one template shingle per 40 bytes of its text, at most 10
_QUESTION_FIELDS = ("problem", "question", "prompt")
_VARIABLE = re.compile(r"(?<![^\W\d_]|\\)(?!a\s)[A-Za-z](?![^\W\d_])")
_POINTS = re.compile(r"(?<![\w\\])[A-Z]{2,3}(?!\w)")  # geometric figures named by their points: ABC
_BREAK = re.compile(r"[.?](?=[\s$\\)\]*\"']|\Z)|\n|\s\(?A[).]\s|\Z")  # the end of a sentence or line, or answer options
_BEFORE_BREAK = 300  # characters that hold the tokens of a short problem
_ESCAPED = re.compile(r"\\\\[a-zA-Z]")
_SINGLE = re.compile(r"(?<!\\)\\(?:\\\\)*(?!\\)")
_TIERS = ("text", "variant", "renamed", "paraphrase", "template")  # the surest first; template, which may be kept, last
_SHARE_OF_BOTH = ("variant", "renamed")  # tiers whose share is of both problems
_WEIGHT_UNIT = 2**20  # weights are integers in units of 2^-20 nats

Embed = Callable[[Sequence[str]], np.ndarray]
"""Maps texts to vectors, float [n, d], of any norm but zero."""


class Evaluation(NamedTuple):
    """A problem that must not be trained on; `where` is its file and line."""

    where: str
    problem: str


class Match(NamedTuple):
    """The evaluation problem that a problem leaks (its index in the list), the tier, and the share."""

    item: int
    tier: str  # "text", "template", "variant", "renamed" or "paraphrase"
    share: float  # of the evaluation problem's weight (variant, renamed: of both problems'); paraphrase: cosine


class SharedShingles(NamedTuple):
    """The shingles that a part of the pool shares with the evaluation sets, not yet weighted."""

    text: Ragged
    template: Ragged
    variant: Ragged
    renamed: Ragged
    sizes: np.ndarray  # int64 [n, 2], a problem's number of variant and renamed shingles; 0 if it can be neither
    nearest: np.ndarray  # int32 [n], the nearest evaluation problem by embedding; -1 if there is none
    cosine: np.ndarray  # float32 [n]


@dataclass(frozen=True)
class Thresholds:
    """The least share (for paraphrases: cosine) that counts as contamination, by tier."""

    text: float = 0.5
    template: float = 0.8
    variant: float = 0.55
    renamed: float = 0.65
    paraphrase: float = 0.9

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("text", "template", "variant", "renamed", "paraphrase"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")


def read_evaluations(sources: Iterable[str | Path]) -> list[Evaluation]:
    """The problems of evaluation sets: files or folders in any format of traces, benchmarks by name
    (`hub.BENCHMARKS`), or hub ids (their split `test` by default).

    Raises:
        TraceError: a row without a problem, or a source without rows.
    """
    evaluations: list[Evaluation] = []
    for source in sources:
        if "/" not in str(source) and str(source) not in hub.BENCHMARKS and not Path(source).exists():
            raise TraceError(
                f"{source}: expected a file of problems, a dataset on the hub ({hub.FORMS}) or one of "
                f"{', '.join(hub.BENCHMARKS)}; there is no such file"
            )
        before = len(evaluations)
        for where, row in read_rows(hub.BENCHMARKS.get(str(source), source), split="test"):
            named = [row[field] for field in _QUESTION_FIELDS if field in row] if isinstance(row, dict) else []
            problem = named[0] if named and isinstance(named[0], str) else _problem_of(row, where)
            if not problem.strip():
                raise TraceError(f"{where}: expected a text under {', '.join(_QUESTION_FIELDS)}, got an empty one")
            evaluations.append(Evaluation(where, problem))
        if len(evaluations) == before:  # decontamination would do nothing
            raise TraceError(f"{source}: expected at least one problem, got none")
    return evaluations


def _problem_of(row: Any, where: str) -> str:
    """The problem of a row that has it under another field name or in a conversation."""
    try:
        return str(question_of(row)["problem"])
    except TraceError as error:
        raise TraceError(f"{where}: expected a text under {', '.join(_QUESTION_FIELDS)}: {error}") from None


def contaminated(
    problems: Sequence[str],
    evaluations: Sequence[Evaluation],
    *,
    thresholds: Thresholds | None = None,
    embed: Embed | None = None,
    threads: int | None = None,
) -> list[Match | None]:
    """For each problem, the evaluation problem that it leaks, or None."""
    decontaminator = Decontaminator(evaluations, thresholds or Thresholds(), embed)
    texts, threads = text.pack(problems), threads or text.cores()
    shared = decontaminator.find(texts, problems, threads=threads)
    return decontaminator.judge(shared, text.fingerprints(texts), threads=threads)


class _BestMatches(NamedTuple):
    """For each problem of the pool, the evaluation problem it shares most with (-1: none), and the share."""

    items: np.ndarray
    shares: np.ndarray


class _ShingleIndex(NamedTuple):
    """An index of the evaluation problems' shingles: sorted hashes, and for each hash the problems that have it."""

    hashes: np.ndarray
    items: Ragged

    @classmethod
    def of(cls, texts: Texts, k: int, mask_digits: bool) -> "_ShingleIndex":
        rows, _ = text.shingles(texts, k, mask_digits=mask_digits)
        item = np.repeat(np.arange(len(texts.starts) - 1, dtype=np.int32), rows.lengths)
        order = np.argsort(rows.values, kind="stable")
        hashes, counts = np.unique(rows.values, return_counts=True)
        return cls(hashes, Ragged(item[order], np.append(0, np.cumsum(counts))))


def _mask_names(problem: str) -> str:
    """`problem` with every variable, point, side and triangle named x."""
    return _VARIABLE.sub("x", _POINTS.sub(lambda match: " x" * len(match[0]), problem))


def _unescape(problem: str) -> str:
    r"""`problem` with `\frac` for `\\frac`, if every backslash in it was doubled."""
    if not _ESCAPED.search(problem) or _SINGLE.search(problem):
        return problem
    return problem.replace("\\\\", "\\")


def _ending_tokens(problem: str) -> set[tuple[str, ...]]:
    """The last `_LEAST_RUN` to `SHINGLE - 1` tokens before each end of a sentence or line in `problem`."""
    ends = [match.start() for match in _BREAK.finditer(problem)]
    before_ends = [tokens(fold(problem[max(0, end - _BEFORE_BREAK) : end])) for end in ends]
    return {tuple(row[-length:]) for row in before_ends for length in range(_LEAST_RUN, SHINGLE)}


class _ShortProblems:
    """Finds evaluation problems of fewer tokens than a shingle, only at the end of a sentence or line.

    Found anywhere, "What is 50%?" would match "What is 50% of 80?".
    """

    def __init__(self, evaluations: Sequence[str], tier: _ShingleIndex) -> None:
        rows = [tuple(tokens(fold(problem))) for problem in evaluations]
        items = [
            item
            for item, row in enumerate(rows)
            if _LEAST_RUN <= len(row) < SHINGLE and any(token[0] in "0123456789" for token in row)
        ]
        packed = text.pack(evaluations[item] for item in items)
        whole, _ = text.shingles(packed, SHINGLE)  # one for each problem
        self._places = dict(
            zip((rows[item] for item in items), np.searchsorted(tier.hashes, whole.values).tolist(), strict=True)
        )
        self._width = len(tier.hashes)
        self._hints = np.unique(text.shingles(packed, _LEAST_RUN)[0].values)

    def add_shared(self, shared: Ragged, texts: Texts, problems: Sequence[str], threads: int) -> Ragged:
        """Add the short evaluation problems found in `problems` to `shared`, the shingles shared with the text tier.
        `texts` is `pack(problems)`."""
        if not self._places:
            return shared
        hinted = np.flatnonzero(text.find(texts, _LEAST_RUN, self._hints, threads=threads).lengths)
        matches = [
            (row, self._places[run])
            for row in hinted.tolist()
            for run in _ending_tokens(problems[row]) & self._places.keys()
        ]
        if not matches:
            return shared
        rows, places = np.array(matches, dtype=np.int64).T
        n, width = len(shared.lengths), self._width
        pairs = np.union1d(np.repeat(np.arange(n), shared.lengths) * width + shared.values, rows * width + places)
        return Ragged((pairs % width).astype(np.int32), np.searchsorted(pairs // width, np.arange(n + 1)))


def _find_short_shingles(
    texts: Sequence[str], tier: _ShingleIndex, places: np.ndarray, n: int, threads: int
) -> tuple[Ragged, np.ndarray]:
    """The short shingles that texts share with a tier, and how many each text has, int64 [n].

    The texts stand at `places` among n; the others count as empty.
    """
    packed = text.pack(texts)
    rows, _ = text.shingles(packed, _SHORT_SHINGLE, mask_digits=True, threads=threads)
    found = text.find(packed, _SHORT_SHINGLE, tier.hashes, mask_digits=True, threads=threads)
    sizes, shared = np.zeros((2, n), dtype=np.int64)
    sizes[places], shared[places] = rows.lengths, found.lengths
    return Ragged(found.values, np.append(0, np.cumsum(shared))), sizes


class Decontaminator:
    """An index of the evaluation problems. It is picklable."""

    def __init__(
        self, evaluations: Sequence[Evaluation], thresholds: Thresholds | None = None, embed: Embed | None = None
    ) -> None:
        self.evaluations = tuple(evaluations)
        self.thresholds = thresholds or Thresholds()
        self._embed = embed
        cleaned = [without_instructions(_unescape(item.problem)) for item in evaluations]
        texts = text.pack(cleaned)
        self._text, self._template = _ShingleIndex.of(texts, SHINGLE, False), _ShingleIndex.of(texts, SHINGLE, True)
        self._short_problems = _ShortProblems(cleaned, self._text)
        self._variant = _ShingleIndex.of(texts, _SHORT_SHINGLE, True)
        self._renamed = _ShingleIndex.of(text.pack(map(_mask_names, cleaned)), _SHORT_SHINGLE, True)
        self._vectors = self._embed_unit([item.problem for item in evaluations]) if embed and evaluations else None

    def find(self, texts: Texts, problems: Sequence[str], *, threads: int = 1) -> SharedShingles:
        """Find what each problem shares with the evaluation sets. `texts` is `pack(problems)`."""
        cleaned = list(problems)
        for place in may_contain_instruction(texts).tolist():
            cleaned[place] = without_instructions(cleaned[place])
        cleaned = list(map(_unescape, cleaned))
        texts = texts if cleaned == list(problems) else text.pack(cleaned)
        verbatim = text.find(texts, SHINGLE, self._text.hashes, threads=threads)
        verbatim = self._short_problems.add_shared(verbatim, texts, cleaned, threads)
        template = text.find(texts, SHINGLE, self._template.hashes, mask_digits=True, threads=threads)
        needed = np.maximum(1, np.minimum(np.diff(texts.starts), 400) // _BYTES_PER_HIT)
        places = np.flatnonzero(template.lengths >= needed)
        near, n = [cleaned[place] for place in places.tolist()], len(cleaned)
        variant, variant_sizes = _find_short_shingles(near, self._variant, places, n, threads)
        renamed, renamed_sizes = _find_short_shingles(list(map(_mask_names, near)), self._renamed, places, n, threads)
        sizes = np.stack([variant_sizes, renamed_sizes], axis=1)
        return SharedShingles(verbatim, template, variant, renamed, sizes, *self._nearest(problems))

    def judge(self, found: SharedShingles, fingerprints: np.ndarray, *, threads: int = 1) -> list[Match | None]:
        """The match of every problem in the pool, or None, from what `find` returned for the whole pool.

        Args:
            fingerprints: of the problems, uint64 [n]; problems with equal ones count once when rarity is measured.
        """
        first = np.zeros(len(fingerprints), dtype=bool)
        first[np.unique(fingerprints, return_index=True)[1]] = True
        matches: list[Match | None] = [None] * len(fingerprints)
        verbatim = self._best_matches("text", found, first, min(_LEAST_TEXT_SHARE, self.thresholds.text), threads)
        variant = self._best_matches("variant", found, first, self.thresholds.variant, threads)
        variant.items[variant.items != verbatim.items] = -1
        renamed = self._best_matches("renamed", found, first, self.thresholds.renamed, threads)
        verbatim.items[verbatim.shares < self.thresholds.text] = -1
        template = self._best_matches("template", found, first, self.thresholds.template, threads)
        for name, best in (("renamed", renamed), ("variant", variant), ("template", template), ("text", verbatim)):
            for at in np.flatnonzero(best.items >= 0).tolist():
                matches[at] = Match(int(best.items[at]), name, float(best.shares[at]))
        for at in np.flatnonzero(found.cosine >= self.thresholds.paraphrase).tolist():
            matches[at] = matches[at] or Match(int(found.nearest[at]), "paraphrase", float(found.cosine[at]))
        return matches

    def _best_matches(
        self, name: str, found: SharedShingles, first: np.ndarray, least: float, threads: int
    ) -> _BestMatches:
        shared, tier = getattr(found, name), getattr(self, f"_{name}")
        weights, totals = self._weigh(tier, shared, first)
        own = None
        if name in _SHARE_OF_BOTH:
            own = self._own_weights(shared, found.sizes[:, _SHARE_OF_BOTH.index(name)], weights, int(first.sum()))
        return _BestMatches(
            *text.containment(shared, tier.items, weights, totals, own=own, least=least, threads=threads)
        )

    def _weigh(self, tier: _ShingleIndex, shared: Ragged, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The weights of the shingles, int64, and their sum for each evaluation problem, int64.

        A weight is -log of the share of other problems that have the shingle, in the pool or in the evaluation sets,
        whichever is larger. So boilerplate of either weighs little.
        """
        counted = np.repeat(first, shared.lengths)
        in_pool = np.bincount(shared.values[counted], minlength=len(tier.hashes))
        pool, items = int(first.sum()), len(self.evaluations)
        common = np.maximum((in_pool - 1) / max(pool, 1), (tier.items.lengths - 1) / max(items, 1))
        weights = np.rint(-_WEIGHT_UNIT * np.log(np.maximum(common, 1 / (pool + items + 1)))).astype(np.int64)
        totals = np.zeros(items, dtype=np.int64)
        np.add.at(totals, tier.items.values, np.repeat(weights, tier.items.lengths))
        return weights, np.maximum(totals, 1)

    def _own_weights(self, shared: Ragged, sizes: np.ndarray, weights: np.ndarray, pool: int) -> np.ndarray:
        """For each problem of the pool, the sum of its short shingles' weights, int64. A shingle that no evaluation
        problem has gets the largest weight."""
        before = np.append(0, np.cumsum(weights[shared.values]))[shared.starts]
        rarest = round(_WEIGHT_UNIT * np.log(pool + len(self.evaluations) + 1))
        return np.maximum(1, np.diff(before) + rarest * (sizes - shared.lengths))

    def _nearest(self, problems: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._vectors is None or not problems:
            return np.full(len(problems), -1, dtype=np.int32), np.zeros(len(problems), dtype=np.float32)
        cosines = self._embed_unit(problems) @ self._vectors.T
        nearest = cosines.argmax(1)
        return nearest.astype(np.int32), cosines[np.arange(len(problems)), nearest]

    def _embed_unit(self, problems: Sequence[str]) -> np.ndarray:
        """Embeddings as unit vectors, float32 [n, d]."""
        assert self._embed is not None
        vectors = np.asarray(self._embed(problems), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(problems) or not np.isfinite(vectors).all():
            raise ValueError(
                f"embed must return finite numbers [{len(problems)}, d], one row per text, got {list(vectors.shape)}"
            )
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def strongest_matches(matches: Sequence[Match | None], lengths: np.ndarray) -> list[Match | None]:
    """The strongest match among the texts of each item; `lengths` has the number of texts of each item.

    The surest tier wins, then the largest share, then the first text. Templates come last: they may be kept, and must
    not hide a match that is dropped.
    """
    ends = np.cumsum(lengths).tolist()
    groups = (matches[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True))
    return [min(filter(None, group), key=_by_strength, default=None) for group in groups]


def _by_strength(match: Match) -> tuple[int, float]:
    return _TIERS.index(match.tier), -match.share


def join_shared(parts: Sequence[SharedShingles]) -> SharedShingles:
    """Concatenate the shingles found in the parts of a pool."""
    *shingles, sizes, nearest, cosine = zip(*parts, strict=True)
    return SharedShingles._make([*map(text.join_ragged, shingles), *map(np.concatenate, (sizes, nearest, cosine))])
