"""rbfast: move reasoning from a strong teacher into an open model, cheaply and fast.

from rbfast import SparseAdapter, DistillLoss, TopK, Dense
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CurateConfig": "curation.curate",
    "Dense": "loss.teacher_signal",
    "DistillConfig": "training.distill",
    "DistillLoss": "loss.distill_loss",
    "DistillTrainer": "training.trainer",
    "Guide": "inference.guide",
    "Limits": "inference.guide",
    "LocalSolver": "inference.local",
    "Objective": "training.objective",
    "Phrases": "inference.guide",
    "Sampling": "inference.solver",
    "ServerSolver": "inference.remote",
    "SparseAdapter": "adapter.sparse_adapter",
    "TopK": "loss.teacher_signal",
    "Trace": "data.trace",
    "calibrate": "inference.solver",
    "curate": "curation.curate",
    "distill": "training.distill",
    "evaluating": "inference.decoding",
    "guided": "inference.local",
    "load_student": "models.student",
    "read_traces": "data.readers",
    "write_traces": "data.readers",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names are imported at first use, so that the loss alone does not import a trainer."""
    if name in _HOMES:
        return getattr(import_module(f"rbfast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rbfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
