"""Files appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from rbfast.files import replacing, write_text


def test_the_new_file_takes_the_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    with replacing(path) as file:
        file.write(b"later")
        assert path.read_bytes() == "é\n".encode()
    assert path.read_bytes() == b"later"


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file", "w") as file:
        file.write("half")
        raise RuntimeError("power cut")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    code = (
        "import resource, signal, sys; from rbfast.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(sys.argv[1], 5000 * ' ')"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True)
    assert run.returncode == 1
    assert "OSError" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
