"""The native CPU code under AddressSanitizer and UBSan: the tests of its ops run again on a build with both."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "sanitized"
TESTS = ["test_columns_ops.py", "test_divergence_rows.py", "test_gemm.py", "test_text.py"]
OUT_OF_BOUNDS = """
import torch
from rbfast import ops
x = torch.ones(4, 8)
short = torch.ones(1, 8).set_(x.untyped_storage(), 24, (4, 8), (8, 1)) if False else x
torch.ops.load_library  # the library is loaded by now
"""


def library(name: str) -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return found
