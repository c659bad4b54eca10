"""Finished parts of an experiment are kept, and read back only for the same settings."""

import json
from pathlib import Path

import pytest
from experiments.parts import digest, part


def test_part_is_measured_once_and_only_for_its_settings(tmp_path: Path) -> None:
    first = part(tmp_path / "a.json", {"rates": (1, 2)}, lambda: 7)
    assert part(tmp_path / "a.json", {"rates": (1, 2)}, lambda: pytest.fail("measured again")) == first
    assert first["result"] == 7
    with pytest.raises(ValueError, match=r"rates \[1, 2\], now it is \[3\]"):
        part(tmp_path / "a.json", {"rates": (3,)}, lambda: 8)


def test_parts_kept_by_earlier_versions_are_read(tmp_path: Path) -> None:
    kept = {"result": {"solved": [1.0]}, "asked": {"rates": [1, 2]}, "seconds": 3.5}
    (tmp_path / "a.json").write_text(json.dumps(kept, indent=1))
    assert part(tmp_path / "a.json", {"rates": (1, 2)}, lambda: pytest.fail("measured again")) == kept
    assert digest([("a", [1, 2]), {"b": 1, "a": 0.5}]) == "dcb7ff56c5124d59420abe6299b5faca"
