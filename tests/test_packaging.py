"""Each way to install, in a fresh environment and tried from outside the repository."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRY = """
import json, sys, torch, rbfast
from rbfast import ops, text
import transformers  # a folder of ours named like one of its dependencies must not break it
from transformers import Trainer
from rbfast.kernels import columns, divergence_rows
xs = ops.column_gather(torch.arange(6.0).view(2, 3), torch.tensor([2, 0]))
print(json.dumps({"file": rbfast.__file__, "xs": xs.tolist(), "gather": ops.implementations()["column_gather"],
    "text": text.implementation(), "tokens": text.shingles(text.pack(["a b"]), 1)[1].tolist()}))
"""


def run(*command: str, cwd: Path, **env: str) -> str:
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may lead to this rbfast
    done = subprocess.run(command, cwd=cwd, env=ours | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A new environment that sees the dependencies of this one, but not its rbfast; returns its python."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # A path line makes the packages importable; .pth files in that folder (an editable rbfast) are not followed.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what git tracks, so that an install cannot lean on build products of this tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0")
    for name in tracked:
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    return tmp_path / "checkout"


def install(python: Path, *what: str, cwd: Path, **env: str) -> None:
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-build-isolation",
        *what,
        cwd=cwd,
        **env,
    )


def try_it(python: Path, cwd: Path) -> dict:
    return json.loads(run(str(python), "-c", TRY, cwd=cwd).splitlines()[-1])


@pytest.mark.parametrize("editable", [False, True])
def test_install_from_the_checkout(fresh: Path, checkout: Path, tmp_path: Path, editable: bool) -> None:
    install(fresh, *(["-e"] if editable else []), ".", cwd=checkout)
    found = try_it(fresh, tmp_path)
    assert found["xs"] == [[2.0, 0.0], [5.0, 3.0]]
    assert found["gather"].startswith("native")
    assert (found["text"], found["tokens"]) == ("native", [2])
    assert (checkout in Path(found["file"]).parents) == editable
    assert try_it(fresh, checkout)["xs"] == found["xs"]  # its folder named `kernels` hides nobody's package


def test_wheel_and_sdist(fresh: Path, checkout: Path, tmp_path: Path) -> None:
    """`build` makes the wheel out of the unpacked sdist, so a wheel that works proves both."""
    run(sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path / "dist"), cwd=checkout)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name  # _text is for this Python alone
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    install(fresh, str(wheel), cwd=tmp_path)
    found = try_it(fresh, tmp_path)
    assert found["gather"].startswith("native")
    assert found["text"] == "native"


def test_without_a_compiler_the_reference_serves_but_a_broken_library_raises(
    fresh: Path, checkout: Path, tmp_path: Path
) -> None:
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
    done = subprocess.run([str(fresh), "-c", "from rbfast import text"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "_text" in done.stderr
