"""Two processes on a CPU train what one does on the same global batch, and resume what they or one began."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("distributed_worker.py")
STEPS = 6  # 24 traces in global batches of 4


def run(processes, out, stop_at=None, **settings):
    command = [sys.executable, str(WORKER)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, str(WORKER)]
    command += [str(out), json.dumps(settings)] + ([] if stop_at is None else [str(stop_at)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def trained(folder):
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "log.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    found = run(1, out, batch_size=4, placement="random")
    assert found.returncode == 0, found.stderr
    return trained(out)


def check_close(found, expected):
    """The sums of two processes are added in another order: equal within fp32 rounding, and no further."""
    (tensors, log), (reference, log_alone) = found, expected
    assert len(log) == len(log_alone) == STEPS
    for entry, other in zip(log, log_alone, strict=True):
        for name in ("loss", "loss_strategic", "loss_tactical", "loss_answer"):
            assert entry[name] == pytest.approx(other[name], rel=1e-4), name
    for name, tensor in reference.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(tensors[name], tensor), name


def test_two_processes_train_what_one_does(tmp_path, alone):
    found = run(2, tmp_path, batch_size=2, placement="random")
    assert found.returncode == 0, found.stderr
    check_close(trained(tmp_path), alone)
    assert not (tmp_path / "checkpoints").exists()


def test_accumulation_and_processes_multiply(tmp_path, alone):
    found = run(2, tmp_path, batch_size=1, accumulation=2, placement="random")
    assert found.returncode == 0, found.stderr
    check_close(trained(tmp_path), alone)


def test_two_processes_resume_what_was_cut_to_the_same_bits(tmp_path):
    whole = run(2, tmp_path / "whole", batch_size=2, save_steps=2)
    assert whole.returncode == 0, whole.stderr
    cut = run(2, tmp_path / "cut", stop_at=5, batch_size=2, save_steps=2)
    assert cut.returncode != 0 and "power cut" in cut.stderr
    checkpoint = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    again = run(2, tmp_path / "cut", batch_size=2, save_steps=2)
    assert again.returncode == 0, again.stderr
    (tensors, _), (expected, _) = trained(tmp_path / "cut"), trained(tmp_path / "whole")
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
