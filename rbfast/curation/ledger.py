"""The fate of every item of a pool: the stage that dropped it, why, and what it was compared with."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rbfast.curation import text
from rbfast.curation.assess import RIGHT, UNVERIFIED, WRONG, AssessedPart
from rbfast.curation.decontaminate import Decontaminator, Evaluation, Match, strongest_matches
from rbfast.curation.dedup import duplicates

_CONTAMINATED = {
    "text": "holds an evaluation problem",
    "template": "an evaluation problem with other numbers",
    "variant": "a variant of an evaluation problem",
    "renamed": "an evaluation problem with other numbers and names",
    "paraphrase": "paraphrases an evaluation problem",
}


@dataclass(frozen=True)
class Stage:
    """How many items a stage was given, and how many it dropped, by reason."""

    name: str
    given: int
    dropped: dict[str, int]

    @property
    def kept(self) -> int:
        return self.given - sum(self.dropped.values())


class Ledger:
    """The fate of a pool. A row is any row of the pool, an item a row without a flaw: item i is row `rows[i]`."""

    def __init__(self, part: AssessedPart) -> None:
        self.part = part
        self.rows = np.flatnonzero([flaw is None for flaw in part.flaws])
        self.alive = np.ones(len(self.rows), dtype=bool)
        self.matches: list[Match | None] = [None] * len(self.rows)
        self.evaluations: tuple[Evaluation, ...] = ()
        flaws = Counter(flaw.partition(":")[0] for flaw in part.flaws if flaw is not None)
        self.stages = [Stage("clean", len(part.flaws), _sorted_by_count(flaws))]
        self._stage_of = np.full(len(self.rows), "", dtype=object)
        self._kind_of: list[str] = [""] * len(self.rows)
        self._keeper = np.arange(len(self.rows))

    def drop(self, stage: str, kinds: Mapping[int, str]) -> None:
        """Record a stage: drop these items, each for a kind of reason."""
        self.stages.append(Stage(stage, int(self.alive.sum()), _sorted_by_count(Counter(kinds.values()))))
        for item, kind in kinds.items():
            self.alive[item] = False
            self._stage_of[item] = stage
            self._kind_of[item] = kind

    def decontaminate(self, decontaminator: Decontaminator, keep_templates: bool) -> None:
        part = self.part
        matches = decontaminator.judge(part.shared, part.prompt_fingerprints, threads=text.cores())
        self.matches = strongest_matches(matches, part.prompt_sizes)
        self.evaluations = decontaminator.evaluations
        kept = {"template"} if keep_templates else set()
        self.drop(
            "decontaminate",
            {item: _CONTAMINATED[m.tier] for item, m in enumerate(self.matches) if m and m.tier not in kept},
        )

    def dedup(self) -> None:
        """Keep one item per problem: the right before the unverified, then the best quality, then the first."""
        part, items = self.part, np.flatnonzero(self.alive)
        certainty = np.where(part.verified == UNVERIFIED, 1, 2 * (part.verified == RIGHT))
        order = np.lexsort((part.quality[items], certainty[items]))
        preference = np.empty(len(items))
        preference[order] = _dense_ranks(certainty[items][order], part.quality[items][order])
        keeper = duplicates(part.fingerprints[items], part.signatures[items], part.keys[items], preference)
        self._keeper[items] = items[keeper]
        again = items[keeper != np.arange(len(items))]
        same = part.fingerprints[again] == part.fingerprints[self._keeper[again]]
        kinds = np.where(same, "the same problem", "nearly the same problem and answer")
        self.drop("dedup", dict(zip(again.tolist(), kinds.tolist(), strict=True)))

    def drop_wrong(self) -> None:
        """Drop the items whose answers are known to be wrong."""
        wrong = np.flatnonzero(self.alive & (self.part.verified == WRONG))
        self.drop("score", dict.fromkeys(wrong.tolist(), "wrong answer"))

    @property
    def eligible(self) -> np.ndarray:
        """The items that selection could choose from, bool."""
        return self.alive | (self._stage_of == "select")

    def kept_duplicates(self) -> np.ndarray:
        """The rows that were kept in place of duplicates, int64, sorted."""
        return self.rows[np.unique(self._keeper[self._keeper != np.arange(len(self._keeper))])]

    def record(self, row: int, item: int | None, wheres: Mapping[int, str]) -> dict[str, Any]:
        """The entry of a row in `dropped.jsonl`: its stage, the reason, and what it matched."""
        if item is None:
            return {"stage": "clean", "reason": self.part.flaws[row]}
        stage = self._stage_of[item]
        entry: dict[str, Any] = {"stage": stage, "reason": self._kind_of[item]}
        match = self.matches[item]
        if stage == "decontaminate" and match:
            where, problem = self.evaluations[match.item]
            entry["matched"] = {"where": where, "problem": problem, "share": round(match.share, 4)}
        if stage == "dedup":
            entry["duplicate_of"] = wheres[int(self.rows[self._keeper[item]])]
        return entry


def _sorted_by_count(kinds: Counter[str]) -> dict[str, int]:
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0])))


def _dense_ranks(*columns: np.ndarray) -> np.ndarray:
    """Ranks of sorted rows; equal rows share a rank."""
    changes = np.zeros(len(columns[0]), dtype=bool)
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return np.cumsum(changes)
