"""Reason1K: the thousand traces of a pool to train on, and a reason for every trace that is left out.

    result = curate(["pool.jsonl"], "reason1k/", CurateConfig(size=1000, against=["math500.jsonl"], seed=0))
    print(result.stages)                       # clean, decontaminate, dedup, score, select: items in, dropped by reason

Writes `reason1k.jsonl` (in the order of the pool), `dropped.jsonl` (every other item, with its location, stage, reason,
and what it matched or was graded against), `datasheet.json` and `datasheet.html`. The same arguments give the same
bytes, for any number of processes, on one machine or on a Ray cluster.

The pool is read three times, a chunk at a time, and never held in memory: to assess each item, to fetch the shortlisted
problems, and to write. Between the passes an item takes some 400 bytes of hashes and scores.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np

from rbfast.curation import text
from rbfast.curation.assess import (
    RIGHT,
    UNVERIFIED,
    AssessedPart,
    Assessor,
    TraceMeasure,
    Verify,
    join_parts,
    question_text,
)
from rbfast.curation.datasheet import describe, write_datasheet
from rbfast.curation.decontaminate import Decontaminator, Embed, Thresholds, read_evaluations
from rbfast.curation.ledger import Ledger, Stage
from rbfast.curation.pool import CHUNK, Pool, Source, assess_on_ray, assess_pool, pool_rows, recognise_formats
from rbfast.curation.quality import proxy_difficulty
from rbfast.curation.selection import quotas, select_representatives, shortlist
from rbfast.curation.text_reference import mix
from rbfast.data.formats import AUTO, FormatOptions
from rbfast.data.readers import read_rows, record_of
from rbfast.data.trace import Trace
from rbfast.utils.files import atomic_write, check_output
from rbfast.utils.progress import counting
from rbfast.utils.records import check_numbers


@dataclass(frozen=True)
class Weights:
    """The weight of each criterion in an item's score. Each criterion lies in [0, 1]."""

    difficulty: float = 0.5
    quality: float = 0.4
    verified: float = 0.1  # the criterion is 1 if the answer is known to be right, 0.5 if it is unverified

    def __post_init__(self) -> None:
        check_numbers(self)
        if min(asdict(self).values()) < 0 or not 0 < sum(asdict(self).values()) < float("inf"):
            raise ValueError(f"weights must be finite, 0 or more and not all 0, got {self}")


@dataclass
class Curation:
    """The result of a curation."""

    out: Path
    selected: int
    stages: list[Stage]
    datasheet: dict[str, Any] = field(repr=False)
    formats: dict[Source, list[str]] = field(default_factory=dict, repr=False)  # the format of each source


@dataclass(frozen=True)
class CurateConfig:
    """How to curate a pool.

    Args:
        size: the number of traces to select.
        against: evaluation sets whose problems must not be trained on: benchmarks by name ("math-500"), files, folders
            or hub ids (their split `test` by default).
        pass_rates: for each problem text, the share of a student's tries that solve it; see `read_pass_rates`.
        quality, difficulty, verify, embed: functions that replace the built-in ones; picklable if `processes` > 1.
            See docs/curation.md.
        weights: of difficulty, quality and correctness in an item's score.
        thresholds: the least similarity that counts as contamination, by tier.
        keep_templates: keep problems that differ from an evaluation problem only in their numbers.
        processes: the number of processes that assess the pool.
        ray: assess on this Ray cluster instead, an address for `ray.init`: "auto", "local" or host:port. An open Ray
            session is reused.
        formats: how to read the pool's rows if their field names are not enough.

    Raises:
        ValueError: a number out of its range, or both `processes` and `ray`.
        TypeError: something other than a number.
    """

    size: int = 1000
    against: Sequence[Source] = ()
    seed: int = 0
    pass_rates: Mapping[str, float] = field(default_factory=dict)
    quality: TraceMeasure | None = None
    difficulty: TraceMeasure = proxy_difficulty
    verify: Verify | None = None
    embed: Embed | None = None
    weights: Weights = field(default_factory=Weights)
    thresholds: Thresholds = field(default_factory=Thresholds)
    keep_templates: bool = False
    processes: int = 1
    ray: str | None = None
    formats: FormatOptions = AUTO

    def __post_init__(self) -> None:
        if isinstance(self.against, str | Path):
            object.__setattr__(self, "against", (self.against,))
        check_numbers(self)
        if self.size < 1 or self.processes < 1:
            raise ValueError(f"size and processes must be at least 1, got {self.size} and {self.processes}")
        if self.ray is not None and self.processes > 1:
            raise ValueError(
                f"set processes or ray, not both, got {self.processes} and {self.ray!r}: Ray starts its own workers"
            )

    def settings(self, pool: Pool) -> dict[str, Any]:
        """The settings of a curation, for its datasheet."""
        return {
            "seed": self.seed,
            "size": self.size,
            "pool": list(map(str, pool.sources)),
            "against": list(map(str, self.against)),
            "weights": asdict(self.weights),
            "thresholds": asdict(self.thresholds),
            "keep_templates": self.keep_templates,
        }


