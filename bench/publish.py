"""How benchmarks write to docs/: sections between markers, and a description of the machine."""

import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from rbfast.utils.files import write_text

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, RESULTS = DOCS / "bench.md", DOCS / "results.md"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_kind() -> str:
    """The kind of this CPU: the maker's generation and the widest bf16 or vector unit, such as "Xeon, AMX"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    return kind_of(facts, platform.machine())


def kind_of(facts: Mapping[str, str], machine: str) -> str:
    """The kind of a CPU with these entries of /proc/cpuinfo."""
    flags, family = facts.get("flags", "").split(), facts.get("cpu family", "")
    if not flags:
        return machine
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "avx512f": "AVX-512 without bf16", "avx2": "AVX2"}
    unit = next((said for flag, said in units.items() if flag in flags), "no AVX2")
    zen = {"26": "Zen 5", "25": "Zen 4" if "avx512f" in flags else "Zen 3", "23": "Zen 2"}
    maker = "Xeon" if "Xeon" in facts.get("model name", "") else facts.get("model name", machine)
    return f"{zen.get(family, maker) if facts.get('vendor_id') == 'AuthenticAMD' else maker}, {unit}"


def put_section(path: Path, name: str, text: str, title: str = "Results") -> None:
    """Replaces the text between `<!-- name -->` and `<!-- /name -->` in a file; the rest stays byte for byte.

    Missing markers are appended; a missing file is created, with `title` as its heading.

    Raises:
        ValueError: only one marker is there, a marker is repeated, or they are in the wrong order.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    before, opened, rest = old.partition(start)
    _, closed, after = rest.partition(end)
    if (old.count(start), old.count(end)) not in ((0, 0), (1, 1)) or bool(opened) != bool(closed):
        raise ValueError(f"{path}: expected one {start} and then one {end}, or neither; fix the markers")
    if not opened:
        before, after = old.rstrip("\n") + "\n\n", "\n"
    write_text(path, f"{before}{start}\n{text.strip()}\n{end}{after}")


def publish(program: str, path: Path, name: str, make: Callable[[], str]) -> int:
    """The end of a script: writes the section that `make` returns to a file and prints it; returns the exit code."""
    try:
        text = make()
        put_section(path, name, text)
    except (ValueError, OSError, ImportError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    Console().print(Markdown(text))
    return 0
