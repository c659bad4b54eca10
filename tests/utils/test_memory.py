"""Free memory goes back to the system."""

import subprocess
import sys

import pytest

from rbfast.utils import memory

# In a separate process: the kept objects would go into memory that other tests freed, and leave no holes.
HOLES = """
from rbfast.utils import memory
def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))
pairs = [(bytearray(100_000), bytearray(1_000)) for _ in range(2_000)]   # too small for pages of their own
for large, _ in pairs:
    large[::4096] = bytes(len(large[::4096]))                            # touched
kept = [small for _, small in pairs]
del pairs, large
before = resident_mib()
memory.trim_memory()
print(before - resident_mib(), len(kept))
"""


def test_free_memory_between_kept_objects_is_given_back():
    if memory._malloc_trim() is None:
        pytest.skip("this C library has no malloc_trim")
    run = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert float(run.stdout.split()[0]) > 100


def test_trimming_does_nothing_without_malloc_trim(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.trim_memory()
