"""The datasheet of a curation: what went in, what was dropped and why, what came out; as JSON and as an HTML page.

    sheet = describe(settings, ledger, difficulty, chosen)
    write_datasheet("reason1k/", sheet)                # datasheet.json; datasheet.html, with its plots inside

It contains no times or machine names, so the same curation gives the same datasheet.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rbfast
from rbfast.curation.assess import RIGHT, UNVERIFIED, WRONG
from rbfast.curation.ledger import Ledger
from rbfast.curation.quality import Quality
from rbfast.report.html import domains_table, dropped_because, escape, page, picture, remark, stages_table, table
from rbfast.report.plots import AFTER, BEFORE, plot_label
from rbfast.utils.files import write_text

_BINS = 20
_MOST_MATCHED = 50  # evaluation problems listed at most
_MOST_DRAWN = 20  # domains drawn at most
_WHICH = (
    "Before: the traces that passed clean (for difficulty: the eligible ones). "
    "Eligible: the traces that select could choose from. After: the traces that it chose."
)


def describe(
    settings: Mapping[str, Any],
    ledger: Ledger,
    difficulty: np.ndarray,
    chosen: np.ndarray,
    pass_rates: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The datasheet as JSON values. `before` counts the items without a flaw, `after` the selected ones.

    Args:
        difficulty: float [items], NaN if an item was dropped before it was scored.
        chosen: the selected items.
        pass_rates: `known`, the number of items with a pass rate, and `of`, the number of items that can be selected;
            None if no pass rates were given.
    """
    part = ledger.part
    after = np.zeros(len(ledger.rows), dtype=bool)
    after[chosen] = True
    scored = ~np.isnan(difficulty)
    everyone, lengths = np.ones_like(after), np.log10(np.maximum(part.lengths, 1))
    return {
        "rbfast": rbfast.__version__,
        "settings": dict(settings),
        "stages": [
            {"stage": stage.name, "in": stage.given, "dropped": stage.dropped, "out": stage.kept}
            for stage in ledger.stages
        ],
        "domains": _domains(part.domains, ledger.eligible, after),
        "verified": {
            name: {"before": int(kept.sum()), "after": int((kept & after).sum())}
            for name, verdict in (("right", RIGHT), ("wrong", WRONG), ("unverified", UNVERIFIED))
            for kept in [part.verified == verdict]
        },
        **({} if pass_rates is None else {"pass_rates": dict(pass_rates)}),
        "difficulty": _histogram(difficulty, scored, after, 0.0, 1.0),
        "quality": _histogram(part.quality, everyone, after, *_range(part.quality)),
        "marks": {
            name: {"before": _mean(part.marks[:, column]), "after": _mean(part.marks[after, column])}
            for column, name in enumerate(Quality._fields)
        },
        "log10_characters": _histogram(lengths, everyone, after, *_range(lengths)),
        "evaluation_problems": len(ledger.evaluations),
        "evaluation_problems_matched": len({match.item for match in ledger.matches if match}),
        "contamination": _contamination(ledger),
    }


def _domains(domains: Sequence[str], eligible: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    before, could = Counter(domains), Counter(d for d, kept in zip(domains, eligible, strict=True) if kept)
    chosen = Counter(d for d, kept in zip(domains, after, strict=True) if kept)
    return [
        {"domain": name, "before": before[name], "eligible": could[name], "after": chosen[name]}
        for name in sorted(before, key=lambda name: (-before[name], name))
    ]


def _contamination(ledger: Ledger) -> list[dict[str, Any]]:
    """The evaluation problems with the most matches, with the number of matches by tier."""
    tiers: dict[int, Counter[str]] = {}
    for match in ledger.matches:
        if match:
            tiers.setdefault(match.item, Counter())[match.tier] += 1
    most = sorted(tiers, key=lambda item: (-tiers[item].total(), item))[:_MOST_MATCHED]
    return [
        {
            "where": ledger.evaluations[item].where,
            "problem": ledger.evaluations[item].problem,
            "items": dict(tiers[item]),
        }
        for item in most
    ]


def _histogram(values: np.ndarray, before: np.ndarray, after: np.ndarray, low: float, high: float) -> dict[str, Any]:
    edges = np.linspace(low, high, _BINS + 1)
    counted = {
        name: np.histogram(values[kept], edges)[0].tolist() for name, kept in (("before", before), ("after", after))
    }
    return {"edges": [round(float(edge), 6) for edge in edges], **counted}


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean(dtype=np.float64)), 4) if len(values) else None


# ---------------------------------------------------------------------------------------------------------- the page


