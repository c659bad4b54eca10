"""The report's accuracy sections: before and after the training, by family and by token budget."""

from collections.abc import Iterator, Sequence
from typing import Any

from rbfast.evaluation.statistics import Interval, proportion
from rbfast.report.html import escape, picture, remark, table
from rbfast.report.plots import draw_accuracy, draw_budgets
from rbfast.report.read_run import (
    Comparison,
    Items,
    Measurement,
    Record,
    RunFolder,
    compare,
    families,
    main_measurement,
    share_correct,
    task_name,
)

_BUDGETS = 32  # points of a curve that is computed from one evaluation
NOTHING_MEASURED = (
    "No completions in the folder. Run `rbfast eval MODEL --task TASK -o RUN/before.jsonl` to measure the base model, "
    "and the same with `--adapter RUN -o RUN/after.jsonl` to measure the trained one."
)

_INTERVALS = "In brackets 95% intervals: Wilson's for shares, Agresti and Min's for the paired gain, in points."


def accuracy(run: RunFolder) -> Iterator[str]:
    if not run.measurements:
        yield remark(NOTHING_MEASURED)
    for measured in run.measurements:
        if len(run.measurements) > 1:
            yield f"<h4>{escape(_limit(measured))}</h4>"
        rows = families(measured)
        paired = [row for row in rows if row.gain is not None]
        if paired:
            yield picture(draw_accuracy([_bars(row) for row in paired]), "Share solved before and after, by family")
        if len(rows) > 1:
            rows.append(compare("all", measured.before, measured.after))
        shown = [
            (
                task_name(r.name),
                r.n,
                share_text(r.before),
                share_text(r.after),
                gain_text(r.gain),
            )
            for r in rows
        ]
        yield table(("family", "problems", "before", "after", "gain, paired"), shown)
        for side, items in (("before", measured.before), ("after", measured.after)):
            if not items:
                yield remark(f"Nothing was measured {side} the training, so there is no gain to show.")
    if run.measurements:
        yield remark(_INTERVALS)


def _bars(row: Comparison) -> dict[str, Any]:
    assert row.before and row.after and row.gain
    return {
        "family": task_name(row.name),
        "n": row.n,
        "before": row.before.mean,
        "after": row.after.mean,
        "ci_low": row.gain.low,
        "ci_high": row.gain.high,
    }


def _limit(measured: Measurement) -> str:
    limit = "no limit recorded" if measured.limit is None else f"at most {measured.limit:,} tokens"
    return f"{limit}, {measured.drawn}" if measured.drawn else limit


def by_budget(run: RunFolder) -> Iterator[str]:
    measured = main_measurement(run)
    if measured is None:
        yield remark(NOTHING_MEASURED)
        return
    curves = _by_limit([other for other in run.measurements if other.drawn == measured.drawn])
    if curves:
        yield picture(draw_budgets(curves), "Share solved by token limit")
        yield remark("Each point is a separate evaluation, over the problems that all of them share.")
    else:
        yield picture(draw_budgets(_within_budgets(measured)), "Share solved within a token budget")
        yield remark(
            f"Counted from one evaluation ({_limit(measured)}): right, and finished within the budget. "
            "Evaluations with other limits (`rbfast eval --max-new-tokens`), if the folder had any, would be drawn "
            "instead."
        )


def _by_limit(measurements: Sequence[Measurement]) -> dict[str, dict[int, Interval]]:
    """For each side that was evaluated under several limits, the share solved under each."""
    curves: dict[str, dict[int, Interval]] = {}
    for side in ("before", "after"):
        by_limit: dict[int, Items] = {m.limit: getattr(m, side) for m in measurements if m.limit and getattr(m, side)}
        if len(by_limit) < 2:
            continue
        first, *others = by_limit.values()
        shared = [problem for problem in first if all(problem in items for items in others)]
        if shared:
            curves[side] = {
                limit: proportion([share_correct(items[problem]) for problem in shared])
                for limit, items in by_limit.items()
            }
    return curves


def _within_budgets(measured: Measurement) -> dict[str, dict[int, Interval]]:
    """For each side, the share solved within each budget, up to the limit or the longest completion."""
    sides = {"before": measured.before, "after": measured.after}
    lengths = [record["tokens"] for items in sides.values() for found in items.values() for record in found]
    most = max(lengths) if measured.limit is None else measured.limit
    budgets = sorted({max(1, round(most * part / _BUDGETS)) for part in range(1, _BUDGETS + 1)})
    return {
        side: {budget: proportion([_in_time(found, budget) for found in items.values()]) for budget in budgets}
        for side, items in sides.items()
        if items
    }


def _in_time(records: Sequence[Record], budget: int) -> float:
    return sum(record["correct"] and record["tokens"] <= budget for record in records) / len(records)


def percent_text(share: Interval | None) -> str | None:
    return None if share is None else f"{100 * share.mean:.1f}%"


def share_text(share: Interval | None) -> str | None:
    return None if share is None else f"{100 * share.mean:.1f}% ({100 * share.low:.1f} .. {100 * share.high:.1f})"


def gain_text(gain: Interval | None) -> str | None:
    return None if gain is None else f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f})"
