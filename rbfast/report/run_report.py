"""The report of finished runs: one HTML page that needs nothing else, pictures inside.

    write_report(["runs/first", "runs/second"], "report.html")

It shows what the folders hold and says what they do not. Texts of models, traces and files are escaped.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rbfast.adapter.adapter_files import CONFIG_FILE, AdapterConfig
from rbfast.data.spans import ROLES, split_spans
from rbfast.evaluation.statistics import Interval, proportion
from rbfast.report.html import escape, page, picture, stages_table, table
from rbfast.report.plots import draw_accuracy, draw_budgets, draw_losses, draw_placement, draw_scores
from rbfast.report.read_run import Comparison, Items, Measurement, Record, RunFolder, compare, families, read_run, score
from rbfast.training.run_folder import DATASHEET, LOG, RUN, SKIPPED
from rbfast.utils.files import write_text

_MOST_SKIPPED = 20  # traces that are listed
_MOST_EXAMPLES = 12
_OPEN_EXAMPLES = 2
_VERDICTS = [(False, True), (True, False), (False, False), (True, True)]  # before and after; the first are shown first
_BUDGETS = 32  # points of a curve that is counted from one limit


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Writes the page about the runs in `folders` to `out`, whole or not at all.

    Raises:
        ValueError: no folder, a folder without a run, or a file in it that is not what rbfast writes.
    """
    if not folders:
        raise ValueError("expected at least one folder of a run, got none")
    write_text(out, render([read_run(folder) for folder in folders]))


