"""One command line for the benchmarks: a thin front to pytest-benchmark.

    python bench/run.py loss --device cuda --peers      # a group, or a case by part of its name
    python bench/run.py --peers                         # all cases of a CPU
    python bench/run.py columns --toy                   # tiny sizes: does it work?
    python bench/run.py "four 7B" --device cuda --kernels 15        # where the time of a call goes, by torch.profiler
    python bench/run.py "column_grad 14B" --device cuda --once      # one call of rbfast, for ncu

Groups: rows, columns, accuracy, fold, products, loss, adapter, step, trainer, teacher, mixture. Arguments after `--`
go to pytest.
"""

import argparse
import os
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def main(argv: list[str]) -> int:
    at = argv.index("--") if "--" in argv else len(argv)
    ours, to_pytest = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="groups, or parts of names; all of them if none is given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on the CPU if there is no GPU")
    parser.add_argument("--peers", action="store_true", help="run the peers too, not only rbfast and its floor")
    parser.add_argument("--record", type=Path, help="add a line of JSON for each case to this file")
    parser.add_argument("--once", action="store_true", help="run rbfast once, between the marks of a profiler")
    parser.add_argument("--kernels", type=int, metavar="N", help="print the N kernels or ops that take the most time")
    parser.add_argument("--after", type=Path, metavar="FILE", help="import everything, then wait until FILE exists")
    args = parser.parse_args(ours)
    if args.after:
        _import_all(args.device)
        _wait_for(args.after)
    if args.once or args.kernels:
        import profiling

        return profiling.main(args.cases, args.device, args.toy, args.kernels)
    return pytest.main(_pytest_arguments(args) + to_pytest)


def _import_all(device: str) -> None:
    """Imports the modules that take seconds to import; none of them touches a GPU."""
    import registry

    registry.cases(device)
    for name in ("peft", "liger_kernel", "torch._inductor.compile_fx"):
        with suppress(ImportError):
            import_module(name)


def _wait_for(path: Path) -> None:
    parent = os.getppid()
    while not path.exists():
        if os.getppid() != parent:
            sys.exit(f"the parent process ended before it wrote {path}")
        time.sleep(0.05)


def _pytest_arguments(args: argparse.Namespace) -> list[str]:
    given = [str(HERE / "cases"), "--benchmark-only", "-q", f"--device={args.device}"]
    given += ["--benchmark-group-by=group", "--benchmark-columns=median,iqr,rounds", "-p", "no:cacheprovider"]
    given += [flag for flag, asked in (("--toy", args.toy), ("--peers", args.peers)) if asked]
    given += [f"--record={args.record}"] if args.record else []
    names = [name.replace(" ", "-").replace(",", "") for name in args.cases]
    return given + (["-k", " or ".join(names)] if names else [])


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main(sys.argv[1:]))
