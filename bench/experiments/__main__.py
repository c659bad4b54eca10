"""Runs an experiment: python bench/experiments NAME [its arguments]."""

import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # where harness, publish, peers and this package are
HELPERS = ("options", "parts", "demo_student", "teacher_results", "closed_teacher_report")
NAMES = sorted(path.stem for path in HERE.glob("[a-z]*.py") if path.stem not in HELPERS)


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in NAMES:
        print(f"expected the name of an experiment, one of {', '.join(NAMES)}; got {argv[:1] or 'nothing'}")
        return 2
    try:
        return import_module(f"experiments.{argv[0]}").main(argv[1:])
    except (ValueError, OSError) as error:
        print(f"{argv[0]}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
