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

    A thread that does nothing else waits for the signal: Python's handler in C writes its number
    into a pipe at once, whichever thread gets it. An exception in the main thread would come late
    (while a program is compiled), be swallowed (in a callback) or meet threads that are still at
    work when the interpreter is taken down. Nothing is lost: whole files are renamed into place,
    and what is half written is cleaned up by the run that goes on.
    """
    _SAID.append(said)
    if len(_SAID) > 1 or threading.current_thread() is not threading.main_thread():
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)  # no exception in the main thread

    def wait() -> None:
        while signal.SIGINT not in os.read(read, 1):
            pass
        try:
            line = _SAID[-1]()
        except Exception as error:  # an interrupt ends the process whatever it meets
            line = f"{type(error).__name__}: {error}"
        # A progress bar has hidden the cursor.
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{show_cursor}\ninterrupted: {line}\n")
        sys.stderr.flush()
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()
