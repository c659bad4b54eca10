"""Progress on stderr, so that stdout stays clean for results."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column


def bar(title: str, quiet: bool = False) -> Progress:
    """A bar with counts, elapsed and remaining time, then the task's description."""
    whole = Column(no_wrap=True)  # on a narrow terminal only the bar shrinks
    return Progress(
        TextColumn(title.replace("{", "{{").replace("}", "}}"), markup=False),  # it may be the name of a file
        BarColumn(),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.description}", markup=False),
        console=Console(file=sys.stderr),
        disable=quiet,
    )


@contextmanager
def counting(title: str, quiet: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """A bar that is updated by calls of (done, total); total is None while unknown."""
    with bar(title, quiet) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
