"""Command line: `python -m benchmarks.quality --help`."""

import sys

import tyro

from benchmarks.quality import studies
from examples.common.cli import exit_status
from examples.common.interrupts import end_on_interrupt

if __name__ == "__main__":
    options = tyro.cli(
        studies.Options, prog="python -m benchmarks.quality", description=studies.__doc__
    )
    end_on_interrupt(lambda: "the same command goes on from here.")
    sys.exit(exit_status(lambda: studies.main(options)))
