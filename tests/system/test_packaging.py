"""Each way to install, in a fresh environment, used from outside the repository."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from fresh_installs import install, run, try_it

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_editable_install(fresh: Path, checkout: Path, quick_compiler: str, tmp_path: Path) -> None:
    install(fresh, "-e", ".", cwd=checkout, CXX=quick_compiler)
    found = try_it(fresh, tmp_path)
    assert found["xs"] == [[2.0, 0.0], [5.0, 3.0]]
    assert found["gather"].startswith("native")
    assert (found["text"], found["tokens"]) == ("native", [2])
    assert checkout in Path(found["file"]).parents
    assert try_it(fresh, checkout)["xs"] == found["xs"]  # the folder `kernels` there shadows no package


def test_wheel_and_sdist(fresh: Path, checkout: Path, quick_compiler: str, tmp_path: Path) -> None:
    """`build` makes the wheel from the unpacked sdist, so a working wheel proves both, and `pip install .`, which makes
    the same wheel."""
    build = [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path / "dist")]
    run(*build, cwd=checkout, CXX=quick_compiler)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name  # _text is built for this Python only
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    install(fresh, str(wheel), cwd=tmp_path)
    found = try_it(fresh, tmp_path)
    assert found["gather"].startswith("native")
    assert found["text"] == "native"
    assert checkout not in Path(found["file"]).parents
    assert (Path(found["file"]).parent / "py.typed").exists()  # else type checkers ignore the annotations


def test_missing_compiler_falls_back_but_broken_library_raises(fresh: Path, checkout: Path, tmp_path: Path) -> None:
    install(fresh, ".", cwd=checkout, CXX="no-such-compiler")
    found = try_it(fresh, tmp_path)
    assert found["xs"] == [[2.0, 0.0], [5.0, 3.0]]
    assert found["gather"] == "reference"
    assert (found["text"], found["tokens"]) == ("reference", [2])
    (Path(found["file"]).parent / "_C.abi3.so").write_bytes(b"not a library")
    done = subprocess.run([str(fresh), "-c", "from rbfast import ops"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "_C.abi3.so" in done.stderr
    (Path(found["file"]).parent / f"_text{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    done = subprocess.run(
        [str(fresh), "-c", "from rbfast.curation import text"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "_text" in done.stderr
