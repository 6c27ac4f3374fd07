"""What a test may leave behind, told from what others open, close and mount meanwhile.

Threads of earlier tests of a process may still close files and write to the log, and another
process of pytest mounts images at the same time: lists of before and after are rarely equal.
"""

import logging
import os
import time
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60


def open_files() -> set[str]:
    """Return the open descriptors of this process, each with what it refers to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the listing itself, or a thread's
            continue
    return found


@contextmanager
def no_open_file_left():
    """Fail when a descriptor stays that was not there at the beginning: those of threads go."""
    before = open_files()
    yield
    new = open_files() - before
    end = time.monotonic() + SECONDS
    while left := new & open_files():
        assert time.monotonic() < end, left
        time.sleep(0.05)


@contextmanager
def no_erofs_left():
    """Fail when a file system that appeared in the body stays: those of other tests go."""
    sysfs = Path("/sys/fs/erofs")
    before = set(os.listdir(sysfs))
    yield
    new = set(os.listdir(sysfs)) - before
    end = time.monotonic() + SECONDS
    while left := new & set(os.listdir(sysfs)):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def said(caplog, logger: str) -> list[logging.LogRecord]:
    """Return what one logger said; a thread of an earlier test may say something, too."""
    return [record for record in caplog.records if record.name == logger]


def loops_over(place: Path) -> list[str]:
    """Return the loop devices whose backing file is `place`, or lies below it."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = backing.read_text().removesuffix("\n")
        except OSError:  # let go meanwhile, by its user
            continue
        if Path(file).is_relative_to(place):
            found.append(backing.parents[1].name)
    return found