def curate(
    pool: Sequence[Source], out: Source, config: CurateConfig = CurateConfig(), *, quiet: bool = False
) -> Curation:
    """Clean, decontaminate, deduplicate, score and select; the module docstring lists the files written to `out`.

    Args:
        pool: files or folders (JSONL, JSON, Parquet, Arrow, CSV) or hub ids of traces, in any format of
            docs/formats.md. Besides a trace's fields a row's `reference` (the right answer), `finish_reason` and
            `truncated` are read.

    Raises:
        TraceError: a file cannot be read, or none of a source's first 100 rows is a trace. Any other row that is not a
            trace is dropped with its reason.
        ValueError: the pool is empty, `out` overlaps the pool, a pass rate is outside [0, 1], or none belongs to a
            trace that can be selected.
        ImportError: `ray` is set, and Ray Data is not installed.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    check_output(out, folder=True)  # fail before the slow reading of the pool
    sources = (pool,) if isinstance(pool, str | Path) else tuple(pool)
    read = Pool(sources, config.formats, keep_fields=config.verify is not None)
    _check_out_of_pool(read, out)
    formats = recognise_formats(read)
    decontaminator = Decontaminator(read_evaluations(config.against), config.thresholds, config.embed)
    ledger = Ledger(_join_with_progress(_assess(read, decontaminator, config), read, quiet))
    ledger.decontaminate(decontaminator, config.keep_templates)
    ledger.dedup()
    ledger.drop_wrong()
    rates = _known_rates(ledger.part, config.pass_rates)
    known = _count_known(rates, config.pass_rates, ledger.alive)
    difficulty = _difficulties(ledger.part, rates, ledger.alive)
    merits = _merits(ledger.part, difficulty, config.weights, ledger.alive)
    chosen, wheres = _select(ledger, merits, read, config, quiet)
    _write(out, read, ledger, difficulty, chosen, wheres, quiet)
    sheet = describe(config.settings(read), ledger, difficulty, chosen, pass_rates=known)
    write_datasheet(out, sheet)
    return Curation(out, len(chosen), ledger.stages, sheet, formats)


def read_pass_rates(path: Source) -> dict[str, float]:
    """The share of correct tries of each problem, from the records that `rbfast eval -o` writes.

    Raises:
        ValueError: a row is not such a record, or there are no rows.
    """
    tries: dict[str, list[bool]] = {}
    for where, row in read_rows(path):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("problem"), str)
            or not isinstance(row.get("correct"), bool)
        ):
            raise ValueError(
                f"{where}: expected a record of `rbfast eval -o` (problem: text, correct: bool), got another row"
            )
        tries.setdefault(row["problem"], []).append(row["correct"])
    if not tries:
        raise ValueError(f"{path}: expected records of `rbfast eval -o`, got none")
    return {problem: sum(correct) / len(correct) for problem, correct in tries.items()}


# -------------------------------------------------------------------------------------------------------- reading


def _check_out_of_pool(pool: Pool, out: Path) -> None:
    """Raise ValueError if the output would be read as part of the pool, or overwrite it."""
    written = {(out / name).resolve() for name in ("", "reason1k.jsonl", "dropped.jsonl", "datasheet.json")}
    for source in pool.sources:
        if Path(source).resolve() in written:
            raise ValueError(f"{out}: the output would overlap the pool ({source}): choose another folder")


def _assess(pool: Pool, decontaminator: Decontaminator, config: CurateConfig) -> Iterator[AssessedPart]:
    """Assess the pool, in this process and its workers or on a Ray cluster."""
    assessor = Assessor(decontaminator, config.quality, config.difficulty, config.verify)
    if config.ray is not None:
        return assess_on_ray(pool, assessor, config.ray)
    return assess_pool(pool, assessor, config.processes)


def _join_with_progress(parts: Iterator[AssessedPart], pool: Pool, quiet: bool) -> AssessedPart:
    """Concatenate the parts of the pool, with a progress line."""
    assessed: list[AssessedPart] = []
    done = 0
    with counting("assessing", quiet) as progress:
        for part in parts:
            assessed.append(part)
            done += len(part.flaws)
            progress(done, None)
        progress(done, done)
    if not assessed:
        raise ValueError(f"expected at least one trace in {', '.join(map(str, pool.sources)) or 'the pool'}, got none")
    return join_parts(assessed)


# --------------------------------------------------------------------------------------------------------- merits


def ranks(values: np.ndarray) -> np.ndarray:
    """The share of values below each value, equal values counting half: float64 in (0, 1)."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    below = np.append(0, np.cumsum(counts)[:-1])
    return ((below + counts / 2) / max(len(values), 1))[group]


