"""Ctrl-C at any moment: one line, and the process ends at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable

# What the line says; the last one holds.
_SAID: list[Callable[[], str]] = []


def end_on_interrupt(said: Callable[[], str] = lambda: "nothing was written.") -> None:
    """End the process with status 130 when it is interrupted; `said` is asked for the line then.

    A thread that does nothing else waits for the signal. An exception in the main thread would come
    late (while a program is compiled), be swallowed (in a callback) or meet threads that are still
    at work when the interpreter is taken down. Nothing is lost: whole files are renamed into place,
    and what is half written is cleaned up by the run that goes on.
    """
    _SAID.append(said)
    if len(_SAID) > 1:
        return
    signals = {signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # in all threads that start from here

    def wait() -> None:
        signal.sigwait(signals)
        sys.stderr.write(f"\ninterrupted: {_SAID[-1]()}\n")
        sys.stderr.flush()
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()
