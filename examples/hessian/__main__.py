"""Command line: `python -m examples.hessian --help`."""

import sys

import tyro

from examples.common.cli import exit_status
from examples.hessian.measure import Config, main

if __name__ == "__main__":
    config = tyro.cli(Config, prog="python -m examples.hessian", description=Config.__doc__)
    sys.exit(exit_status(lambda: main(config), after_interrupt="nothing was written."))
