"""Command line: `python -m benchmarks.quality --help`."""

import sys

import tyro

from benchmarks.quality import studies
from examples.common.cli import exit_status

if __name__ == "__main__":
    options = tyro.cli(
        studies.Options, prog="python -m benchmarks.quality", description=studies.__doc__
    )
    sys.exit(exit_status(lambda: studies.main(options), "the same command goes on from here."))
