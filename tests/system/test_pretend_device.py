"""Every job of the command line runs where the model is, on a device that is not the CPU.

The device is a pretend one (tests/support/pretend_device): it computes on the CPU, and what mixes it with the CPU raises
what a GPU raises. So a job gives the numbers of the CPU there, or fails.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_device import jobs
from real_inputs import ROOT
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

WORKER = ROOT / "tests" / "support" / "pretend_device" / "jobs.py"
TRAININGS = ("text", "signals", "teacher", "gradient", "factored", "activation", "cut", "whole")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the jobs run in forks"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="the pretend device is compiled, and there is no compiler"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def ended(folder):
    """By job its exit code and what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("LOCAL_RANK", None)
    found = subprocess.run([sys.executable, str(WORKER), str(folder)], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("job", jobs.JOBS)
def test_the_job_ends_well(ended, job):
    assert ended[job]["code"] == 0, ended[job]["said"]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("job", TRAININGS)
def test_training_changes_the_adapter(ended, folder, job):
    assert all(tensor.abs().max() > 0 for name, tensor in trained(folder / job).items() if name.endswith(".B"))


def test_training_gives_the_adapter_of_the_cpu(ended, folder):
    expected = trained(folder / "text-cpu")
    for name, tensor in trained(folder / "text").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_interrupted_run_resumes_bitwise(ended, folder):
    assert json.loads((folder / "cut" / "run.json").read_text())["resumed"]
    whole = trained(folder / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in trained(folder / "cut").items())


def test_scores_are_those_of_the_cpu(ended, folder):
    shards = [load_arrays(folder / job / "signals" / "signals-00000.safetensors") for job in ("teach", "teach-cpu")]
    assert np.array_equal(shards[0]["keys"], shards[1]["keys"])
    assert np.array_equal(shards[0]["rows"], shards[1]["rows"])
    np.testing.assert_allclose(shards[0]["logprobs"], shards[1]["logprobs"], atol=1e-5)


def test_placements_differ(ended, folder):
    name = next(name for name in trained(folder / "text") if name.endswith(".cols"))
    assert not torch.equal(trained(folder / "text")[name], trained(folder / "gradient")[name])


def test_merged_and_exported_files_are_written(ended, folder):
    assert (folder / "merge" / "model.safetensors").exists()
    assert (folder / "export-lora" / "adapter_model.safetensors").exists()
    assert "Report of " in (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert (folder / "demo" / "summary.json").exists()
