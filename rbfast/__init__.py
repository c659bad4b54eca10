"""rbfast: move reasoning from a strong teacher into an open model, cheaply and fast.

from rbfast import SparseAdapter, DistillLoss, TopK, Dense
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "SparseAdapter": "adapter",
    "Dense": "loss",
    "DistillLoss": "loss",
    "TopK": "loss",
    "DistillConfig": "run",
    "distill": "run",
    "evaluating": "generate",
    "DistillTrainer": "trainer",
    "Guide": "guide",
    "guided": "guided_generate",
    "Objective": "trainer",
    "curate": "curation",
    "Trace": "trace",
    "read_traces": "trace",
    "write_traces": "trace",
    "load_student": "models",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names are imported at first use, so that the loss alone does not import a trainer."""
    if name in _HOMES:
        return getattr(import_module(f"rbfast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rbfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
