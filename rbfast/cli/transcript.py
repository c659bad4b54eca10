"""Print a guided solution as it is written: thinking dim, interventions marked, the answer bold."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rbfast.cli.common import printable

_STYLES = {"think": "dim", "answer": "bold"}
_MARK = "black on yellow"


class Transcript:
    """Prints pieces to stdout as they come."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._console = Console(highlight=False)

    def write(self, kind: str, text: str) -> None:
        """Print a piece of `think` or `answer`, or the text that an intervention of this kind inserted."""
        if self.quiet:
            return
        text = printable(text)
        if kind in _STYLES:
            self._console.print(Text(text, style=_STYLES[kind]), end="", soft_wrap=True)
        else:
            self._console.print(
                Text(f" [{kind}] ", style=_MARK), Text(text, style="yellow"), sep="", end="", soft_wrap=True
            )

    def last_line(self, answer: str | None, tokens: int, samples: int, votes: int) -> str:
        """The line with the result, for the caller to print."""
        voted = f", {votes} of {samples} samples agree" if samples > 1 else ""
        shown = "none" if answer is None else answer
        return f"{'' if self.quiet else chr(10)}answer: {shown} ({tokens} tokens{voted})"
