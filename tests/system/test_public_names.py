"""The names that `from rbfast import ...` offers, and the module that defines each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rbfast

PUBLIC = [
    "CurateConfig",
    "Dense",
    "DistillConfig",
    "DistillLoss",
    "DistillTrainer",
    "Guide",
    "Limits",
    "LocalSolver",
    "Objective",
    "Phrases",
    "Sampling",
    "ServerSolver",
    "SparseAdapter",
    "TopK",
    "Trace",
    "calibrate",
    "curate",
    "distill",
    "distill_on_policy",
    "evaluating",
    "guided",
    "load_student",
    "read_traces",
    "write_traces",
]


def test_public_names():
    assert dir(rbfast) == rbfast.__all__ == PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = rbfast.distil


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_defined_in_its_listed_module(name):
    assert getattr(rbfast, name).__module__ == f"rbfast.{rbfast._HOMES[name]}"


def test_type_checkers_see_the_public_names():
    (block,) = [node for node in ast.parse(Path(rbfast.__file__).read_text()).body if isinstance(node, ast.If)]
    homes = {alias.asname: node.module for node in block.body for alias in node.names}
    assert homes == {name: f"rbfast.{home}" for name, home in rbfast._HOMES.items()}


@pytest.mark.slow
def test_importing_the_loss_does_not_import_the_trainer():
    code = "import sys; from rbfast import DistillLoss; assert 'rbfast.training.trainer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
