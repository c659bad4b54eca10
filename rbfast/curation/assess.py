"""Assess each item of a pool on its own: is it complete, what does it ask, how hard and how good is it.

    part = Assessor(decontaminator)(rows)         # rows: [("pool.jsonl:1", {"problem": ..., ...}), ...]

An assessor is picklable and stateless, and its result for an item does not depend on the other items. So the parts of a
pool may be assessed anywhere, and joined in order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rbfast.curation import text
from rbfast.curation.decontaminate import SHINGLE, Decontaminator, SharedShingles, join_shared
from rbfast.curation.dedup import SIGNATURE, agreement_key, history_hash, mix_history
from rbfast.curation.quality import Quality, find_flaw, proxy_difficulty, quality, repeated_shares
from rbfast.data.replies import END_FIELDS, FINISHED, cut_by_server
from rbfast.data.trace import Trace, TraceError

UNVERIFIED, WRONG, RIGHT = -1, 0, 1

Verify = Callable[[Trace, Mapping[str, Any]], bool | None]
"""Whether a trace's answer is right, from the trace and its row; None if unknown."""
TraceMeasure = Callable[[Trace], float]
"""How hard, or how good, a trace is: higher for harder (or better)."""


class AssessedPart(NamedTuple):
    """An assessed part of a pool. `flaws` covers every row, the other fields only the rows without a flaw, in order."""

    flaws: list[str | None]
    domains: list[str]
    fingerprints: np.ndarray  # uint64, of the problem and the turns before it
    keys: np.ndarray  # uint64, equal for near duplicates (`dedup.agreement_key`)
    signatures: np.ndarray  # uint32 [n, 64], MinHash of the problem
    given: np.ndarray  # float64, the row's own difficulty, or NaN
    proxy: np.ndarray  # float64
    marks: np.ndarray  # float32 [n, 6], a Quality
    quality: np.ndarray  # float64
    verified: np.ndarray  # int8: UNVERIFIED, WRONG or RIGHT
    lengths: np.ndarray  # int32, characters of reasoning
    prompt_sizes: np.ndarray  # int64, the number of texts in the prompt: the problem, and what comes before it
    prompt_fingerprints: np.ndarray  # uint64 [sum of sizes]; replies and system prompts have their problem's
    shared: SharedShingles  # what these texts share with the evaluation sets


@dataclass(frozen=True)
class Assessor:
    """Assesses rows. `quality`, `difficulty` and `verify` replace the built-in quality score, `proxy_difficulty` and
    `verify_answer`."""

    decontaminator: Decontaminator
    quality: TraceMeasure | None = None
    difficulty: TraceMeasure = proxy_difficulty
    verify: Verify | None = None

    def __call__(self, rows: Sequence[tuple[str, Any]], *, threads: int = 1) -> AssessedPart:
        parsed = [_parse_row(row) for _, row in rows]
        traces = [trace for trace in parsed if isinstance(trace, Trace)]
        repeated = iter(repeated_shares([trace.reasoning for trace in traces], threads=threads).tolist())
        flaws: list[str | None] = []
        kept: list[tuple[Trace, Mapping[str, Any], Quality]] = []
        for trace, (_, row) in zip(parsed, rows, strict=True):
            if isinstance(trace, str):
                flaws.append(trace)
                continue
            share = next(repeated)
            flaws.append(cut_by_server(row) or find_flaw(trace, share, finished=_is_finished(row)))
            if flaws[-1] is None:
                kept.append((trace, row, quality(trace, share)))
        return self._describe(flaws, kept, threads)

    def _describe(
        self, flaws: list[str | None], kept: Sequence[tuple[Trace, Mapping[str, Any], Quality]], threads: int
    ) -> AssessedPart:
        traces = [trace for trace, _, _ in kept]
        problems = [trace.problem for trace in traces]
        texts = text.pack(problems)
        fingerprints = text.fingerprints(texts, threads=threads)
        histories = _histories(traces, threads)
        prompts = [_prompt_texts(trace) for trace in traces]
        sizes = np.array(list(map(len, prompts)), dtype=np.int64)
        flat = [one for prompt in prompts for one in prompt]
        packed = texts if flat == problems else text.pack(flat)
        verify = self.verify or verify_answer
        rows, _ = text.shingles(texts, SHINGLE, threads=threads)
        return AssessedPart(
            flaws=flaws,
            domains=[trace.domain or "unknown" for trace in traces],
            fingerprints=mix_history(histories, fingerprints),
            keys=mix_history(
                histories, np.array([agreement_key(t.problem, t.answer) for t in traces], dtype=np.uint64)
            ),
            signatures=text.minhash(rows, SIGNATURE, threads=threads),
            given=np.array([np.nan if t.difficulty is None else t.difficulty for t in traces], dtype=np.float64),
            proxy=_as_finite("difficulty", [self.difficulty(trace) for trace in traces]),
            marks=np.array([mark for _, _, mark in kept], dtype=np.float32).reshape(-1, len(Quality._fields)),
            quality=_as_finite("quality", [self.quality(t) if self.quality else mark.score for t, _, mark in kept]),
            verified=np.array([_verdict(verify(trace, row)) for trace, row, _ in kept], dtype=np.int8),
            lengths=np.array([len(trace.reasoning) for trace in traces], dtype=np.int32),
            prompt_sizes=sizes,
            prompt_fingerprints=fingerprints
            if packed is texts
            else _question_fingerprints(text.fingerprints(packed, threads=threads), sizes, traces),
            shared=self.decontaminator.find(packed, flat, threads=threads),
        )


