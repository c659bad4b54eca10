"""Curation on Ray Data with two workers gives the output and the errors of one process.

The workers start in about half a minute on one core.
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases.problems import problem

from rbfast import CurateConfig, curate
from rbfast.cli.main import main
from rbfast.curation.assess import Assessor, join_parts
from rbfast.curation.decontaminate import Decontaminator
from rbfast.curation.pool import Pool, assess_on_ray, assess_pool
from rbfast.data.trace import Trace, TraceError

pytestmark = [pytest.mark.slow, pytest.mark.long]

FILES = ("reason1k.jsonl", "dropped.jsonl", "datasheet.json", "datasheet.html")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A session with two workers."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'rbfast[ray]'")
    pytest.importorskip("ray.data")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of different lengths: duplicates, evaluation problems, truncated reasoning and an invalid row."""
    rng = random.Random(0)
    problems = [problem(rng) for _ in range(300)]
    rows: list[Any] = [
        {
            "problem": rng.choice(problems),
            "reasoning": "First, let me check this. " * rng.randrange(1, 4) + rng.choice(["So it is 7.", "so the"]),
            "answer": "7",
            "domain": rng.choice("abc"),
            "id": str(number),
        }
        for number in range(500)
    ]
    rows[0]["reasoning"] = "It is 7."
    rows[50] = {"problem": "no more"}
    folder = tmp_path_factory.mktemp("pool")
    write_rows(folder / "against.jsonl", [{"problem": text} for text in problems[:10]])
    parts = {"one": rows[:333], "two": rows[333:340], "three": rows[340:]}
    return [write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()]


def test_ray_output_matches_one_process_bitwise(ray: Any, pool: list[Path], tmp_path: Path, monkeypatch) -> None:
    against = pool[0].with_name("against.jsonl")
    result = curate(pool, tmp_path / "one", CurateConfig(size=20, against=[against], seed=3))
    monkeypatch.setattr("rbfast.curation.pool.CHUNK", 40)
    command = ["curate", *map(str, pool), "-o", str(tmp_path / "ray"), "--against", str(against), "--ray", "auto"]
    assert main([*command, "--size", "20", "--seed", "3", "--json"]) == 0
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
    assert result.selected == 20
    assert all(stage.dropped for stage in result.stages if stage.name != "score")
    assert ray.is_initialized()


def test_two_workers_share_a_file_and_its_order_is_kept(
    ray: Any, pool: list[Path], tmp_path: Path, monkeypatch
) -> None:
    def worker_id(trace: Trace) -> float:
        """The worker's process id. The first trace waits for another worker to be two chunks ahead."""
        prefix, deadline = f"{os.getpid()}.", time.monotonic() + 60
        (tmp_path / f"{prefix}{trace.id}").touch()
        while trace.id == "0" and time.monotonic() < deadline:
            if sum(not path.name.startswith(prefix) for path in tmp_path.iterdir()) > 40:
                break
            time.sleep(0.01)
        return float(os.getpid())

    monkeypatch.setattr("rbfast.curation.pool.CHUNK", 20)
    monkeypatch.chdir(pool[0].parent)  # workers run in another folder
    name, decontaminator = Pool((pool[0].name,)), Decontaminator([])
    on_ray = join_parts([*assess_on_ray(name, Assessor(decontaminator, quality=worker_id), "auto")])
    in_process = join_parts([*assess_pool(name, Assessor(decontaminator), 1)])
    assert on_ray.fingerprints.tolist() == in_process.fingerprints.tolist()
    assert on_ray.quality[0] not in on_ray.quality[20:40]
    assert os.getpid() not in on_ray.quality


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"problem": ', TraceError, "absent.jsonl: expected a file"),
        (
            '{"problem": "?", "reasoning": "It is 7.", "answer": "7", "difficulty": 3}',
            ValueError,
            "quality must return",
        ),
    ],
)
def test_ray_raises_the_errors_of_one_process(
    ray: Any, pool: list[Path], tmp_path: Path, line: str, error: type, message: str
) -> None:
    torn = tmp_path / "torn.jsonl"
    sources = Pool((torn, tmp_path / "absent.jsonl") if error is TraceError else (torn,))
    torn.write_text("".join(pool[0].read_text(encoding="utf-8").splitlines(True)[:20]) + line + "\n")
    assessor = Assessor(Decontaminator([]), quality=lambda trace: float("nan") if trace.difficulty else 1.0)
    with pytest.raises(error, match=message) as in_process:
        list(assess_pool(sources, assessor, 1))
    with pytest.raises(error) as on_ray:
        list(assess_on_ray(sources, assessor, "auto"))
    assert type(on_ray.value) is type(in_process.value)
    assert str(on_ray.value) == str(in_process.value)


def test_ray_session_opened_by_curate_is_closed(ray: Any, tmp_path: Path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(ray, "is_initialized", iter([False]).__next__)
    monkeypatch.setattr(ray.data, "from_items", lambda items: 1 / 0)
    monkeypatch.setattr(ray, "init", lambda address, **options: calls.append(address))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("closed"))
    with pytest.raises(ZeroDivisionError):
        curate([write_rows(tmp_path / "pool.jsonl", [])], tmp_path / "out", CurateConfig(ray="host:6379"))
    assert calls == ["host:6379", "closed"]


def test_missing_ray_and_ray_with_processes_are_refused(pool: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["curate", str(pool[0]), "-o", str(tmp_path), "--ray", "auto"]) == 2
    assert "pip install 'rbfast[ray]'" in capsys.readouterr().err
    assert main(["curate", str(pool[0]), "-o", str(tmp_path), "--ray", "auto", "--processes", "2"]) == 2
    assert "set processes or ray, not both, got 2 and 'auto'" in capsys.readouterr().err
