"""Command lines: one clear sentence for a wrong configuration, progress bars, tables."""

import errno
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class ConfigError(ValueError):
    """A configuration that cannot work. Its text says what was given, what was expected and how to
    mend it."""


def check_counts(counts: Mapping[str, int]) -> None:
    """Refuse options, by their fields' names, that are less than 1."""
    for name, value in counts.items():
        if value < 1:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is {value}, but must be at least 1.")


def exit_status(main: Callable[[], None]) -> int:
    """Run `main`; a wrong configuration becomes one line on stderr and a status of 2."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_disk_full(error):
            raise
        print(
            "error: the disk is full: make room and go on with --resume, or give a --runs on "
            "another disk.",
            file=sys.stderr,
        )
        return 2
    return 0


def is_disk_full(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is of a disk without room."""
    if error is None:
        return False
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # NumPy says how much was written, Orbax what its file system said.
    is_said = re.search(r"no space left|\d+ requested and \d+ written", str(error), re.I)
    return is_full or bool(is_said) or is_disk_full(error.__cause__ or error.__context__)


def progress_bar(console: Console) -> Progress:
    """A bar whose tasks have the fields `loss` and `rate` (tokens or examples a second)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} {task.fields[unit]}/s"),
        TimeRemainingColumn(),
        console=console,
    )


def comparison_table(
    title: str, columns: Mapping[str, Callable[[Mapping], str]], results: Sequence[Mapping]
) -> Table:
    """One row a result; `columns` maps a heading to the text of its cell."""
    table = Table(title=title)
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for result in results:
        table.add_row(*(cell(result) for cell in columns.values()))
    return table
