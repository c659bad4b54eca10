"""The report of finished runs: one self-contained HTML page.

    write_report(["runs/first", "runs/second"], "report.html")

It shows what the folders hold and names what is missing. All text of models, traces and files is escaped.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rbfast.adapter.adapter_files import CONFIG_FILE, AdapterConfig
from rbfast.data.spans import ROLES
from rbfast.models.names import hub_id_of
from rbfast.report.accuracy import accuracy, by_budget, gain_text, percent_text
from rbfast.report.examples import examples
from rbfast.report.html import domains_table, escape, page, picture, remark, stages_table, table
from rbfast.report.plots import draw_losses, draw_placement, draw_scores
from rbfast.report.read_run import Comparison, Items, RunFolder, compare, main_measurement, read_run
from rbfast.training.run_folder import DATASHEET, LOG, RUN, SKIPPED
from rbfast.utils.files import write_text

_MOST_SKIPPED = 20  # traces listed at most


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write the report of the runs in `folders` to `out`, atomically.

    Raises:
        ValueError: no folder, a folder without a run, or a file in it that is not in rbfast's format.
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
    """The names of the folders; if two are equal, the paths as given."""
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
        *accuracy(run),
        "<h3>Accuracy by token budget</h3>",
        *by_budget(run),
        "<h3>What it cost</h3>",
        *_cost(run),
        "<h3>Examples</h3>",
        *examples(run),
    ]


# ---------------------------------------------------------------------------------------------------- runs at a glance


def _overview(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    solved = ("run", "problems", "before", "after", "gain (95% interval)", "of all values", "traces", "training")
    header = (
        *solved,
        "steps",
        *(f"{role} loss" for role in ROLES),
        "held-out loss",
        "trained values",
        "placement",
        "base model",
    )
    rows = [(name, *_overview_row(run)) for name, run in zip(names, runs, strict=True)]
    links = " · ".join(f'<a href="#run{number}">{escape(name)}</a>' for number, name in enumerate(names))
    note = remark(
        "Losses are means over the last tenth of the steps that had tokens of the role. "
        "Shares solved are comparable only over the same problems."
    )
    return f"{table(header, rows)}{note}<p>{links}</p>"


def _overview_row(run: RunFolder) -> list[Any]:
    measured = main_measurement(run)
    solved = compare("all", measured.before, measured.after) if measured else Comparison("all", 0, None, None, None)
    return [
        solved.n or None,
        percent_text(solved.before),
        percent_text(solved.after),
        gain_text(solved.gain),
        _trainable(run),
        _traces(run),
        _duration(run.cost.get("training_seconds")),
        run.log[-1]["step"] if run.log else None,
        *(_last_loss(run, role) for role in ROLES),
        _held_out_loss(run),
        _trained_values(run.adapter) if run.adapter else None,
        run.settings.get("placement"),
        _base_model(run),
    ]


def _headline(run: RunFolder) -> str:
    trained = f"{_trainable(run)} of {_base_model(run)}'s parameters, trained on {_traces(run):,} traces."
    measured = main_measurement(run)
    total = compare("all", measured.before, measured.after) if measured else None
    if total is None or total.gain is None:
        return f"<p>{escape(trained)}</p>"
    after, before = percent_text(total.after), percent_text(total.before)
    solved = f"It solves {after} of {total.n:,} problems; {before} before the training."
    return f"<p>{escape(trained)} {escape(solved)} The gain is <b>{escape(gain_text(total.gain))}</b> points.</p>"


def _base_model(run: RunFolder) -> str:
    """The base model's hub id, else its name without the path, which means nothing to a reader of the page."""
    name = run.settings["base_model"] or "an unnamed model"
    return hub_id_of(name) or (Path(name).name if Path(name).is_absolute() else name)


def _trained_values(adapter: AdapterConfig) -> int:
    return sum(matrix.values for matrix in adapter.modules.values())


def _traces(run: RunFolder) -> int:
    """The number of traces trained on; for an unfinished run, the number given to it."""
    return int(run.settings["traces"]) - len(run.skipped or ())


def _trainable(run: RunFolder) -> str:
    if (percent := run.cost.get("trainable_percent")) is not None:
        return f"{percent:.3f}%"
    return f"at most {100 * run.settings['density']:.3g}%"


