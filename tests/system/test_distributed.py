"""Two CPU processes match one on the same global batch, also with a sharded base, and each can finish the other's run.

25 traces in global batches of 4: the last batch of an epoch is incomplete.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from distributed_worker import distill_tiny, tokenizer_and_size
from openai_server import serving
from real_inputs import ROOT
from safetensors.torch import load_file
from tiny_models import llama

from rbfast.training.arguments import DeviceArguments

pytestmark = [pytest.mark.slow, pytest.mark.long]

WORKER = ROOT / "tests" / "support" / "distributed_worker.py"
STEPS = 7
HELD_OUT = {"held_out": 0.2, "learning_rate": 0.3}  # 5 traces: the last batch of two processes is incomplete
RANDOM = {"placement": "random"}  # by gradients, the columns follow the batches they were measured on
LARGE = {"taught": True, "untied": True}
ROUNDS = {"rounds": 3, "taught": True} | RANDOM  # 6 problems a round, written 2 at a time

# By folder. Other processes finish the runs whose names begin with "cut".
FIRST = {
    "two": {"batch_size": 2} | RANDOM,
    "two-accumulating": {"batch_size": 1, "accumulation": 2} | RANDOM,
    "whole": {"batch_size": 2},
    "cut-whole": {"batch_size": 2, "stop_at": 5},
    "beside": {"batch_size": 2, "beside": True},
    "sharded": {"batch_size": 2, "over": 2},
    "beside-large": {"batch_size": 2, "beside": True} | LARGE,
    "sharded-large": {"batch_size": 2, "over": 2} | LARGE,
    "cut-two": {"batch_size": 2, "stop_at": 3} | RANDOM,
    "held-out": {"batch_size": 2} | HELD_OUT | RANDOM,
    "held-out-sharded": {"batch_size": 2, "over": 2} | HELD_OUT | RANDOM,
    "rounds": {"batch_size": 2} | ROUNDS,
    "cut-rounds": {"batch_size": 2, "stop_at": 3} | ROUNDS,
}
SECOND = {
    "cut-whole": {"batch_size": 2},
    "cut-rounds": {"batch_size": 2} | ROUNDS,
    "cut-one": {"batch_size": 2, "over": 2} | RANDOM,
    "apart": {"batch_size": 2, "apart": True} | RANDOM,
}


def launch(folder, jobs):
    """Runs jobs in two new processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(WORKER), str(folder), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    launch(folder, FIRST)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    distill_tiny(folder, batch_size=4, **RANDOM)
    return trained(folder)


@pytest.fixture(scope="module")
def second(first):
    """Runs that the first processes and a single process began, continued by two others."""
    for name in ("cut-one", "apart/0"):
        with pytest.raises(RuntimeError, match="power cut"):
            distill_tiny(first / name, stop_at=3, batch_size=4, **RANDOM)
    launch(first, SECOND)
    return first


def trained(folder):
    assert not (folder / "checkpoints").exists(), (folder / "error.txt").read_text()
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "log.json").read_text())


def check_close(found, expected, steps=STEPS):
    """Two processes add sums in another order: the results are equal only within fp32 rounding."""
    (tensors, log), (reference, log_alone) = found, expected
    assert len(log) == len(log_alone) == steps
    for entry, other in zip(log, log_alone, strict=True):
        assert entry.keys() == other.keys()
        for name in (name for name in entry if "loss" in name):
            assert entry[name] == pytest.approx(other[name], rel=1e-5), name
    for name, tensor in reference.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(tensors[name], tensor), name


def check_bits(found, expected):
    (tensors, log), (reference, other_log) = found, expected
    assert tensors.keys() == reference.keys()
    assert all(torch.equal(tensors[name], value) for name, value in reference.items())
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in other_log]


def test_processes_wait_for_each_other_longer_than_by_default(first):
    assert (first / "timeout.txt").read_text() == str(timedelta(seconds=DeviceArguments.ddp_timeout)) == "2:00:00"


@pytest.mark.parametrize("name", ["two", "two-accumulating"])
def test_two_processes_match_one(first, alone, name):
    check_close(trained(first / name), alone)


@pytest.mark.parametrize("name", ["held-out", "held-out-sharded"])
def test_two_processes_match_one_with_held_out_traces(first, tmp_path, name):
    distill_tiny(tmp_path, batch_size=4, **HELD_OUT, **RANDOM)
    check_close(trained(first / name), trained(tmp_path), steps=5 + 4)  # trained, and measured at 0, 2, 4 and 5


@pytest.mark.parametrize("size", ["", "-large"])
def test_sharded_base_matches_the_whole_one_bitwise(first, size):
    """Including the gradients that place the columns, and the base's fingerprints in the adapter's config."""
    check_bits(trained(first / f"sharded{size}"), trained(first / f"beside{size}"))
    written = [(first / f"{name}{size}" / "adapter_config.json").read_bytes() for name in ("sharded", "beside")]
    assert written[0] == written[1]


def test_two_processes_resume_bitwise(second):
    check_bits(trained(second / "cut-whole"), trained(second / "whole"))


def test_two_processes_finish_a_run_of_one_on_a_sharded_base(second, alone):
    check_close(trained(second / "cut-one"), alone)


def test_one_process_finishes_a_run_of_two(first, alone):
    assert (first / "cut-two" / "error.txt").read_text() == "power cut"
    with pytest.raises(ValueError, match="optimizer steps take 4 traces, now they would take 2: batch size 2 x"):
        distill_tiny(first / "cut-two", batch_size=2, **RANDOM)
    distill_tiny(first / "cut-two", batch_size=2, accumulation=2, **RANDOM)
    check_close(trained(first / "cut-two"), alone)


def test_two_processes_match_one_in_on_policy_rounds(first, tmp_path):
    distill_tiny(tmp_path, batch_size=4, **ROUNDS)
    # The students of later rounds differ by rounding, and so may their tokens.
    ones, twos = (folder / "samples/round-001.jsonl" for folder in (tmp_path, first / "rounds"))
    assert twos.read_text() == ones.read_text()
    losses = [[entry["loss"] for entry in trained(folder)[1]] for folder in (tmp_path, first / "rounds")]
    assert len(losses[0]) == len(losses[1]) == 6
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=1e-5)


def test_two_processes_resume_on_policy_rounds_bitwise(second):
    assert (second / "cut-rounds" / "error.txt").read_text() == "power cut"
    check_bits(trained(second / "cut-rounds"), trained(second / "rounds"))
    written = [sorted((second / name / "samples").iterdir()) for name in ("cut-rounds", "rounds")]
    assert [path.read_text() for path in written[0]] == [path.read_text() for path in written[1]]
    assert len(written[0]) == 3


def test_two_processes_share_the_requests_to_a_served_teacher(first, tmp_path):
    tokenizer, size = tokenizer_and_size()
    with serving(llama(**size, num_hidden_layers=3).eval(), tokenizer) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        launch(tmp_path, {"served": {"batch_size": 2, "server": url} | ROUNDS | {"taught": False}})
    prompts = [tuple(request["prompt"]) for request in server.requests]
    assert len(prompts) == 2 + 18  # each process checks the server once; each completion is scored once
    losses = [[entry["loss"] for entry in trained(folder)[1]] for folder in (tmp_path / "served", first / "rounds")]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-3)


def test_processes_with_different_folders_are_refused(second):
    message = (second / "apart" / "1" / "error.txt").read_text()
    assert "is not the same folder for all processes, which find checkpoint-2 and no checkpoint in it" in message
