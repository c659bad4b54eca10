"""Fresh environments and checkouts, and how to install into them."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from real_inputs import ROOT


def run(*command: str, cwd: Path, **env: str) -> str:
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may lead to this rbfast
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
    """A copy of the files that git tracks, so that an install cannot use build products of this tree."""
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


@pytest.fixture
def quick_compiler(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C++ compiler for CXX that does not optimise, as only installation is tested. Tests share its object files."""
    of_run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_run = of_run.parent  # each worker has its own folder
    (of_run / "objects").mkdir(exist_ok=True)
    script = tmp_path / "compiler" / "c++"
    script.parent.mkdir()
    command = [sys.executable, "-S", Path(__file__).with_name("quick_compiler.py"), of_run / "objects"]
    script.write_text(f'#!/bin/sh\nexec {" ".join(map(str, command))} {os.environ.get("CXX", "c++")} "$@"\n')
    script.chmod(0o755)
    return str(script)


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


TRY = """
import json, sys, torch, rbfast
from rbfast import ops
from rbfast.curation import text
import transformers  # a folder of ours named like one of its dependencies must not break it
from transformers import Trainer
from rbfast.kernels import columns, divergence_rows
xs = ops.column_gather(torch.arange(6.0).view(2, 3), torch.tensor([2, 0]))
print(json.dumps({"file": rbfast.__file__, "xs": xs.tolist(), "gather": ops.implementations()["column_gather"],
    "text": text.implementation(), "tokens": text.shingles(text.pack(["a b"]), 1)[1].tolist()}))
"""


def try_it(python: Path, cwd: Path) -> dict:
    return json.loads(run(str(python), "-c", TRY, cwd=cwd).splitlines()[-1])
