"""Plots of a run: losses by role, placement of the trained columns, accuracy before and after, accuracy by budget.

```python
save(draw_losses(trainer.state.log_history), "losses.png")
draw_placement({"model.layers.0.self_attn.q_proj": {"columns": 17, "values": 9792, "in": 576}})
draw_accuracy([{"family": "gcd", "before": 0.1, "after": 0.5, "ci_low": 0.2, "ci_high": 0.6, "n": 40}])
```
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rbfast.data.spans import ROLES
from rbfast.evaluation.statistics import Interval, proportion
from rbfast.utils.files import atomic_write

# Okabe and Ito's palette, which is safe for colour-blind readers.
_COLOURS = dict(zip(ROLES, ("#0072B2", "#D55E00", "#009E73"), strict=True))
BEFORE, AFTER = "#999999", "#0072B2"
_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_WIDEST = 24.0  # inches


def draw_losses(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Curves of `loss_strategic`, `loss_tactical` and `loss_answer` against `step`, with a running mean; those of
    held-out traces (`eval_loss_strategic` and so on) are dashed.

    Raises:
        ValueError: no record has a role's loss.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for role, colour in _COLOURS.items():
        steps, losses = _points(log_history, f"loss_{role}")
        if not len(steps):
            continue
        reach = len(losses) // 30
        smooth = [losses[max(0, i - reach) : i + reach + 1].mean() for i in range(len(losses))]
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        dot = "o" if len(losses) == 1 else None  # a line through one point is invisible
        axes.plot(steps, smooth, color=colour, linewidth=2, marker=dot, label=f"{role} (now {smooth[-1]:.3f})")
        steps, losses = _points(log_history, f"eval_loss_{role}")
        if len(steps):
            label = f"{role}, held out (now {losses[-1]:.3f})"
            axes.plot(steps, losses, color=colour, linewidth=1.5, linestyle="--", marker="s", markersize=4, label=label)
    if not axes.lines:
        raise ValueError(
            f"expected loss_strategic, loss_tactical or loss_answer in {len(log_history)} log records, got none"
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Training loss by role", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """The steps and the values of one quantity in a log, [2, n]."""
    points = [(log["step"], log[name]) for log in log_history if name in log]
    return np.array(points, dtype=float).reshape(-1, 2).T


def draw_placement(modules: Mapping[str, Mapping[str, float]]) -> Figure:
    """A heat map of the share of input columns that each matrix trains, layers by matrices.

    Args:
        modules: by module name, the number of trained `columns`, of all columns `in`, and of trained `values`. The
            first number in a name is its layer.

    Raises:
        ValueError: no module.
    """
    if not modules:
        raise ValueError("expected at least one module, got none")
    share, layers, kinds = _by_layer_and_kind({name: 100 * m["columns"] / m["in"] for name, m in modules.items()})
    values = np.nan_to_num(_by_layer_and_kind({name: m["values"] for name, m in modules.items()})[0])

    figure = _map_figure(len(layers), len(kinds), 2.6)
    grid = figure.add_gridspec(2, 2, width_ratios=[4, 1.1], height_ratios=[1, max(3.0, len(layers) / 5)])
    axes = figure.add_subplot(grid[1, 0])
    image = axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    _name_ticks(axes, layers, kinds)
    figure.colorbar(image, ax=axes, location="bottom", label="trained input columns (%), blank: none", aspect=40)
    by_kind = figure.add_subplot(grid[0, 0], sharex=axes)
    by_kind.bar(range(len(kinds)), values.sum(0) / 1000, color=AFTER)
    by_kind.tick_params(labelbottom=False)
    by_kind.set(ylabel="values\n(thousand)", title=f"Where the {values.sum():,.0f} trained values went")
    by_layer = figure.add_subplot(grid[1, 1], sharey=axes)
    by_layer.barh(range(len(layers)), values.sum(1) / 1000, color=AFTER)
    by_layer.tick_params(labelleft=False)
    by_layer.set(xlabel="values\n(thousand)")
    return figure


def draw_scores(scores: Mapping[str, float]) -> Figure:
    """A heat map of the score of each matrix's chosen columns, layers by matrices.

    Raises:
        ValueError: no score is above 0.
    """
    drawn = {name: score for name, score in scores.items() if 0 < score < np.inf}
    if not drawn:
        raise ValueError(f"expected a score above 0, got none among {len(scores)}")
    score, layers, kinds = _by_layer_and_kind(drawn)
    figure = _map_figure(len(layers), len(kinds), 1.2)
    axes = figure.add_subplot(title="Score of the chosen columns")
    image = axes.imshow(score, aspect="auto", cmap="viridis", norm=LogNorm(), interpolation="nearest")
    _name_ticks(axes, layers, kinds)
    figure.colorbar(image, ax=axes, location="bottom", label="sum over a matrix, log scale; blank: none", aspect=40)
    return figure


def _by_layer_and_kind(values: Mapping[str, float]) -> tuple[np.ndarray, list[int], list[str]]:
    """Values as an array [layers, kinds], NaN for a missing matrix; the layers; the kinds."""
    placed = {name: _layer_and_kind(name) for name in values}
    layers = sorted({layer for layer, _ in placed.values()})
    kinds = list(dict.fromkeys(kind for _, kind in placed.values()))
    grid = np.full((len(layers), len(kinds)), np.nan)
    for name, (layer, kind) in placed.items():
        grid[layers.index(layer), kinds.index(kind)] = values[name]
    return grid, layers, kinds


def _map_figure(layers: int, kinds: int, beside: float) -> Figure:
    """A figure sized for a heat map of layers x kinds cells, plus `beside` inches of width."""
    width, height = max(5.0, 1.1 * kinds + beside), max(3.2, 0.21 * layers + 2.4)
    return Figure(figsize=(min(width, _WIDEST), min(height, _WIDEST)), layout="constrained")


def _name_ticks(axes: Axes, layers: Sequence[int], kinds: Sequence[str]) -> None:
    axes.set_xticks(range(len(kinds)), [plot_label(kind.rpartition(".")[2]) for kind in kinds], rotation=30, ha="right")
    ticks = range(0, len(layers), max(1, len(layers) // 10))
    axes.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.set(ylabel="layer")


def _layer_and_kind(name: str) -> tuple[int, str]:
    """`model.layers.3.mlp.up_proj` is layer 3, `model.layers.mlp.up_proj`; a name without a number is layer -1."""
    match = _NUMBERED.match(name)
    return (int(match[2]), f"{match[1]}.{match[3]}") if match else (-1, name)


def draw_accuracy(families: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars before and after by family, with Wilson intervals; above them the paired gain with its interval.

    Args:
        families: rows with `family`, `before`, `after` (shares), `ci_low`, `ci_high` (of the paired gain) and `n`.

    Raises:
        ValueError: no family.
    """
    if not families:
        raise ValueError("expected at least one family, got none")
    figure = Figure(figsize=(min(max(5.0, 1.25 * len(families) + 1.5), _WIDEST), 4.6), layout="constrained")
    axes = figure.add_subplot()
    for offset, key, colour in ((-0.2, "before", BEFORE), (0.2, "after", AFTER)):
        bounds = [_interval(row[key], row["n"]) for row in families]
        heights = np.array([100 * row[key] for row in families])
        errors = np.abs(100 * np.array(bounds).T - heights)
        places = np.arange(len(families)) + offset
        axes.bar(places, heights, width=0.38, color=colour, label=key, yerr=errors, capsize=3, error_kw={"lw": 1})
    for x, row in enumerate(families):
        gain, low, high = (100 * value for value in (row["after"] - row["before"], row["ci_low"], row["ci_high"]))
        top = 100 * max(_interval(row[key], row["n"])[1] for key in ("before", "after"))
        axes.text(x, top + 1.5, f"{gain:+.0f}\n[{low:+.0f}, {high:+.0f}]", ha="center", va="bottom", fontsize=8)
    names = [f"{plot_label(row['family'])}\nn={row['n']}" for row in families]
    axes.set_xticks(range(len(families)), names, rotation=20, ha="right")
    axes.set(ylabel="solved (%)", ylim=(0, 118), title="Held-out accuracy before and after, 95% intervals")
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)  # inside the axes it could hide a gain near 100%
    return figure


