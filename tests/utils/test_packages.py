"""Optional packages: the error says what to install, or why an installed package cannot be imported."""

import pytest

from rbfast.grading.grade import import_reasoning_gym
from rbfast.grading.judge import Judge
from rbfast.ops import registry
from rbfast.utils import packages
from rbfast.utils.packages import import_optional


def write_package(folder, name, source):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def test_error_for_unbuilt_code_names_a_source_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "_ROOT", tmp_path)
    monkeypatch.setattr(registry, "_NATIVE", None)
    assert registry.cpu_isa_reason() == "not built: reinstall with a C++ compiler on the PATH"
    (tmp_path / "setup.py").touch()
    assert f"imported from its sources in {tmp_path}: run in another folder" in registry.cpu_isa_reason()
    assert "`pip install -e .`" in registry.cpu_isa_reason()


def test_error_for_an_absent_package_says_what_to_install():
    with pytest.raises(ImportError, match=r"^colours need the package no_such_package: pip install 'a\[b\]'$"):
        import_optional("no_such_package.part", "colours", install="'a[b]'")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import absent_dependency", "ModuleNotFoundError: No module named 'absent_dependency'"),
        ("from os import no_such_name", "ImportError: cannot import name 'no_such_name'"),
        ("raise RuntimeError('built for\\nanother torch')", "RuntimeError: built for another torch"),
    ],
)
def test_error_for_a_broken_package_gives_the_reason(source, reason, tmp_path, monkeypatch):
    write_package(tmp_path, "a_broken_package", source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"installed but cannot be imported: {reason}"):
        import_optional("a_broken_package", "colours", install="a-broken-package")


def test_error_names_a_missing_dependency_of_reasoning_gym(tmp_path, monkeypatch):
    write_package(tmp_path, "reasoning_gym", "import absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "reasoning_gym", raising=False)
    with pytest.raises(ImportError, match="absent_dependency") as raised:
        import_reasoning_gym()
    assert "pip install" not in str(raised.value)


def test_error_says_why_the_grading_process_cannot_start(tmp_path, monkeypatch):
    write_package(tmp_path, "math_verify", "import absent_dependency")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"cannot be imported: ModuleNotFoundError.*absent_dependency"):
        Judge("math-verify").ask(["$1$", "$1$"])
