"""How the benchmarks measure: alternating rounds, waits, bars, and the page of GPU results."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import gpu_page
import profiling
import pytest
import registry
import torch
from harness import absent, clock_for, host_waits, in_turn, race
from registry import Bar, Case, Contest, Place

ROOT = Path(__file__).resolve().parents[2]


def test_every_contestant_takes_a_turn_in_every_round() -> None:
    order: list[str] = []
    results = race({who: partial(order.append, who) for who in "ab"}, 3, clock_for("cpu"), "cpu")
    assert order[:4] == ["a", "a", "b", "b"]  # warm-up
    assert order[4:10] == ["a", "b", "b", "a", "a", "b"]  # reversed in every second round
    assert all(len(entry["seconds"]) == 3 for entry in results.values())


def test_step_may_return_its_time_and_a_failed_one_its_reason() -> None:
    results = race({"rbfast": lambda: 0.25, "theirs": absent(ValueError("no"))}, 2, clock_for("cpu"), "cpu")
    assert results["rbfast"]["seconds"] == [0.25, 0.25]
    assert results["theirs"] == {"missing": "ValueError: no"}


def test_inputs_cycle() -> None:
    seen: list[int] = []
    step = in_turn([partial(seen.append, i) for i in range(3)])
    for _ in range(4):
        step()
    assert seen == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("step", "waits"),
    [
        (lambda x: x + 1, 0),
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.arange(2)], 0),
        (lambda x: torch.equal(x, x), 1),
    ],
)
def test_waits_are_counted(step, waits: int) -> None:
    assert host_waits(partial(step, torch.ones(3)), "cpu") == waits


def test_bars_are_judged_by_the_median_of_the_rounds() -> None:
    results = {
        "frozen": {"seconds": [1.0, 1.0, 2.0]},
        "rbfast": {"seconds": [1.1, 1.2, 2.0], "extra_mib": 2000.0, "waits": 3},
        "LoRA": {"seconds": [2.0, 2.0, 5.0]},
        "absent": {"missing": "not installed"},
    }
    for bar, value, passes in [
        (Bar("rbfast ms", "<=", 1200.5), 1200.0, True),
        (Bar("rbfast GB", "<=", 2.0), 2000 * 2**20 / 1e9, False),
        (Bar("rbfast waits", "<=", 2), 3, False),
        (Bar("rbfast / frozen", "<=", 1.1), 1.1, True),
        (Bar("LoRA - frozen / rbfast - frozen", ">=", 5.5), 10.0, True),
        (Bar("absent / rbfast", ">=", 1.0), None, None),
        (Bar("error %", "<=", 0.3), 0.2, True),
    ]:
        judged = bar.judge(results, {"error %": 0.2})
        assert judged == (None if value is None else pytest.approx(value), passes)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_has_a_unique_name_and_a_known_group(device: str) -> None:
    cases = registry.cases(device)
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.group for case in cases} <= set(registry.GROUPS)


@pytest.mark.parametrize(
    ("device", "is_toy", "place"),
    [("cpu", False, Place("cpu")), ("cpu", True, Place("cpu", True)), ("cuda", True, Place("cpu", True))],
)
def test_case_is_profiled_in_the_requested_size(monkeypatch, capsys, device: str, is_toy: bool, place: Place) -> None:
    places: list[Place] = []

    def make(at: Place) -> Contest:
        places.append(at)
        return Contest("a sum", {"rbfast": lambda: torch.ones(9).sum().item()})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(profiling, "cases", lambda device: [Case("loss", "top-k, 7B", make), Case("fold", "7B", make)])
    assert profiling.main(["Top-K, 7b"], device, is_toy, 3) == 0
    assert places == [place]
    assert "ops, the first 3:" in capsys.readouterr().out
    assert profiling.main([], device, is_toy, None) == 0
    assert len(places) == 3


def test_full_size_gpu_case_needs_a_gpu_to_profile(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profiling.main(["four 7B"], "cuda", False, 3) == 2
    assert "no GPU: use --toy" in capsys.readouterr().out


def test_record_becomes_a_page_and_a_short_table(tmp_path: Path, capsys) -> None:
    entry = {
        "case": "loss-a",
        "group": "loss",
        "title": "loss, T=4",
        "values": {},
        "bars": [{"bar": "rbfast ms <= 1", "value": 2.0, "passes": False}],
        "who": {
            "floor": {"seconds": [0.001, 0.001, 0.001], "note": ""},
            "rbfast": {"seconds": [0.002, 0.002, 0.003], "note": "", "waits": 2, "extra_mib": 1000.0},
            "theirs": {"seconds": [0.004, 0.004, 0.004], "note": "whole logits"},
            "absent": {"missing": "x is not installed", "note": ""},
        },
        "versions": {"torch": "2"},
    }
    failed = {"case": "loss-b", "group": "loss", "failed": "RuntimeError: no"}
    record = tmp_path / "cases.jsonl"
    record.write_text("".join(json.dumps(line) + "\n" for line in [entry, failed] * 20))
    (tmp_path / "gpu.md").write_text(
        "# On a GPU\n\nA note.\n\n<!-- measured -->\nstale\n<!-- /measured -->\nThe end.\n"
    )
    paths = [str(record), "--page", str(tmp_path / "gpu.md"), "--json", str(tmp_path / "gpu.json")]
    assert gpu_page.main(paths) == 0
    line = "| loss-a | 2 ms ±0% | 1 ms ±0% | 50% | theirs 4 (2.00x); absent: x is not installed | 2 | 1.05 GB |"
    page = (tmp_path / "gpu.md").read_text()
    assert f"{line} MISSED: rbfast ms <= 1 (2) |" in page
    assert "A note." in page and "The end." in page and "stale" not in page
    assert "FAILED: RuntimeError: no" in page and "theirs: whole logits" in page
    output = capsys.readouterr().out
    assert "40 cases, 20 failed; 20 bars, 20 missed" in output
    assert len(output) < 10_000
    assert len(json.loads((tmp_path / "gpu.json").read_text())["cases"]) == 40


def test_gpu_script_runs_the_tests_that_need_a_gpu_and_no_others() -> None:
    """Others would take its minutes, and run on a device that they do not expect."""
    (search,) = (line for line in (ROOT / "bench/gpu.sh").read_text().splitlines() if "mapfile -t on_gpu" in line)
    listing = search + "; printf '%s\\n' \"${on_gpu[@]}\""
    found = subprocess.run(["bash", "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = ("cuda", "cuda_columns", "cuda_rows", "grouped", "triton")
    wanted = {"tests/models/test_packed_attention.py", *(f"tests/ops/test_{name}.py" for name in names)}
    assert set(found.splitlines()) == wanted


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is no dry run")
def test_dry_run_of_the_gpu_script() -> None:
    # Otherwise pytest-benchmark takes the script for an xdist worker and measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    cases = registry.cases("cuda")
    assert f"{len(cases)} cases, 0 failed" in done.stdout