def _interval(share: float, n: int) -> tuple[float, float]:
    solved = round(share * n)
    interval = proportion([1.0] * solved + [0.0] * (n - solved))
    return interval.low, interval.high


def draw_budgets(curves: Mapping[str, Mapping[int, Interval]]) -> Figure:
    """The share solved by token budget, one line with a 95% band for each of `before` and `after`.

    Args:
        curves: for each side, by budget in tokens, the share solved with its interval.

    Raises:
        ValueError: no budget.
    """
    if not any(curves.values()):
        raise ValueError("expected at least one budget, got none")
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for side, points in curves.items():
        budgets, colour = sorted(points), {"before": BEFORE, "after": AFTER}[side]
        means, lows, highs = (
            [100 * getattr(points[budget], part) for budget in budgets] for part in ("mean", "low", "high")
        )
        axes.plot(budgets, means, color=colour, linewidth=2, marker="o", markersize=3, label=side)
        axes.fill_between(budgets, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="token budget", ylabel="solved (%)", ylim=(0, None), title="Accuracy by budget")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_label(name: str) -> str:
    """A name for matplotlib: dollar signs escaped, on one line, at most 60 characters."""
    name = " ".join(name.split()).encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")
    return name if len(name) <= 60 else name[:57] + "..."


def print_png(figure: Figure, file: IO[bytes]) -> None:
    """Writes a figure to an open file. Matplotlib's own font lacks most scripts: it draws other letters as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(file)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as a PNG file, atomically."""
    with atomic_write(path) as file:
        print_png(figure, file)
