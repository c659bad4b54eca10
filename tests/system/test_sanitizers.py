"""The native CPU code under AddressSanitizer and UBSan: the tests of its ops run again on a build with both.

The build stays in build/sanitized, so that a second run compiles only changed sources.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from locks import locked

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "sanitized"
TESTS = ["ops/test_columns_ops.py", "ops/test_divergence_rows.py", "ops/test_head_gemm.py", "curation/test_text.py"]
PYTHON_ONLY = "not opcheck and not compiles and not graph"


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def runtime(name: str) -> str:
    """The library that must be loaded before everything else."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = run(compiler, f"-print-file-name={name}", cwd=ROOT).strip()
    if not Path(library).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return library


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment in which Python loads the sanitized libraries from BUILT, rebuilt if a source has changed."""
    env = {"LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}"}
    env |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # Python itself leaks at exit
    build = ["build", "--build-lib", str(BUILT), "--build-temp", str(BUILT / "temp")]
    BUILT.mkdir(parents=True, exist_ok=True)
    with locked(BUILT / "lock"):
        run(sys.executable, "setup.py", "-q", *build, cwd=ROOT, RBFAST_SANITIZE="1", RBFAST_CUDA="0")
    libraries = [path for name in ("_C", "_text") for path in (BUILT / "rbfast").glob(f"{name}.*so")]
    assert len(libraries) == 2 and all(b"__asan_init" in path.read_bytes() for path in libraries)
    check = "import rbfast.ops; from rbfast.curation import text; "
    check += "print(rbfast.__file__, rbfast.ops.cpu_isa(), text.implementation())"
    printed = run(sys.executable, "-c", check, cwd=BUILT, **env).split()
    assert Path(printed[0]).parent == BUILT / "rbfast" and printed[1] != "None" and printed[2] == "native"
    return env


@pytest.mark.parametrize("name", TESTS)
def test_native_ops_pass_under_the_sanitizers(sanitized: dict[str, str], name: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    file = str(ROOT / "tests" / name)
    output = run(sys.executable, "-m", "pytest", *options, "-k", PYTHON_ONLY, file, cwd=BUILT, **sanitized)
    assert " passed" in output and " failed" not in output
