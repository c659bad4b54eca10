"""rbfast: move reasoning from a strong teacher into an open model, cheaply and fast.

from rbfast import SparseAdapter, DistillLoss, TopK, Dense
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see of `_HOMES`
    from rbfast.adapter.sparse_adapter import SparseAdapter as SparseAdapter
    from rbfast.curation.curate import CurateConfig as CurateConfig
    from rbfast.curation.curate import curate as curate
    from rbfast.data.readers import read_traces as read_traces
    from rbfast.data.readers import write_traces as write_traces
    from rbfast.data.trace import Trace as Trace
    from rbfast.inference.decoding import evaluating as evaluating
    from rbfast.inference.guide import Guide as Guide
    from rbfast.inference.guide import Limits as Limits
    from rbfast.inference.guide import Phrases as Phrases
    from rbfast.inference.local import LocalSolver as LocalSolver
    from rbfast.inference.local import guided as guided
    from rbfast.inference.remote import ServerSolver as ServerSolver
    from rbfast.inference.solver import Sampling as Sampling
    from rbfast.inference.solver import calibrate as calibrate
    from rbfast.loss.distill_loss import DistillLoss as DistillLoss
    from rbfast.loss.teacher_signal import Dense as Dense
    from rbfast.loss.teacher_signal import TopK as TopK
    from rbfast.models.student import load_student as load_student
    from rbfast.on_policy.rounds import distill_on_policy as distill_on_policy
    from rbfast.training.distill import distill as distill
    from rbfast.training.distill_config import DistillConfig as DistillConfig
    from rbfast.training.objective import Objective as Objective
    from rbfast.training.trainer import DistillTrainer as DistillTrainer

__version__ = "0.1.0"

_HOMES = {
    "CurateConfig": "curation.curate",
    "Dense": "loss.teacher_signal",
    "DistillConfig": "training.distill_config",
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
    "distill_on_policy": "on_policy.rounds",
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