def write_datasheet(folder: str | Path, sheet: Mapping[str, Any]) -> None:
    """Write `datasheet.json` and `datasheet.html` into `folder`."""
    write_text(Path(folder) / "datasheet.json", json.dumps(sheet, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(Path(folder) / "datasheet.html", render(sheet))


def render(sheet: Mapping[str, Any]) -> str:
    """The datasheet as one self-contained HTML page. Every text of the pool is escaped."""
    selected = sheet["stages"][-1]["out"]
    matched = [(m["where"], m["problem"], dropped_because(m["items"])) for m in sheet["contamination"]]
    number = sheet["evaluation_problems_matched"]
    verdicts, marks = (
        [(name, counted["before"], counted["after"]) for name, counted in sheet[key].items()]
        for key in ("verified", "marks")
    )
    body = [
        f"<h1>{selected:,} traces of {sheet['stages'][0]['in']:,}</h1>",
        stages_table(sheet),
        remark(_WHICH),
        _picture(_draw_stages, sheet["stages"], "What was dropped, and why"),
        _picture(_draw_domains, sheet["domains"], _domains_title(len(sheet["domains"]))),
        domains_table(sheet["domains"][:_MOST_DRAWN]),
        *(
            _picture(partial(_draw_histogram, label), sheet[name], title)
            for name, title, label in (
                ("difficulty", "Difficulty", "difficulty, 1 the hardest"),
                ("quality", "Quality", "quality"),
                ("log10_characters", "Length of the reasoning", "characters, log10"),
            )
        ),
        *([f"<p>{escape(rates)}.</p>"] if (rates := pass_rates_line(sheet)) else []),
        "<h2>Answers</h2>",
        table(("answer", "before", "after"), verdicts),
        "<h2>Marks of quality, means</h2>",
        table(("mark", "before", "after"), marks),
        f"<h2>Evaluation problems matched: {number:,} of {sheet['evaluation_problems']:,}</h2>",
        *([table(("where", "problem", "items of the pool"), matched)] if matched else []),
        *([remark(f"These {len(matched)} are matched most; dropped.jsonl has all.")] if number > len(matched) else []),
        "<h2>Settings</h2>",
        f"<pre>{escape(json.dumps(sheet['settings'], indent=1, ensure_ascii=False))}</pre>",
    ]
    return page("Datasheet", body)


def pass_rates_line(sheet: Mapping[str, Any]) -> str | None:
    """The number of traces with a known pass rate, as a line of text; None if no pass rates were given."""
    known = sheet.get("pass_rates")
    return known and f"Pass rates for {known['known']:,} of {known['of']:,} traces"


def _picture(draw: Callable[[Axes, Any], None], data: Any, title: str) -> str:
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, data)
    return picture(figure, title)


def _draw_stages(axes: Axes, stages: Sequence[Mapping[str, Any]]) -> None:
    dropped = [(f"{s['stage']}: {reason}", count) for s in stages for reason, count in s["dropped"].items()]
    bars = [*dropped, ("selected", stages[-1]["out"])][::-1]
    names = [plot_label(name) for name, _ in bars]
    drawn = axes.barh(range(len(bars)), [count for _, count in bars], color=[AFTER] + [BEFORE] * len(dropped))
    axes.bar_label(drawn, padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.set(xlabel="items")


def _domains_title(domains: int) -> str:
    title = "Domains before and after"
    return title if domains <= _MOST_DRAWN else f"{title}: the {_MOST_DRAWN} largest of {domains:,}"


def _draw_domains(axes: Axes, domains: Sequence[Mapping[str, Any]]) -> None:
    shown = domains[:_MOST_DRAWN]
    for offset, key, colour in ((-0.2, "eligible", BEFORE), (0.2, "after", AFTER)):
        total = max(1, sum(domain[key] for domain in domains))
        share = [100 * domain[key] / total for domain in shown]
        axes.bar(
            np.arange(len(shown)) + offset, share, width=0.38, color=colour, label="selected" if key == "after" else key
        )
    names = [f"{plot_label(domain['domain'])}\n{domain['after']} of {domain['eligible']}" for domain in shown]
    axes.set_xticks(range(len(shown)), names, rotation=45, ha="right", fontsize=8)
    axes.set(ylabel="share of items (%)")
    axes.legend(frameon=False)


def _draw_histogram(label: str, axes: Axes, histogram: Mapping[str, Any]) -> None:
    for key, colour in (("before", BEFORE), ("after", AFTER)):
        counts = np.array(histogram[key], dtype=float)
        shares = 100 * counts / max(1.0, counts.sum())
        axes.stairs(shares, histogram["edges"], color=colour, fill=True, alpha=0.6, label=key)
    axes.set(xlabel=label, ylabel="share of items (%)")
    axes.legend(frameon=False)
