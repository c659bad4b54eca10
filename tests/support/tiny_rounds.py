"""On-policy rounds of a tiny model, which a simulated power failure may interrupt."""

from dataclasses import replace

import torch
from tiny_runs import TOKENIZER, TRACES, PowerCut, student

from rbfast.on_policy import rounds as module
from rbfast.on_policy.rounds import DEFAULTS, distill_on_policy
from rbfast.on_policy.samples import Writing
from rbfast.teacher.jobs import Question

QUESTIONS = [Question(trace.problem) for trace in TRACES[:12]]
WRITING = Writing(max_new_tokens=6, batch_size=5)
CONFIG = replace(DEFAULTS, density=0.2, rank=3, batch_size=2, save_steps=1, learning_rate=3e-2, instruction="none")


def teacher():
    torch.manual_seed(5)
    model = student()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def run(folder, monkeypatch=None, cut_at=None, model=None, **settings):
    names = "rounds", "writing", "adapter", "questions", "teacher"
    arguments = dict(rounds=3, writing=WRITING, teacher=None) | {
        name: settings.pop(name) for name in names if name in settings
    }
    arguments["teacher"] = arguments["teacher"] or teacher()
    questions = arguments.pop("questions", QUESTIONS)
    if cut_at is not None:
        monkeypatch.setattr(module, "_RoundStarter", cut_starter(cut_at))
    try:
        config = replace(CONFIG, **settings)
        return distill_on_policy(model or student(), TOKENIZER, questions, folder, config, True, **arguments)
    finally:
        if monkeypatch is not None:
            monkeypatch.undo()


def cut_starter(step):
    class Cut(module._RoundStarter, PowerCut):
        def __init__(self, rounds, progress):
            super().__init__(rounds, progress)
            self.step = step

    return Cut


def read_samples(folder):
    return {path.name: path.read_text() for path in sorted((folder / "samples").glob("*.jsonl"))}