def _known_rates(part: AssessedPart, pass_rates: Mapping[str, float]) -> np.ndarray:
    """The student's pass rate on each item, float64 [n]; NaN where it is not known."""
    rates = np.full(len(part.fingerprints), np.nan)
    if pass_rates:
        known = text.fingerprints(text.pack(pass_rates))
        given = np.array(list(pass_rates.values()), dtype=np.float64)
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"pass rates must lie in [0, 1], got {given.min()} to {given.max()}")
        order = np.argsort(known, kind="stable")
        at = np.minimum(np.searchsorted(known[order], part.fingerprints), len(known) - 1)
        tried = known[order][at] == part.fingerprints
        rates[tried] = given[order][at[tried]]
    return rates


def _count_known(rates: np.ndarray, pass_rates: Mapping[str, float], alive: np.ndarray) -> dict[str, int] | None:
    """How many of the items that can be selected have a known pass rate; None if no rates were given."""
    if not pass_rates:
        return None
    known = {"known": int((alive & ~np.isnan(rates)).sum()), "of": int(alive.sum())}
    if known["of"] and not known["known"]:
        raise ValueError(
            f"none of the {known['of']} traces to choose from has one of the {len(pass_rates)} pass rates given: "
            "measure this pool with `rbfast eval --task POOL`"
        )
    return known


