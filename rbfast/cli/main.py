"""The command line: `rbfast info | convert | curate | teach | distill | solve | eval | report | merge | export-lora |
demo`.

Results go to stdout (JSON with --json), progress to stderr. Exit codes: 0 done, 2 bad usage or input, 1 failure,
130 interrupted.
"""

import argparse
import difflib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NoReturn

from rbfast import __version__
from rbfast.cli.common import Command, device_of, printable
from rbfast.cli.data import CONVERT, CURATE, TEACH
from rbfast.cli.infer import EVAL, SOLVE
from rbfast.cli.info import INFO
from rbfast.cli.train import DEMO, DISTILL, EXPORT_LORA, MERGE, REPORT
from rbfast.teacher.client import ServerError

COMMANDS = (INFO, CONVERT, CURATE, TEACH, DISTILL, SOLVE, EVAL, REPORT, MERGE, EXPORT_LORA, DEMO)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # never lose a result that the terminal cannot encode
    try:
        if getattr(args, "device", None):  # fail now, not after an hour of reading
            device_of(args)
        with _without_bars() if args.json else nullcontext():
            code = args.run(args)
        sys.stdout.flush()  # raise BrokenPipeError here, where it is handled
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit would fail too
        return 1
    except (ValueError, OSError, ImportError) as error:
        cause = f" ({error.__cause__})" if isinstance(error, ImportError) and error.__cause__ else ""
        print(printable(f"rbfast {args.command}: error: {error}{cause}"), file=sys.stderr)
        return 2
    except ServerError as error:
        print(printable(f"rbfast {args.command}: error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = "; run the same command to resume" if args.resumes and args.out else ""  # else nothing was saved
        print(f"rbfast {args.command}: interrupted{resumes}", file=sys.stderr)
        return 130  # as a shell reports SIGINT


@contextmanager
def _without_bars() -> Iterator[None]:
    """Switch off the progress bars of other libraries (transformers): tqdm reads the environment when imported."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


class _CommandParser(argparse.ArgumentParser):
    """The parser of one command. Errors show the command's own usage, and suggest a name for an unknown option."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown_message(unknown))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        formatter = self._get_formatter()
        formatter.add_usage(None, [action for action in self._actions if action.required], ())
        usage = formatter.format_help().strip()
        self.exit(2, f"{usage} [options]\n{self.prog}: error: {message}; see {self.prog} --help\n")

    def _unknown_message(self, unknown: Sequence[str]) -> str:
        option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if option is None:
            return f"unexpected argument {unknown[0]!r}"
        meant = _suggest_option(option, [name for action in self._actions for name in action.option_strings])
        return f"unknown option {option}" + (f": did you mean {meant}?" if meant else "")


def _suggest_option(option: str, known: Sequence[str]) -> str | None:
    """The known option closest to an unknown one, by initials or spelling; None if none is close."""
    initials = {"--" + "".join(word[0] for word in name[2:].split("-")): name for name in known if name[2:]}
    return initials.get(option) or next(iter(difflib.get_close_matches(option, known, 1)), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rbfast", description="Move reasoning from a strong teacher into an open model."
    )
    parser.add_argument("--version", action="version", version=f"rbfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for command in COMMANDS:
        _add_command(commands, command)
    return parser


def _add_command(commands: "argparse._SubParsersAction[_CommandParser]", command: Command) -> None:
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
    sub.set_defaults(run=command.run, resumes=command.resumes)


if __name__ == "__main__":
    sys.exit(main())
