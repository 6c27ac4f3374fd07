"""Progress lines: there on a terminal, and nothing of them in a pipe."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile

import pytest

_CHUNK = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a tar, and the image of it."""
    top = tmp_path_factory.mktemp("progress")
    with tarfile.open(top / "layer.tar", "w") as tar:
        info = tarfile.TarInfo("file")
        info.size = 2 * _CHUNK
        tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    _run(_commands(top)["chunking"])
    return top


def _commands(top):
    image = ["--bootstrap", str(top / "boot"), "--blob-dir", str(top)]
    return {
        "chunking": ["create", "-t", "tar-rafs", "-B", str(top / "boot"), "-D", str(top),
                     str(top / "layer.tar")],
        "merging": ["merge", "--bootstrap", str(top / "merged"), str(top / "boot")],
        "checking": ["check", "--bootstrap", str(top / "boot")],
        "unpacking": ["unpack", *image, "--output", str(top / "unpacked")],
        "exporting": ["export", "--block", "-B", str(top / "boot"), "-D", str(top), "-O",
                      str(top / "disk")],
    }  # fmt: skip


def _run(words, stderr=subprocess.PIPE):
    """Run the program; return what it wrote to its standard error, where that is a pipe."""
    command = [sys.executable, "-m", "builder.cli", *words]
    return subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        check=True,
        timeout=60,
    ).stderr


def _drained(terminal):
    parts = []
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            # Linux says EIO when nobody has the other end any more.
            return b"".join(parts)
        if not data:
            return b"".join(parts)
        parts.append(data)


@pytest.mark.parametrize("what", ["chunking", "merging", "checking", "unpacking", "exporting"])
def test_progress_is_shown_on_a_terminal_alone(files, what):
    words = _commands(files)[what]
    terminal, end = os.openpty()
    try:
        _run(words, end)
        os.close(end)
        shown = _drained(terminal)
    finally:
        os.close(terminal)
    line = b"\r" + what.encode() + b": "
    assert line in shown
    # The line is gone when the program is.
    assert shown.rindex(b"\r\033[K") > shown.rindex(line)
    assert b"\r" not in _run(words)
