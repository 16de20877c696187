"""Command line: `python -m examples.diffusion --help`."""

import sys

import tyro

from examples.common.cli import exit_status
from examples.diffusion.train import Config, main

if __name__ == "__main__":
    config = tyro.cli(Config, prog="python -m examples.diffusion", description=Config.__doc__)
    sys.exit(exit_status(lambda: main(config)))
