"""Where a daemon's log goes, and the stacks of all its threads when they are asked for.

The stacks are written by the C handler of `faulthandler`, which needs neither the
interpreter's lock nor a thread that still runs: a daemon that hangs can say where.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
from pathlib import Path

from erofs.console import log_path, log_to

__all__ = ["set_up_daemon_log"]

_STDERR = 2


def set_up_daemon_log(level: str, path: Path | None, rotate_bytes: int) -> None:
    """Send the log to standard error, or to a file, and stacks of all threads after it.

    SIGUSR1 dumps the stacks and ends nothing; a fatal signal (SIGABRT of a watchdog) dumps
    them, too. With a file SIGHUP opens it anew, for logrotate. Raises `OSError`.
    """
    if path is None:
        log_to(logging.StreamHandler(sys.stderr), level)
        dump_fd = _STDERR
    else:
        # Imported here: it takes 5 ms, and most daemons that people start have no file.
        from fscache.logfile import LogFile

        file = LogFile(log_path(path), rotate_bytes)
        log_to(file, level)
        dump_fd = file.dump_fd
        signal.signal(signal.SIGHUP, lambda number, frame: file.want_reopen())
    faulthandler.register(signal.SIGUSR1, file=dump_fd, all_threads=True)
    faulthandler.enable(file=dump_fd, all_threads=True)
