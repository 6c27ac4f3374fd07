"""Where a daemon's log goes, and the stacks of all its threads when they are asked for.

On demand the stacks are written with the interpreter's lock held: other threads' frames that
change meanwhile have crashed a daemon. When a fatal signal ends it anyway, the C handler of
`faulthandler` writes them without that lock, so that a daemon that hangs can say where.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
from pathlib import Path

from erofs.console import log_place, log_to

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

        file = LogFile(log_place(path), rotate_bytes)
        log_to(file, level)
        dump_fd = file.dump_fd
        signal.signal(signal.SIGHUP, lambda number, frame: file.want_reopen())
    signal.signal(
        signal.SIGUSR1,
        lambda number, frame: faulthandler.dump_traceback(file=dump_fd, all_threads=True),
    )
    faulthandler.enable(file=dump_fd, all_threads=True)
