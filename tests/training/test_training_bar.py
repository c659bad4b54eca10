"""The progress bar of training."""

from types import SimpleNamespace

import pytest

from rbfast.training.training_bar import TrainingBar


def test_80_columns_show_the_counts_the_time_and_every_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bar, state = TrainingBar(quiet=False), SimpleNamespace(global_step=0, max_steps=12345)
    bar.on_train_begin(None, state, None)
    state.global_step = 12345
    losses = {"loss_strategic": 5.531, "loss_tactical": 5.559, "loss_answer": 5.539, "eval_loss": 5.548}
    bar.on_log(None, state, None, logs=losses)
    bar.close()
    output = capsys.readouterr().err
    for part in ("12345/12345 0:00:0", "strategic 5.531", "tactical 5.559", "answer 5.539", "held-out 5.548"):
        assert part in output
    assert "…" not in output
