"""Free memory goes back to the system."""

import pytest
import torch

from rbfast import memory


def resident_mib() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def test_what_is_free_between_what_is_kept_is_given_back():
    if memory._malloc_trim() is None:
        pytest.skip("this C library has no malloc_trim")
    pairs = [(torch.ones(25_000), torch.ones(16)) for _ in range(2000)]  # 100 KB, too small for pages of its own
    kept = [small for _, small in pairs]
    del pairs
    before = resident_mib()
    memory.give_back()
    assert resident_mib() < before - 100
    assert len(kept) == 2000


def test_where_the_c_library_cannot_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.give_back()
