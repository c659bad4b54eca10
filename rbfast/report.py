"""Pictures of a run: loss curves by role, where the budget went, accuracy before and after.

```python
plot_losses(trainer.state.log_history, "losses.png")
plot_placement({"model.layers.0.self_attn.q_proj": {"columns": 17, "values": 9792, "in": 576}}, "placement.png")
plot_accuracy([{"family": "gcd", "before": 0.1, "after": 0.5, "ci_low": 0.2, "ci_high": 0.6, "n": 40}], "accuracy.png")
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rbfast.evaluate import proportion
from rbfast.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = {"strategic": "#0072B2", "tactical": "#D55E00", "answer": "#009E73"}
_BEFORE, _AFTER = "#999999", "#0072B2"
_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")


def plot_losses(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Curves of `loss_strategic`, `loss_tactical` and `loss_answer` against `step`, with a running mean.

    Raises:
        ValueError: no record carries a role's loss.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for role, colour in _COLOURS.items():
        points = [(log["step"], log[f"loss_{role}"]) for log in log_history if f"loss_{role}" in log]
        if not points:
            continue
        steps, losses = np.array(points, dtype=float).T
        reach = len(losses) // 30
        smooth = [losses[max(0, i - reach) : i + reach + 1].mean() for i in range(len(losses))]
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{role} (now {smooth[-1]:.3f})")
    if not axes.lines:
        raise ValueError(
            f"expected loss_strategic, loss_tactical or loss_answer in {len(log_history)} log records, got none"
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Training loss by role", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_placement(modules: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """A map, layers down and matrices across, of the share of input columns that each matrix trains.

    Args:
        modules: by module name, `columns` trained, of `in` there are, holding `values` trained values. The first number
            in a name is its layer.
    """
    if not modules:
        raise ValueError("expected at least one module, got none")
    placed = {name: _layer_and_kind(name) for name in modules}
    layers = sorted({layer for layer, _ in placed.values()})
    kinds = list(dict.fromkeys(kind for _, kind in placed.values()))
    share = np.full((len(layers), len(kinds)), np.nan)
    values = np.zeros_like(share)
    for name, (layer, kind) in placed.items():
        row, column = layers.index(layer), kinds.index(kind)
        share[row, column] = modules[name]["columns"] / modules[name]["in"]
        values[row, column] = modules[name]["values"]

    figure = Figure(
        figsize=(max(5.0, 1.1 * len(kinds) + 2.6), max(3.2, 0.21 * len(layers) + 2.4)), layout="constrained"
    )
    grid = figure.add_gridspec(2, 2, width_ratios=[4, 1.1], height_ratios=[1, max(3.0, len(layers) / 5)])
    axes = figure.add_subplot(grid[1, 0])
    image = axes.imshow(100 * share, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_xticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds], rotation=30, ha="right")
    ticks = range(0, len(layers), max(1, len(layers) // 10))
    axes.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.set(ylabel="layer")
    figure.colorbar(image, ax=axes, location="bottom", label="trained input columns (%), blank: none", aspect=40)
    by_kind = figure.add_subplot(grid[0, 0], sharex=axes)
    by_kind.bar(range(len(kinds)), values.sum(0) / 1000, color=_AFTER)
    by_kind.tick_params(labelbottom=False)
    by_kind.set(ylabel="values\n(thousand)", title=f"Where the {values.sum():,.0f} trained values went")
    by_layer = figure.add_subplot(grid[1, 1], sharey=axes)
    by_layer.barh(range(len(layers)), values.sum(1) / 1000, color=_AFTER)
    by_layer.tick_params(labelleft=False)
    by_layer.set(xlabel="values\n(thousand)")
    _save(figure, path)


def _layer_and_kind(name: str) -> tuple[int, str]:
    """`model.layers.3.mlp.up_proj` is layer 3, `model.layers.mlp.up_proj`; a name without a number is layer -1."""
    match = _NUMBERED.match(name)
    return (int(match[2]), f"{match[1]}.{match[3]}") if match else (-1, name)


def plot_accuracy(families: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Bars before and after by family, each with its Wilson interval; the paired gain with its interval above them.

    Args:
        families: rows with `family`, `before`, `after` (shares), `ci_low`, `ci_high` (of the paired gain) and `n`.
    """
    if not families:
        raise ValueError("expected at least one family, got none")
    figure = Figure(figsize=(max(5.0, 1.25 * len(families) + 1.5), 4.6), layout="constrained")
    axes = figure.add_subplot()
    for offset, key, colour in ((-0.2, "before", _BEFORE), (0.2, "after", _AFTER)):
        bounds = [_interval(row[key], row["n"]) for row in families]
        heights = np.array([100 * row[key] for row in families])
        errors = np.abs(100 * np.array(bounds).T - heights)
        places = np.arange(len(families)) + offset
        axes.bar(places, heights, width=0.38, color=colour, label=key, yerr=errors, capsize=3, error_kw={"lw": 1})
    for place, row in enumerate(families):
        gain, low, high = (100 * value for value in (row["after"] - row["before"], row["ci_low"], row["ci_high"]))
        top = 100 * max(_interval(row[key], row["n"])[1] for key in ("before", "after"))
        axes.text(place, top + 1.5, f"{gain:+.0f}\n[{low:+.0f}, {high:+.0f}]", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(
        range(len(families)), [f"{row['family']}\nn={row['n']}" for row in families], rotation=20, ha="right"
    )
    axes.set(ylabel="solved (%)", ylim=(0, 118), title="Held-out accuracy before and after, 95% intervals")
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left", ncols=2)
    _save(figure, path)


def _interval(share: float, n: int) -> tuple[float, float]:
    solved = round(share * n)
    interval = proportion([1.0] * solved + [0.0] * (n - solved))
    return interval.low, interval.high


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)
