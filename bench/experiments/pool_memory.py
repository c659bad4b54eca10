"""How much memory a curation takes per item of its pool: peaks of pools that differ only in size.

    python bench/experiments pool_memory                   # 20,000 and 80,000 items, of 1,000 and of 4,000 characters

Each pool is written to a temporary folder and curated in its own process, against 500 evaluation problems.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cases.problems import EVALUATIONS, WORDS, problem

SIZES, CHARACTERS = (20_000, 80_000), (1_000, 4_000)
CURATE = """
import resource, sys
from rbfast import CurateConfig, curate
curate([sys.argv[1]], sys.argv[2], CurateConfig(against=[sys.argv[3]]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_pool(path: Path, size: int, characters: int) -> None:
    """Traces of about this many characters of reasoning."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(size):
            reasoning = f"{' '.join(rng.choices(WORDS, k=characters // 6))}. So it is {number}."
            trace = {
                "problem": problem(rng),
                "reasoning": reasoning,
                "answer": str(number),
                "domain": f"d{number % 12}",
            }
            file.write(json.dumps(trace) + "\n")


def peak(folder: Path, size: int, characters: int) -> int:
    """Peak bytes of a process that curates such a pool."""
    pool = folder / "pool.jsonl"
    write_pool(pool, size, characters)
    command = [sys.executable, "-c", CURATE, str(pool), str(folder / "out"), str(folder / "against.jsonl")]
    return 1024 * int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [json.dumps({"problem": problem(rng)}) for _ in range(EVALUATIONS)]
        (folder / "against.jsonl").write_text("\n".join(texts), encoding="utf-8")
        for characters in CHARACTERS:
            peaks = [peak(folder, size, characters) for size in SIZES]
            growth = (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0])
            shown = ", ".join(f"{n:,} items {p / 2**20:,.0f} MiB" for n, p in zip(SIZES, peaks, strict=True))
            print(f"{characters:,} characters each: {shown}; {growth:,.0f} bytes for each more", flush=True)
    return 0
