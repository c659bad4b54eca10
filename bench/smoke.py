"""Runs every command-line job on a device and prints a line for each: whether it works, and how long it takes.

    python bench/smoke.py                                # on cuda; a student of 8 layers with random weights
    python bench/smoke.py --device cuda:1 --student smollm2-135m

If a job fails, it prints the end of the job's output, runs the others, and exits with 1. Needs no network.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]
# Jobs fork from this process: CUDA stays usable in them if NVML, not CUDA, is asked for GPUs here.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from cli_jobs import Setup, run_jobs  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--student", help="hub id, folder or smollm2-135m (default: one with random weights)")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--at-once", type=int, default=min(6, os.cpu_count() or 1), help="jobs at a time")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder), args.device, args.hidden, args.layers, args.vocabulary, student=args.student)
        setup.prepare()
        ended = run_jobs(setup, args.at_once)
    for job, end in ended.items():
        print(f"{job:14} {'ok' if end['code'] == 0 else 'FAILS':6} {end['seconds']:6.1f} s")
    failed = {job: end for job, end in ended.items() if end["code"]}
    for job, end in failed.items():
        print(f"\n---- {job}: exit code {end['code']}\n{end['said'][-3000:]}")
    print(f"{len(ended) - len(failed)} of {len(ended)} jobs ran on {args.device} in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
