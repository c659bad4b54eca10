"""The plots of a report: complete and reproducible pictures, and what each one draws."""

import matplotlib.image
import pytest

from rbfast.evaluation.statistics import Interval
from rbfast.report import plots

LOGS = [{"step": step, "loss_strategic": 1 / step, "loss_tactical": 2 / step} for step in range(1, 30)] + [
    {"eval_loss": 1}
]
MODULES = {
    f"model.layers.{layer}.{kind}": {"columns": layer, "values": 10 * layer, "in": 64, "score": 0.1}
    for layer in range(12)
    for kind in ("self_attn.q_proj", "mlp.down_proj")
}
ROWS = [
    {"family": "gcd", "before": 0.1, "after": 0.5, "ci_low": 0.2, "ci_high": 0.6, "n": 40},
    {"family": "chain_sum", "before": 0.0, "after": 1.0, "ci_low": 0.8, "ci_high": 1.0, "n": 1},
]
SCORES = {name: 0.1 * number for number, name in enumerate(MODULES)}
DRAW = [(plots.draw_losses, LOGS), (plots.draw_placement, MODULES), (plots.draw_accuracy, ROWS)]


@pytest.mark.parametrize(("draw", "data"), DRAW)
def test_pictures_are_written_completely(draw, data, tmp_path):
    plots.save(draw(data), tmp_path / "picture.png")
    picture = matplotlib.image.imread(tmp_path / "picture.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 400 and picture[..., :3].std() > 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(("draw", "data"), DRAW)
def test_pictures_are_reproducible(draw, data, tmp_path):
    plots.save(draw(data), tmp_path / "one.png")
    plots.save(draw(data), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def full_disk(self, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_png", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plots.save(plots.draw_accuracy(ROWS), path)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_losses_of_a_short_run_have_ticks_at_whole_steps(steps):
    axes = plots.draw_losses([{"step": step, "loss_tactical": 1.0} for step in range(1, steps + 1)]).axes[0]
    assert all(tick == round(tick) for tick in axes.get_xticks())
    assert axes.lines[-1].get_marker() == ("o" if steps == 1 else "None")


def test_losses_of_held_out_traces_are_dashed_beside_training_losses():
    logs = [{"step": step, "eval_loss": 1.0, "eval_loss_tactical": 3.0 - step} for step in (0, 2)]
    axes = plots.draw_losses([*logs[:1], {"step": 1, "loss_tactical": 2.0}, *logs[1:]]).axes[0]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_label() for line in dashed] == ["tactical, held out (now 1.000)"]
    assert dashed[0].get_xydata().tolist() == [[0, 3], [2, 1]] and len(axes.lines) == 3


def test_running_mean_is_centred():
    log = [{"step": step, "loss_answer": 5.0 * (step == 30)} for step in range(61)]
    _, smooth = plots.draw_losses(log).axes[0].lines
    assert {step: loss for step, loss in smooth.get_xydata().tolist() if loss} == dict.fromkeys(range(28, 33), 1.0)


def test_columns_are_drawn_in_percent_by_layer():
    matrix = {"columns": 16, "in": 64, "values": 100}
    figure = plots.draw_placement({"layers.8.up": matrix | {"columns": 0}, "layers.1.up": matrix})
    [image] = [image for axes in figure.axes for image in axes.images]
    assert image.get_array().tolist() == [[25], [0]]


def test_only_scores_above_zero_are_drawn():
    figure = plots.draw_scores({**SCORES, "model.layers.12.self_attn.q_proj": float("nan")})
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == (12, 2) and drawn.mask.sum() == 1  # the first score is 0
    with pytest.raises(ValueError, match="expected a score above 0, got none among 1"):
        plots.draw_scores({"head": 0.0})


def test_budgets_are_drawn_for_each_side():
    share = Interval(0.5, 0.25, 0.75)
    axes = plots.draw_budgets({"before": {64: share}, "after": {128: share, 64: share}}).axes[0]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[64], [64, 128]]
    assert axes.lines[1].get_ydata().tolist() == [50, 50]
    with pytest.raises(ValueError, match="at least one budget"):
        plots.draw_budgets({"before": {}})


def test_legend_does_not_cover_the_gains():
    solved = {"before": 0.9, "after": 1.0, "ci_low": 0.0, "ci_high": 0.2, "n": 40}
    figure = plots.draw_accuracy([solved | {"family": name} for name in "abc"])
    plots.FigureCanvasAgg(figure).draw()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    gains = [text.get_window_extent() for text in figure.axes[0].texts]
    assert legends and len(gains) == 3
    assert not any(legend.get_window_extent().overlaps(gain) for legend in legends for gain in gains)


def test_plot_labels_are_escaped_and_shortened():
    assert plots.plot_label("a\n$x$ \ud83d") == r"a \$x\$ ?"
    assert len(plots.plot_label("x" * 100)) == 60


def test_modules_are_placed_by_their_first_number():
    assert plots._layer_and_kind("model.layers.3.mlp.experts.7.up") == (3, "model.layers.mlp.experts.7.up")
    assert plots._layer_and_kind("head") == (-1, "head")


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match=r"expected loss_strategic, .* in 1 log records, got none"):
        plots.draw_losses([{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="at least one module"):
        plots.draw_placement({})
    with pytest.raises(ValueError, match="at least one family"):
        plots.draw_accuracy([])
