"""Run the demo: settings from the environment, errors in one line, cleaning up in every case.

DEMO_SOURCE  a tar or a directory to show in place of Debian
DEMO_DIR     where the work directory is made (default /var/tmp)
KEEP         anything: keep the work directory
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from erofs.errors import NydusError
from tests.demo.report import Printer
from tests.demo.rootfs import get_source
from tests.demo.run import Cleanup, DemoError, Processes, Signals, Stopped, remove_tree
from tests.demo.steps import Demo

EXIT_FAILURE = 1
# Paths of sockets have 107 bytes; ours is a name of this demo longer than the directory.
LONGEST_DIRECTORY = 107 - len("/nydus-demo-12345678/api.sock")


def _make_work(cleanup: Cleanup, signals: Signals, out: Printer) -> Path:
    base = Path(os.environ.get("DEMO_DIR") or "/var/tmp")
    if len(os.fsencode(base.absolute())) > LONGEST_DIRECTORY:
        raise DemoError(f"DEMO_DIR={base} is too long for sockets in it")
    with signals.held():
        try:
            work = Path(tempfile.mkdtemp(prefix="nydus-demo-", dir=base.absolute()))
        except OSError as error:
            raise DemoError(f"no work directory in DEMO_DIR={base}: {error.strerror}") from error
        keep = bool(os.environ.get("KEEP"))
        cleanup.add(lambda: f"{work}, because of KEEP" if keep else remove_tree(work))
    out.line("nydus-erofs: a filesystem as an image whose data come when they are read", 0)
    out.line(f"Commands are those of {Path(sys.executable).parent}, run in {Path.cwd()}.", 0)
    template = base.absolute() / "nydus-demo-XXXXXXXX"
    out.line(f"$ W=$(mktemp -d {template}); mkdir $W/blobs $W/mnt $W/source", 0)
    out.names[work] = "$W"
    return work


def _show(cleanup: Cleanup, signals: Signals, out: Printer) -> int:
    work = _make_work(cleanup, signals, out)
    processes = Processes(signals)
    cleanup.add(processes.end_all)
    given = os.environ.get("DEMO_SOURCE")
    source = get_source(Path(given).resolve() if given else None, work, processes, out)
    return 0 if Demo(work, processes, cleanup, out).show(source) else EXIT_FAILURE


def _guarded(cleanup: Cleanup, signals: Signals, out: Printer) -> tuple[int, list[str]]:
    """Return the exit status and what to say about it."""
    try:
        try:
            return _show(cleanup, signals, out), []
        finally:
            # Either this is reached, or a signal came and did the same.
            signals.ignore()
    except Stopped as stop:
        return 128 + stop.number, [f"Interrupted by {signal.Signals(stop.number).name}"]
    except (DemoError, NydusError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read the output has seen enough; what comes now goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILURE, []
        details = error.details if isinstance(error, DemoError) else []
        return EXIT_FAILURE, [f"Error: {error}", *(f"  {line}" for line in details)]


def main() -> int:
    """Run the demo and return its exit status."""
    signals, cleanup, out = Signals(), Cleanup(), Printer()
    signals.install()
    left: list[str] = []
    try:
        status, lines = _guarded(cleanup, signals, out)
    finally:
        left = cleanup.run()
    if lines and not left:
        lines[0] += "; everything is cleaned up"
    for line in lines:
        print(line, file=sys.stderr)
    if not lines and not left:
        out.line("Everything is cleaned up.", 0)
    for line in left:
        print(f"Left behind: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
