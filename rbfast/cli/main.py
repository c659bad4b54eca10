"""The command line: `rbfast info | convert | curate | teach | distill | solve | eval | report | merge | export-lora |
demo`.

Results go to stdout (JSON with --json), progress to stderr. Exit codes: 0 done, 2 bad usage or input, 1 failure.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from rbfast import __version__
from rbfast.cli.common import Command, device_of
from rbfast.cli.data import CONVERT, CURATE, TEACH
from rbfast.cli.infer import EVAL, SOLVE
from rbfast.cli.info import INFO
from rbfast.cli.train import DEMO, DISTILL, EXPORT_LORA, MERGE, REPORT
from rbfast.teacher.client import ServerError

COMMANDS = (INFO, CONVERT, CURATE, TEACH, DISTILL, SOLVE, EVAL, REPORT, MERGE, EXPORT_LORA, DEMO)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if getattr(args, "device", None):  # now, not after an hour of reading
            device_of(args)
        code = args.run(args)
        sys.stdout.flush()  # here, because here a closed pipe can be told from a failure
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit would fail again
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"rbfast {args.command}: error: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"rbfast {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rbfast {args.command}: interrupted; run the same command to resume", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rbfast", description="Move reasoning from a strong teacher into an open model."
    )
    parser.add_argument("--version", action="version", version=f"rbfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        _add_command(commands, command)
    return parser


def _add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", command: Command) -> None:
    sub = commands.add_parser(
        command.name,
        help=command.summary,
        description=command.summary,
        epilog=f"example: {command.example}",
        allow_abbrev=False,
    )
    sub.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")
    sub.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    command.add_arguments(sub)
    sub.set_defaults(run=command.run)


if __name__ == "__main__":
    sys.exit(main())
