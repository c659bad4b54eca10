"""The bar of a training."""

from types import SimpleNamespace

import pytest

from rbfast.training.training_bar import TrainingBar


def test_a_terminal_of_80_columns_shows_the_counts_the_times_and_every_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown, state = TrainingBar(quiet=False), SimpleNamespace(global_step=0, max_steps=12345)
    shown.on_train_begin(None, state, None)
    state.global_step = 12345
    losses = {"loss_strategic": 5.531, "loss_tactical": 5.559, "loss_answer": 5.539, "eval_loss": 5.548}
    shown.on_log(None, state, None, logs=losses)
    shown.close()
    said = capsys.readouterr().err
    for part in ("12345/12345 0:00:0", "strategic 5.531", "tactical 5.559", "answer 5.539", "held-out 5.548"):
        assert part in said
    assert "…" not in said
