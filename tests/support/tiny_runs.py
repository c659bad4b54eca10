"""Runs of `distill` on a tiny model, which a simulated power failure may interrupt."""

from tiny_models import llama
from tiny_tokenizers import byte_level
from transformers import TrainerCallback

from rbfast.data.trace import Trace
from rbfast.training.distill import DistillConfig, distill
from rbfast.training.trainer import DistillTrainer

TRACES = [Trace(f"What is {n} + 1?", f"Add one.\n{n} + 1 = {n + 1}", str(n + 1)) for n in range(24)]
TOKENIZER = byte_level(*(trace.completion() for trace in TRACES))

RUN_ARGUMENTS = "adapter", "held_out", "keep_best", "report_to"  # of `distill`, besides the config


class PowerCut(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def student():
    return llama(vocab_size=len(TOKENIZER), max_position_embeddings=256)


def run(folder, monkeypatch, cut_at=None, model=None, **settings):
    with monkeypatch.context() as patch:
        if cut_at is not None:
            start = DistillTrainer.__init__

            def begin(self, *args, **kwargs):
                start(self, *args, **kwargs)
                self.add_callback(PowerCut(cut_at))

            patch.setattr(DistillTrainer, "__init__", begin)
        arguments = {name: settings.pop(name) for name in RUN_ARGUMENTS if name in settings}
        shape = {} if "adapter" in arguments else dict(density=0.2, rank=3)
        config = DistillConfig(**dict(save_steps=2, batch_size=4, learning_rate=1e-2) | shape | settings)
        found = distill(model or student(), TOKENIZER, TRACES, folder, config, quiet=True, **arguments)
        return found.adapter.state_dict()