def _difficulties(part: AssessedPart, rates: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The difficulty of each item, float64 [n] in [0, 1]: 1 - the student's pass rate; else the rank of the row's own
    difficulty among the rows that have one; else the rank of the proxy among all."""
    difficulties = np.full(len(alive), np.nan)
    difficulties[alive] = ranks(part.proxy[alive])
    given = alive & ~np.isnan(part.given)
    difficulties[given] = ranks(part.given[given])
    tried = alive & ~np.isnan(rates)
    difficulties[tried] = 1 - rates[tried]
    return difficulties


def _merits(part: AssessedPart, difficulty: np.ndarray, weights: Weights, alive: np.ndarray) -> np.ndarray:
    """The score that selection uses, float64 [n]; -inf for dropped items."""
    merits = np.full(len(alive), -np.inf)
    verified = np.where(part.verified == UNVERIFIED, 0.5, part.verified == RIGHT)
    marks = weights.difficulty * difficulty[alive] + weights.quality * ranks(part.quality[alive])
    merits[alive] = marks + weights.verified * verified[alive]
    return merits


# ------------------------------------------------------------------------------------------------------ selection


def _select(
    ledger: Ledger, merits: np.ndarray, pool: Pool, config: CurateConfig, quiet: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """The chosen items, sorted, and the locations of the rows that were kept in place of duplicates."""
    names, domains = np.unique(np.array(ledger.part.domains, dtype=object), return_inverse=True)
    domains = np.where(ledger.alive, domains, -1)
    share = quotas(np.bincount(domains[ledger.alive], minlength=len(names)).tolist(), config.size)
    ties = mix(ledger.part.fingerprints ^ mix(np.array([config.seed % 2**64], dtype=np.uint64)))
    short = shortlist(merits, ties, domains, share)
    shortlisted = np.concatenate([*short, []]).astype(np.int64)
    problems, wheres = _fetch(pool, ledger.rows[shortlisted], ledger.kept_duplicates(), quiet)
    chosen = [
        items[
            select_representatives(
                text.pack(problems[row] for row in ledger.rows[items].tolist()), wanted, threads=text.cores()
            )
        ]
        for items, wanted in zip(short, share, strict=True)
        if wanted
    ]
    selected = np.sort(np.concatenate([*chosen, np.empty(0, dtype=np.int64)]))
    reasons = dict.fromkeys(np.flatnonzero(ledger.alive).tolist(), "others of its domain score higher")
    reasons |= dict.fromkeys(shortlisted.tolist(), "others of its domain stand for it")
    for item in selected.tolist():
        del reasons[item]
    ledger.drop("select", reasons)
    return selected, wheres


def _fetch(
    pool: Pool, problem_rows: np.ndarray, where_rows: np.ndarray, quiet: bool
) -> tuple[dict[int, str], dict[int, str]]:
    """Read the pool again: the questions of `problem_rows`, and the locations of `where_rows`."""
    wanted, located = set(problem_rows.tolist()), set(where_rows.tolist())
    problems, wheres, done = {}, {}, 0
    with counting("fetching", quiet) as progress:
        for number, (where, row) in enumerate(pool_rows(pool)):
            if number in wanted:
                problems[number] = question_text(Trace.from_dict(row))
            if number in located:
                wheres[number] = where
            if (done := number + 1) % CHUNK == 0:
                progress(done, None)
        progress(done, done)
    return problems, wheres


# -------------------------------------------------------------------------------------------------------- writing


def _write(
    out: Path,
    pool: Pool,
    ledger: Ledger,
    difficulty: np.ndarray,
    chosen: np.ndarray,
    wheres: Mapping[int, str],
    quiet: bool,
) -> None:
    flaws, selected, items, rows = ledger.part.flaws, set(chosen.tolist()), count(), 0
    with (
        atomic_write(out / "reason1k.jsonl", "w") as kept,
        atomic_write(out / "dropped.jsonl", "w") as dropped,
        counting("writing", quiet) as progress,
    ):
        for rows, (where, row) in enumerate(pool_rows(pool), start=1):
            if rows > len(flaws):
                break
            item = next(items) if flaws[rows - 1] is None else None
            if item is not None and item in selected:
                _write_line(kept, record_of(_with_metadata(row, where, float(difficulty[item])), row))
            else:
                record = ledger.record(rows - 1, item, wheres)
                graded = _grading_texts(row) if record["stage"] == "score" else {}
                _write_line(dropped, {"where": where, "id": _id_of(row), **record, **graded})
            if rows % CHUNK == 0:
                progress(rows, len(flaws))
        progress(rows, len(flaws))
        if rows != len(flaws):
            raise ValueError(f"the pool changed while it was read: it no longer has {len(flaws)} rows; curate it again")


def _write_line(file: IO[str], record: Mapping[str, Any]) -> None:
    file.write(
        json.dumps({k: v for k, v in record.items() if v is not None}, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _with_metadata(row: Mapping[str, Any], where: str, difficulty: float) -> Trace:
    trace = Trace.from_dict(row)
    return replace(trace, id=trace.id or where, difficulty=round(difficulty, 6))


def _grading_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The answer and the reference of a row, as text: a reference may have any type."""
    given = ((name, row.get(name)) for name in ("answer", "reference"))
    return {name: str(value).encode("utf-8", "replace").decode() for name, value in given if value is not None}


def _id_of(row: Any) -> str | None:
    name = row.get("id") if isinstance(row, Mapping) else None
    return name if isinstance(name, str) else None