def question_text(trace: Trace) -> str:
    """The user's texts, from the first turn to the problem."""
    return "\n\n".join([*(turn["content"] for turn in (trace.turns or ())[::2]), trace.problem])


def verify_answer(trace: Trace, row: Mapping[str, Any]) -> bool | None:
    """The trace's own `verified`, else its answer graded against the row's `reference`, else None.

    A reference may be a solution that marks its answer; one without a marked answer is ignored. The grader is
    `rbfast.grading.grade.grade`.

    Raises:
        ImportError: comparing two answers needs math-verify, and it is not installed.
    """
    if trace.verified is not None:
        return trace.verified
    reference = row.get("reference")
    if reference is None:
        return None
    from rbfast.data.answers import known_answer
    from rbfast.grading.grade import Problem, grade

    if (stated := known_answer(str(reference))) is None:
        return None
    return grade(Problem("", trace.problem, stated, {}), f"<answer>{trace.answer}</answer>") >= 1.0


def join_parts(parts: Sequence[AssessedPart]) -> AssessedPart:
    """Concatenate the parts of a pool."""
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in AssessedPart._fields
        if name not in ("flaws", "domains", "shared")
    }
    return AssessedPart(
        flaws=[flaw for part in parts for flaw in part.flaws],
        domains=[domain for part in parts for domain in part.domains],
        shared=join_shared([part.shared for part in parts]),
        **joined,
    )


def _prompt_texts(trace: Trace) -> list[str]:
    """The texts of a prompt: the problem, the user's earlier turns, the replies to them, the system prompt."""
    contents = [turn["content"] for turn in trace.turns or ()]
    return [trace.problem, *contents[::2], *contents[1::2], *([trace.system] if trace.system else [])]


def _question_fingerprints(fingerprints: np.ndarray, sizes: np.ndarray, traces: Sequence[Trace]) -> np.ndarray:
    """The fingerprints of the prompts' texts; replies and system prompts get the fingerprint of their problem.

    Each fingerprint counts once when the rarity of shingles is measured, so this measures rarity among questions only.
    """
    problem = np.repeat(np.cumsum(sizes) - sizes, sizes)
    questions = np.repeat([1 + len(trace.turns or ()) // 2 for trace in traces], sizes)
    place = np.arange(len(fingerprints))
    return fingerprints[np.where(place - problem < questions, place, problem)]


def _histories(traces: Sequence[Trace], threads: int) -> np.ndarray:
    """The `history_hash` of the turns before each problem, uint64 [n]."""
    turns = [trace.turns or () for trace in traces]
    fingerprints = text.fingerprints(text.pack(turn["content"] for one in turns for turn in one), threads=threads)
    ends = np.cumsum([len(one) for one in turns], dtype=np.int64)
    return np.array([history_hash(one) for one in np.split(fingerprints, ends)[:-1]], dtype=np.uint64)


def _parse_row(row: Any) -> Trace | str:
    try:
        if isinstance(row, TraceError):
            raise row
        return Trace.from_dict(row)
    except TraceError as error:
        return f"not a trace: {error}"


def _is_finished(row: Mapping[str, Any]) -> bool:
    """Whether the server reported the reply as complete, or an answer followed the reasoning."""
    return row.get("finished") is True or any(str(row.get(field)).lower() in FINISHED for field in END_FIELDS)


def _verdict(verified: bool | None) -> int:
    if verified is None:
        return UNVERIFIED
    if verified not in (False, True):  # a text, or a share of passed tests: its truth value says nothing
        raise ValueError(f"verify must return True, False or None, got {verified!r}")
    return RIGHT if verified else WRONG


def _as_finite(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must return a finite number for every trace, got {array[~np.isfinite(array)][0]}")
    return array
