"""The packages of rbfast form layers: none imports from a higher layer."""

import ast
from pathlib import Path

import pytest
from real_inputs import ROOT

LAYERS = (
    "cli",
    "demo",
    "curation",
    "report",
    "evaluation",
    "on_policy",
    "inference",
    "teacher",
    "grading",
    "training",
    "data",
    "loss",
    "adapter",
    "models",
    "ops",
    "utils",
)
FILES = sorted(path for path in (ROOT / "rbfast").rglob("*.py") if path.parent.name != "kernels")


def imported(path: Path) -> set[str]:
    """The modules of rbfast that a file imports, at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("rbfast.")}


def test_every_package_has_a_layer_and_a_docstring():
    packages = {path.parent.name for path in (ROOT / "rbfast").glob("*/__init__.py")}
    assert packages == set(LAYERS)
    for package in packages:
        assert ast.get_docstring(ast.parse((ROOT / "rbfast" / package / "__init__.py").read_text())), package


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_from_a_higher_layer(path):
    own = path.relative_to(ROOT / "rbfast").parts[0]
    if own not in LAYERS:
        assert path.name in ("__init__.py", "__main__.py")
        return
    for name in imported(path):
        package = name.split(".")[1]
        if package in LAYERS:
            assert LAYERS.index(package) >= LAYERS.index(own), f"{own} imports {name}, which is above it"


def modules_of(package: str) -> dict[str, set[str]]:
    """The modules of a package, and the sibling modules that each imports."""
    paths = {path.stem: path for path in (ROOT / "rbfast" / package).glob("*.py") if path.stem != "__init__"}
    prefix = f"rbfast.{package}."
    found = {
        stem: {n.removeprefix(prefix).split(".")[0] for n in imported(p) if n.startswith(prefix)}
        for stem, p in paths.items()
    }
    return {stem: others & paths.keys() for stem, others in found.items()}


@pytest.mark.parametrize("package", LAYERS)
def test_no_import_cycle_within_a_package(package):
    left = modules_of(package)
    while left:
        free = {stem for stem, others in left.items() if not others & left.keys()}
        assert free, f"{package}: {', '.join(sorted(left))} import each other"
        left = {stem: others for stem, others in left.items() if stem not in free}
