"""The daemon's log: names, rotation, a new file on request, stacks after it."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from erofs.console import log_path
from fscache.logfile import KEPT_FILES, LogFile

ROOT = Path(__file__).parents[3]


@pytest.fixture
def make(tmp_path):
    made = []

    def make(rotate_bytes=0, name="the.log"):
        made.append(LogFile(tmp_path / name, rotate_bytes))
        return made[-1]

    yield make
    for handler in made:
        handler.close()
        os.close(handler.dump_fd)


def say(handler, text):
    handler.handle(logging.LogRecord("x", logging.INFO, __file__, 1, text, (), None))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("given", "used"),
    [("a/nydusd", "a/nydusd.log"), ("a/x.txt", "a/x.txt"), (".x", ".x.log"), ("v1.2", "v1.2")],
)
def test_names_without_extension(given, used):
    assert log_path(Path(given)) == Path(used)


@pytest.mark.parametrize("given", ["/", ".", "/dev/null", "/dev/stdout"])
def test_what_is_no_plain_file_keeps_its_name(given):
    assert log_path(Path(given)) == Path(given)


def test_appends_and_never_rotates_by_default(tmp_path, make):
    (tmp_path / "the.log").write_text("before\n")
    handler = make()
    for _ in range(100):
        say(handler, "x" * 1000)
    assert names(tmp_path) == ["the.log"]
    assert (tmp_path / "the.log").read_text().startswith("before\nxxx")


def test_rotates_by_size_and_keeps_some(tmp_path, make):
    handler = make(rotate_bytes=100)
    for number in range(30):
        say(handler, f"{number:02d}" * 30)
    kept = ["the.log", *(f"the.log.{number}" for number in range(1, KEPT_FILES + 1))]
    assert names(tmp_path) == sorted(kept)
    assert all((tmp_path / name).stat().st_size <= 100 for name in kept)
    texts = [(tmp_path / name).read_text() for name in kept]
    assert [text[:2] for text in texts] == [str(number) for number in range(29, 18, -1)]


def test_no_line_is_lost_where_nothing_can_be_renamed(tmp_path, make):
    handler = make(rotate_bytes=100)
    # A directory in the place of the oldest file cannot be removed as one.
    for number in (KEPT_FILES - 1, KEPT_FILES):
        (tmp_path / f"the.log.{number}").mkdir()
    lines = [f"{number}" * 60 for number in range(5)]
    for line in lines:
        say(handler, line)
    assert (tmp_path / "the.log").read_text().split() == lines


def test_reopen_after_somebody_renamed_it(tmp_path, make):
    handler = make()
    say(handler, "one")
    (tmp_path / "the.log").rename(tmp_path / "old")
    say(handler, "two")
    assert names(tmp_path) == ["old"]
    handler.want_reopen()
    say(handler, "three")
    assert (tmp_path / "old").read_text() == "one\ntwo\n"
    assert (tmp_path / "the.log").read_text() == "three\n"


def test_reopen_that_fails_goes_on_with_the_old_file(tmp_path, make):
    (tmp_path / "sub").mkdir()
    handler = make(name="sub/the.log")
    (tmp_path / "sub").rename(tmp_path / "gone")
    handler.want_reopen()
    say(handler, "still here")
    assert "still here" in (tmp_path / "gone/the.log").read_text()


@pytest.mark.parametrize("change", ["reopen", "rotate"])
def test_dumps_follow_the_file_by_one_descriptor(tmp_path, make, change):
    handler = make(rotate_bytes=0 if change == "reopen" else 20)
    number = handler.dump_fd
    say(handler, "first line of the log")
    if change == "reopen":
        (tmp_path / "the.log").rename(tmp_path / "the.log.1")
        handler.want_reopen()
    say(handler, "second")
    os.write(handler.dump_fd, b"dump\n")
    assert handler.dump_fd == number
    assert not os.get_inheritable(number)
    assert (tmp_path / "the.log").read_text() == "second\ndump\n"


_PROGRAM = """
import logging, os, signal, sys, threading
from pathlib import Path
from fscache.daemonlog import set_up_daemon_log
set_up_daemon_log("info", Path(sys.argv[1]) if len(sys.argv) > 1 else None, 0)
waiting = threading.Event()
def a_thread_that_waits():
    waiting.set()
    threading.Event().wait()
threading.Thread(target=a_thread_that_waits, daemon=True).start()
waiting.wait()
os.kill(os.getpid(), signal.SIGUSR1)
if len(sys.argv) > 1:
    os.rename(sys.argv[1], sys.argv[1] + ".old")
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)
logging.getLogger("x").info("alive")
os.abort()
"""


def run(*args):
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_signals_dump_all_stacks_to_standard_error():
    result = run()
    assert result.returncode == -signal.SIGABRT
    before, after = result.stderr.split(" INFO alive\n")
    for text in (before, after):
        # All threads of the dump, the one that waits too.
        assert "a_thread_that_waits" in text
        assert "most recent call first" in text
    assert "Fatal Python error: Aborted" in after


def test_signals_with_a_file(tmp_path):
    # The directory is made, as by the real daemon.
    folder = tmp_path / "logs" / "nydusd"
    result = run(str(folder / "d.log"))
    assert (result.returncode, result.stderr) == (-signal.SIGABRT, "")
    old, new = (folder / "d.log.old").read_text(), (folder / "d.log").read_text()
    # The file is opened anew by the next line; the dump before it is in the old one.
    assert old.count("Current thread") == 2
    assert " INFO alive\nFatal Python error: Aborted" in new
