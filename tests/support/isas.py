"""Selects the CPU instruction set of a test."""

import pytest


def use_isa(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the native CPU ops use this instruction set until the test ends; skips it if they cannot."""
    from rbfast import ops

    if ops.cpu_isa() is None:
        pytest.skip("the native CPU ops are not built")
    monkeypatch.setenv("RBFAST_CPU_ISA", name)
    if ops.cpu_isa() != name:
        pytest.skip(f"this CPU has no {name}")
    return name
