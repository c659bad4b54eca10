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
    facts = try_it(fresh, tmp_path)
    assert facts["xs"] == [[2.0, 0.0], [5.0, 3.0]]
    assert facts["gather"].startswith("native")
    assert (facts["text"], facts["tokens"]) == ("native", [2])
    assert checkout in Path(facts["file"]).parents
    assert try_it(fresh, checkout)["xs"] == facts["xs"]  # the folder `kernels` there shadows no package


def test_wheel_and_sdist(fresh: Path, checkout: Path, quick_compiler: str, tmp_path: Path) -> None:
    """`build` makes the wheel from the unpacked sdist, so a working wheel proves both, and `pip install .`, which makes
    the same wheel."""
    build = [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path / "dist")]
    run(*build, cwd=checkout, CXX=quick_compiler)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name  # _text is built for this Python only
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    install(fresh, str(wheel), cwd=tmp_path)
    facts = try_it(fresh, tmp_path)
    assert facts["gather"].startswith("native")
    assert facts["text"] == "native"
    assert checkout not in Path(facts["file"]).parents
    assert (Path(facts["file"]).parent / "py.typed").exists()  # else type checkers ignore the annotations


def test_missing_compiler_falls_back_but_broken_library_raises(fresh: Path, checkout: Path, tmp_path: Path) -> None:
    install(fresh, ".", cwd=checkout, CXX="no-such-compiler")
    facts = try_it(fresh, tmp_path)
    assert facts["xs"] == [[2.0, 0.0], [5.0, 3.0]]
    assert facts["gather"] == "reference"
    assert (facts["text"], facts["tokens"]) == ("reference", [2])
    (Path(facts["file"]).parent / "_C.abi3.so").write_bytes(b"not a library")
    done = subprocess.run([str(fresh), "-c", "from rbfast import ops"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "_C.abi3.so" in done.stderr
    (Path(facts["file"]).parent / f"_text{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    done = subprocess.run(
        [str(fresh), "-c", "from rbfast.curation import text"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "_text" in done.stderr
