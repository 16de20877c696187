"""Command line: `python -m examples.hessian --help`."""

import sys

from examples.common.interrupts import end_on_interrupt

end_on_interrupt()  # before what takes long to import

import tyro  # noqa: E402

from examples.common.cli import exit_status  # noqa: E402
from examples.hessian.measure import Config, main  # noqa: E402

if __name__ == "__main__":
    config = tyro.cli(Config, prog="python -m examples.hessian", description=Config.__doc__)
    sys.exit(exit_status(lambda: main(config)))