def render(runs: Sequence[RunFolder]) -> str:
    """The page as HTML."""
    names = _names(runs)
    body = ["<h1>rbfast report</h1>"]
    if len(runs) > 1:
        body.append(_overview(runs, names))
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        body += [f'<h2 id="run{number}">{escape(name)}</h2>', *_sections(run)]
    return page(f"Report of {names[0] if len(runs) == 1 else f'{len(runs)} runs'}", body)


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """The names of the folders; where two have the same, the paths as they were given."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _sections(run: RunFolder) -> list[str]:
    return [
        _headline(run),
        "<h3>What was trained, and on what</h3>",
        *_training(run),
        "<h3>Where the trained values are</h3>",
        *_placement(run),
        "<h3>Loss by role</h3>",
        *_losses(run),
        "<h3>Accuracy before and after</h3>",
        *_accuracy(run),
        "<h3>Accuracy by token budget</h3>",
        *_by_budget(run),
        "<h3>What it cost</h3>",
        *_cost(run),
        "<h3>Examples</h3>",
        *_examples(run),
    ]


def _say(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


# ---------------------------------------------------------------------------------------------------- runs at a glance


def _overview(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    solved = ("run", "problems", "before", "after", "gain (95% interval)", "of all values", "traces", "training")
    header = (*solved, "steps", *(f"{role} loss" for role in ROLES), "trained values", "placement", "base model")
    rows = [(name, *_at_a_glance(run)) for name, run in zip(names, runs, strict=True)]
    links = " · ".join(f'<a href="#run{number}">{escape(name)}</a>' for number, name in enumerate(names))
    note = _say("Losses are means of the last tenth of the steps. Shares solved compare only over the same problems.")
    return f"{table(header, rows)}{note}<p>{links}</p>"


def _at_a_glance(run: RunFolder) -> list[Any]:
    measured = _measured(run)
    solved = compare("all", measured.before, measured.after) if measured else Comparison("all", 0, None, None, None)
    return [
        solved.n or None,
        _percent(solved.before),
        _percent(solved.after),
        _gain(solved.gain),
        _trainable(run),
        run.settings["traces"],
        _duration(run.cost.get("training_seconds")),
        run.log[-1]["step"] if run.log else None,
        *(_last_loss(run, role) for role in ROLES),
        _values(run.adapter) if run.adapter else None,
        run.settings.get("placement"),
        _base_model(run),
    ]


def _headline(run: RunFolder) -> str:
    trained = f"{_trainable(run)} of {_base_model(run)}'s parameters, trained on {run.settings['traces']:,} traces."
    measured = _measured(run)
    total = compare("all", measured.before, measured.after) if measured else None
    if total is None or total.gain is None:
        return f"<p>{escape(trained)}</p>"
    solved = f"It solves {_percent(total.after)} of {total.n:,} problems; {_percent(total.before)} before the training."
    return f"<p>{escape(trained)} {escape(solved)} The gain is <b>{escape(_gain(total.gain))}</b> points.</p>"


def _measured(run: RunFolder) -> Measurement | None:
    """The measurement to speak of: one with both sides, and of those the one with the highest limit."""
    return max(run.measurements, key=lambda m: (bool(m.before and m.after), m.limit or 0), default=None)


def _base_model(run: RunFolder) -> str:
    """The name alone: where a folder stood says nothing to a reader of the page."""
    name = run.settings["base_model"] or "an unnamed model"
    return Path(name).name if Path(name).is_absolute() else name


def _values(adapter: AdapterConfig) -> int:
    return sum(m.rank * (m.out_features + m.support) for m in adapter.modules.values())


def _trainable(run: RunFolder) -> str:
    if (percent := run.cost.get("trainable_percent")) is not None:
        return f"{percent:.3f}%"
    return f"at most {100 * run.settings['density']:.3g}%"


def _last_loss(run: RunFolder, role: str) -> str | None:
    log = run.log or []
    last = [entry[f"loss_{role}"] for entry in log[-max(1, len(log) // 10) :] if f"loss_{role}" in entry]
    return f"{sum(last) / len(last):.4f}" if last else None


def _percent(share: Interval | None) -> str | None:
    return None if share is None else f"{100 * share.mean:.1f}%"


def _share(share: Interval | None) -> str | None:
    return None if share is None else f"{100 * share.mean:.1f}% ({100 * share.low:.1f} .. {100 * share.high:.1f})"


def _gain(gain: Interval | None) -> str | None:
    return None if gain is None else f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} .. {100 * gain.high:+.1f})"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds:.0f}\u00a0seconds" if seconds < 120 else f"{seconds / 60:.1f}\u00a0minutes"


# -------------------------------------------------------------------------------------------------------- the training


def _training(run: RunFolder) -> Iterator[str]:
    settings = run.settings
    shown = [
        ("base model", _base_model(run)),
        ("traces", f"{settings['traces']:,}"),
        ("left out", "not recorded" if run.skipped is None else f"{len(run.skipped):,}"),
        ("steps", f"{run.log[-1]['step']:,}" if run.log else "the training has not finished"),
        *((name.replace("_", " "), settings[name]) for name in _SETTINGS if settings.get(name) is not None),
    ]
    yield table(("setting", "value"), shown)
    whole = json.dumps(settings | {"base_model": _base_model(run)}, indent=1, ensure_ascii=False)
    yield f"<details><summary>every setting, as {RUN} holds it</summary><pre>{escape(whole)}</pre></details>"
    yield from _skipped(run)
    if run.datasheet is None:
        yield _say(f"No {DATASHEET} in the folder: where the traces come from is not recorded there.")
        return
    yield "<h4>How the traces were picked</h4>"
    yield stages_table(run.datasheet)
    domains = [(d["domain"], d["before"], d["eligible"], d["after"]) for d in run.datasheet["domains"]]
    yield table(("domain", "in the pool", "eligible", "picked"), domains)


_SETTINGS = ("epochs", "batch_size", "accumulation", "learning_rate", "placement", "max_tokens", "seed")


def _skipped(run: RunFolder) -> Iterator[str]:
    if run.skipped:
        rows = [(str(trace.get("problem", ""))[:200], trace["reason"]) for trace in run.skipped[:_MOST_SKIPPED]]
        yield "<h4>Traces left out</h4>"
        yield table(("problem", "reason"), rows)
        if len(run.skipped) > len(rows):
            yield _say(f"The first {len(rows)} of {len(run.skipped):,}; {SKIPPED} holds them all.")


def _placement(run: RunFolder) -> Iterator[str]:
    if run.adapter is None:
        yield _say(f"No {CONFIG_FILE} in the folder: the adapter is not there.")
        return
    matrices = run.adapter.modules
    budget = f"{_values(run.adapter):,} trained values in {len(matrices):,} matrices: {_trainable(run)} of the base."
    yield f"<p>{escape(budget)} Columns were placed by: {escape(run.adapter.placement)}.</p>"
    placed = {
        name: {"columns": m.support, "values": m.rank * (m.out_features + m.support), "in": m.in_features}
        for name, m in matrices.items()
    }
    yield picture(draw_placement(placed), "Share of input columns trained, by layer and matrix")
    scores = {name: m.score for name, m in matrices.items() if m.score is not None}
    if any(score > 0 for score in scores.values()):
        yield picture(draw_scores(scores), "Score of the trained columns, by layer and matrix")


def _losses(run: RunFolder) -> Iterator[str]:
    if run.log is None:
        yield _say(f"No {LOG} in the folder: the training has not finished.")
    elif not any(f"loss_{role}" in entry for entry in run.log for role in ROLES):
        yield _say(f"{LOG} holds no loss by role.")
    else:
        yield picture(draw_losses(run.log), "Loss of strategic, tactical and answer tokens by step")
        rows = [(role, loss) for role in ROLES if (loss := _last_loss(run, role)) is not None]
        yield table(("tokens", "loss at the end"), rows)
        yield _say("At the end: the mean of the last tenth of the steps.")


# -------------------------------------------------------------------------------------------------------- the accuracy


_NOTHING_MEASURED = (
    "No completions in the folder. `rbfast eval MODEL --task TASK -o RUN/before.jsonl`, and the same with "
    "`--adapter RUN -o RUN/after.jsonl`, measure the base model and the trained one."
)


def _accuracy(run: RunFolder) -> Iterator[str]:
    if not run.measurements:
        yield _say(_NOTHING_MEASURED)
    for measured in run.measurements:
        if len(run.measurements) > 1:
            yield f"<h4>{escape(_limit(measured))}</h4>"
        rows = families(measured)
        paired = [row for row in rows if row.gain is not None]
        if paired:
            yield picture(draw_accuracy([_bars(row) for row in paired]), "Share solved before and after, by family")
        if len(rows) > 1:
            rows.append(compare("all", measured.before, measured.after))
        shown = [(_task(r.name), r.n, _share(r.before), _share(r.after), _gain(r.gain)) for r in rows]
        yield table(("family", "problems", "before", "after", "gain, paired"), shown)
        for side, items in (("before", measured.before), ("after", measured.after)):
            if not items:
                yield _say(f"Nothing was measured {side} the training, so there is no gain to show.")
    if run.measurements:
        yield _say("In brackets 95% intervals: Wilson's for shares, Agresti and Min's for the paired gain, in points.")


def _bars(row: Comparison) -> dict[str, Any]:
    assert row.before and row.after and row.gain
    return {
        "family": _task(row.name),
        "n": row.n,
        "before": row.before.mean,
        "after": row.after.mean,
        "ci_low": row.gain.low,
        "ci_high": row.gain.high,
    }


def _task(name: str) -> str:
    """A task as people call it: a file by its name, a generator without its library."""
    return Path(name).name if name.endswith(".jsonl") else name.removeprefix("reasoning-gym:")


def _limit(measured: Measurement) -> str:
    return "no limit recorded" if measured.limit is None else f"at most {measured.limit:,} tokens"


def _by_budget(run: RunFolder) -> Iterator[str]:
    measured = _measured(run)
    if measured is None:
        yield _say(_NOTHING_MEASURED)
        return
    curves = _over_limits(run.measurements)
    if curves:
        yield picture(draw_budgets(curves), "Share solved by limit of tokens")
        yield _say("Each point is an evaluation of its own, over the problems that all of them have.")
    else:
        yield picture(draw_budgets(_within(measured)), "Share solved within so many tokens")
        yield _say(
            f"Counted from one evaluation ({_limit(measured)}): right, and finished within the budget. "
            "Evaluations with other limits (`rbfast eval --max-new-tokens`) in the folder would be drawn in its place."
        )


def _over_limits(measurements: Sequence[Measurement]) -> dict[str, dict[int, Interval]]:
    """For each side that was measured under several limits, the share solved under each."""
    curves: dict[str, dict[int, Interval]] = {}
    for side in ("before", "after"):
        by_limit: dict[int, Items] = {m.limit: getattr(m, side) for m in measurements if m.limit and getattr(m, side)}
        if len(by_limit) < 2:
            continue
        first, *others = by_limit.values()
        shared = [problem for problem in first if all(problem in items for items in others)]
        if shared:
            curves[side] = {
                limit: proportion([score(items[problem]) for problem in shared]) for limit, items in by_limit.items()
            }
    return curves


def _within(measured: Measurement) -> dict[str, dict[int, Interval]]:
    """For each side the share that is solved within so many tokens, up to the limit or the longest completion."""
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


def _cost(run: RunFolder) -> Iterator[str]:
    cost = run.cost
    training = _duration(cost.get("training_seconds"))
    shown = [
        ("training", training and training + (", since it was resumed" if cost.get("resumed") else "")),
        ("tokens trained on, an epoch", cost.get("tokens_per_epoch") and f"{cost['tokens_per_epoch']:,}"),
        ("all, evaluation included", _duration(cost.get("seconds"))),
        ("peak memory", cost.get("peak_memory_mb") and f"{cost['peak_memory_mb'] / 1024:.1f} GiB"),
    ]
    yield table(("what", "how much"), [(what, value or "not recorded") for what, value in shown])
    sides = [(m, side, getattr(m, side)) for m in run.measurements for side in ("before", "after")]
    rows = [(side, *_tokens(items), measured.limit) for measured, side, items in sides if items]
    if rows:
        yield table(("completions", "how many", "tokens", "each", "cut at the limit", "limit"), rows)


def _tokens(items: Items) -> tuple[int, int, str, str]:
    records = [record for found in items.values() for record in found]
    tokens = sum(record["tokens"] for record in records)
    cut = sum(record["truncated"] for record in records) / len(records)
    return len(records), tokens, f"{tokens / len(records):.1f}", f"{100 * cut:.1f}%"


# -------------------------------------------------------------------------------------------------------- the examples


def _examples(run: RunFolder) -> Iterator[str]:
    measured = _measured(run)
    if measured is None:
        yield _say(_NOTHING_MEASURED)
        return
    roles = " ".join(f'<span class="{role}">{role}</span>' for role in ROLES)
    yield f"<p>Colours are the roles that the splitter reads in the text: {roles}.</p>"
    chosen = _chosen(measured)
    if not chosen:
        yield _say("No problem was measured both before and after the training.")
    for number, problem in enumerate(chosen):
        yield _example(problem, measured, opened=number < _OPEN_EXAMPLES)


def _chosen(measured: Measurement) -> list[tuple[str, str]]:
    """The first problem of every task that was gained; then of those lost, those never solved, those always solved."""
    after = measured.after or measured.before
    before = measured.before or after
    firsts: dict[tuple[int, str], tuple[str, str]] = {}
    for problem in after:
        if problem in before:
            verdict = before[problem][0]["correct"], after[problem][0]["correct"]
            firsts.setdefault((_VERDICTS.index(verdict), problem[0]), problem)
    return [firsts[key] for key in sorted(firsts, key=lambda key: key[0])][:_MOST_EXAMPLES]


def _example(problem: tuple[str, str], measured: Measurement, opened: bool) -> str:
    sides = [(side, getattr(measured, side).get(problem)) for side in ("before", "after")]
    shown = [(side, records[0]) for side, records in sides if records]
    task, question = problem
    verdicts = ", ".join(f"{_verdict(record)} {side}" for side, record in shown)
    answer = escape(shown[0][1].get("answer", "not recorded"))
    return (
        f"<details{' open' if opened else ''}><summary>{escape(_task(task))}: {verdicts}</summary>"
        f'<div class="text">{escape(question)}</div><p>The answer: {answer}</p>'
        f'<div class="pair">{"".join(_completion(side, record) for side, record in shown)}</div></details>'
    )


def _verdict(record: Record) -> str:
    return "right" if record["correct"] else "wrong"


def _completion(side: str, record: Record) -> str:
    cut = ", cut at the limit" if record["truncated"] else ""
    title = f"{side}: {_verdict(record)}, {record['tokens']:,} tokens{cut}"
    return f'<div><b>{title}</b><div class="text">{_coloured(record)}</div></div>'


def _coloured(record: Record) -> str:
    """The completion in the colours of its roles; interventions are marked where they were, with what they struck."""
    text = record["completion"]
    marks: dict[int, str] = {}
    for event in record.get("events", ()):
        at = min(max(event["at"], 0), len(text))
        struck = f"<del>{escape(event['struck'])}</del>" if event["struck"] else ""
        marks[at] = f"{marks.get(at, '')}<mark>{escape(event['kind'])}</mark>{struck}"
    pieces = []
    for start, end, role in split_spans(text):
        cuts = [start, *sorted(at for at in marks if start < at < end), end]
        for left, right in pairwise(cuts):
            pieces.append(f'{marks.get(left, "")}<span class="{ROLES[role]}">{escape(text[left:right])}</span>')
    return "".join([*pieces, marks.get(len(text), "")])
