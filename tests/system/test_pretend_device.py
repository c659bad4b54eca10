"""Every command runs on the model's device, also if that is not the CPU.

The device is a pretend one (tests/support/pretend_device): it computes on the CPU, and mixing it with the CPU raises
the error of a GPU. So a job matches the CPU's numbers there, or fails. "auto" spreads a model over two devices.
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
from cli_jobs import AFTERWARDS, JOBS
from real_inputs import ROOT
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

WORKER = ROOT / "tests" / "support" / "pretend_device" / "jobs.py"
TRAININGS = ("text", "signals", "teacher", "gradient", "factored", "activation", "cut", "whole")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the jobs run in forks"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for the pretend device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def results(folder):
    """The exit code and the output of each job, by device."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("LOCAL_RANK", None)
    done = subprocess.run([sys.executable, str(WORKER), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("job", [*JOBS, *AFTERWARDS])
@pytest.mark.parametrize("device", ["cpu", "pretend", "auto"])
def test_job_succeeds(results, device, job):
    assert results[device][job]["code"] == 0, results[device][job]["said"]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("job", TRAININGS)
@pytest.mark.parametrize("device", ["pretend", "auto"])
def test_training_matches_the_cpu(results, folder, device, job):
    expected = trained(folder / "cpu" / job)
    for name, tensor in trained(folder / device / job).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert tensor.abs().max() > 0


@pytest.mark.parametrize("device", ["pretend", "auto"])
def test_interrupted_run_resumes_bitwise(results, folder, device):
    assert json.loads((folder / device / "cut" / "run.json").read_text())["resumed"]
    whole = trained(folder / device / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in trained(folder / device / "cut").items())


def test_plan_names_every_device(results, folder):
    plan = json.loads((folder / "auto" / "text" / "run.json").read_text())["plan"]
    assert plan["device"] == "pretend:0, pretend:1"


@pytest.mark.parametrize("device", ["pretend", "auto"])
def test_scores_match_the_cpu(results, folder, device):
    [here], [there] = (
        [load_arrays(shard) for shard in (folder / where / "teach" / "signals").glob("*.safetensors")]
        for where in (device, "cpu")
    )
    assert np.array_equal(here["keys"], there["keys"]) and np.array_equal(here["rows"], there["rows"])
    np.testing.assert_allclose(here["logprobs"], there["logprobs"], atol=1e-5)


def test_random_and_gradient_placements_differ(results, folder):
    random, scored = (trained(folder / "pretend" / job) for job in ("text", "gradient"))
    assert any(not torch.equal(random[name], scored[name]) for name in random if name.endswith(".cols"))


@pytest.mark.parametrize("device", ["cpu", "pretend", "auto"])
def test_jobs_write_their_results(results, folder, device):
    assert json.loads(results[device]["solve"]["said"].splitlines()[-1])["solutions"][0]["tokens"] > 0
    assert len((folder / device / "eval-samples" / "results.jsonl").read_text().splitlines()) == 8
    for name in ("merge/model.safetensors", "export-lora/adapter_model.safetensors", "demo/summary.json"):
        assert (folder / device / name).exists()
    assert "Report of " in (folder / device / "report" / "report.html").read_text(encoding="utf-8")