def _last_loss(run: RunFolder, role: str) -> str | None:
    known = [entry[f"loss_{role}"] for entry in run.log or [] if f"loss_{role}" in entry]
    last = known[-max(1, len(known) // 10) :]
    return f"{sum(last) / len(last):.4f}" if last else None


def _held_out_loss(run: RunFolder, role: str = "") -> str | None:
    known = [entry[name] for entry in run.log or [] if (name := f"eval_loss{role}") in entry]
    return f"{known[-1]:.4f}" if known else None


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds:.0f}\u00a0seconds" if seconds < 120 else f"{seconds / 60:.1f}\u00a0minutes"


# -------------------------------------------------------------------------------------------------------- the training


def _training(run: RunFolder) -> Iterator[str]:
    settings = run.settings
    shown = [
        ("base model", _base_model(run)),
        ("traces", f"{_traces(run):,}"),
        ("left out", "not recorded" if run.skipped is None else f"{len(run.skipped):,}"),
        ("steps", f"{run.log[-1]['step']:,}" if run.log else "the training has not finished"),
        *((name.replace("_", " "), settings[name]) for name in _SETTINGS if settings.get(name) is not None),
    ]
    yield table(("setting", "value"), shown)
    whole = json.dumps(settings | {"base_model": _base_model(run)}, indent=1, ensure_ascii=False)
    yield f"<details><summary>all settings in {RUN}</summary><pre>{escape(whole)}</pre></details>"
    yield from _skipped(run)
    if run.datasheet is None:
        yield remark(
            f"No {DATASHEET} in the folder, so how the traces were picked is unknown. To show it here, copy the one "
            "that `rbfast curate` wrote into the folder."
        )
        return
    yield "<h4>How the traces were picked</h4>"
    yield stages_table(run.datasheet)
    yield domains_table(run.datasheet["domains"])


_SETTINGS = ("epochs", "batch_size", "accumulation", "learning_rate", "placement", "max_tokens", "seed")


def _skipped(run: RunFolder) -> Iterator[str]:
    if run.skipped:
        rows = [(str(trace.get("problem", ""))[:200], trace["reason"]) for trace in run.skipped[:_MOST_SKIPPED]]
        yield "<h4>Traces left out</h4>"
        yield table(("problem", "reason"), rows)
        if len(run.skipped) > len(rows):
            yield remark(f"The first {len(rows)} of {len(run.skipped):,}; {SKIPPED} holds them all.")


def _placement(run: RunFolder) -> Iterator[str]:
    if run.adapter is None:
        yield remark(f"No {CONFIG_FILE} in the folder: the adapter is missing.")
        return
    matrices = run.adapter.modules
    budget = (
        f"{_trained_values(run.adapter):,} trained values in {len(matrices):,} matrices: {_trainable(run)} of the base."
    )
    yield f"<p>{escape(budget)} Columns were placed by: {escape(run.adapter.placement)}.</p>"
    placed = {name: {"columns": m.support, "values": m.values, "in": m.in_features} for name, m in matrices.items()}
    yield picture(draw_placement(placed), "Share of input columns trained, by layer and matrix")
    scores = {name: m.score for name, m in matrices.items() if m.score is not None}
    if any(score > 0 for score in scores.values()):
        yield picture(draw_scores(scores), "Score of the trained columns, by layer and matrix")


def _losses(run: RunFolder) -> Iterator[str]:
    if run.log is None:
        yield remark(f"No {LOG} in the folder: the training has not finished.")
    elif not any(f"loss_{role}" in entry for entry in run.log for role in ROLES):
        yield remark(f"{LOG} has no loss by role.")
    else:
        yield picture(draw_losses(run.log), "Loss of strategic, tactical and answer tokens by step")
        rows = [(role, _last_loss(run, role), _held_out_loss(run, f"_{role}")) for role in ROLES]
        width = 3 if any(held_out for *_, held_out in rows) else 2
        header = "tokens", "loss at the end", "of held-out traces"
        yield table(header[:width], [row[:width] for row in rows if any(row[1:])])
        yield remark("At the end: the mean over the last tenth of the steps that had tokens of the role.")


def _cost(run: RunFolder) -> Iterator[str]:
    cost = run.cost
    training = _duration(cost.get("training_seconds"))
    shown = [
        ("training", training and training + (", since it was resumed" if cost.get("resumed") else "")),
        ("tokens trained on, per epoch", cost.get("tokens_per_epoch") and f"{cost['tokens_per_epoch']:,}"),
        ("total, including evaluation", _duration(cost.get("seconds"))),
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
