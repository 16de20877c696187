"""Command line: `python -m examples.gnn --help`."""

import sys

import tyro

from examples.common.cli import exit_status
from examples.gnn.train import Config, main

if __name__ == "__main__":
    config = tyro.cli(Config, prog="python -m examples.gnn", description=Config.__doc__)
    sys.exit(exit_status(lambda: main(config)))
