"""The progress bar of a training."""

import sys

from transformers import TrainerCallback

from rbfast.utils.progress import bar


class TrainingBar(TrainerCallback):
    """A progress bar on stderr, with the loss of each role and of held-out traces.

    Prints the step at which a run resumes.
    Always close it, even after a failure: a running bar hides the terminal's cursor and redraws itself.
    """

    def __init__(self, quiet: bool) -> None:
        self.bar = bar("training", quiet)
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step:
            self.print(f"resuming at step {state.global_step} of {state.max_steps}")
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        logs = logs or {}
        self.shown |= {name[5:]: value for name, value in logs.items() if name.startswith("loss_")}
        self.shown |= {"held-out": logs["eval_loss"]} if "eval_loss" in logs else {}
        losses = [f"{name} {value:.3f}" for name, value in self.shown.items()]
        # Two per line: four do not fit beside the bar in a terminal of 80 columns.
        lines = "\n".join("  ".join(losses[i : i + 2]) for i in range(0, len(losses), 2))
        self.bar.update(self.task, completed=state.global_step, description=lines)

    def show(self, text: str) -> None:
        """Shows a text beside the bar, until the next losses."""
        self.bar.update(self.task, description=text)

    def print(self, line: str) -> None:
        """Prints a line above the bar, unless it is quiet."""
        if not self.bar.disable:
            print(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.stop()
