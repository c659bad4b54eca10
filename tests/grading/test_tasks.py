"""Problems from JSON and Parquet files."""

import json

import pytest

from rbfast.grading.tasks import load_problems

pytest.importorskip("math_verify")
ROWS = [{"problem": "6 * 7?", "answer": 42}, {"problem": "Half of one?", "answer": r"\frac{1}{2}"}]


def test_problems_are_read_from_a_json_file(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(ROWS))
    assert [(p.question, p.answer) for p in load_problems(str(path), None, seed=0)] == [
        ("6 * 7?", "42"),
        ("Half of one?", r"\frac{1}{2}"),
    ]


def test_problems_are_read_from_a_parquet_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row | {"answer": str(row["answer"])} for row in ROWS]), path)
    assert [p.answer for p in load_problems(str(path), None, seed=0)] == ["42", r"\frac{1}{2}"]


def test_error_names_the_missing_file(tmp_path):
    for name in ("set.json", "set.parquet"):
        with pytest.raises(FileNotFoundError, match=rf"{name}: expected a file of problems"):
            load_problems(str(tmp_path / name), None, seed=0)
