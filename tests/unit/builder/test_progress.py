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
    """Make two tars, an image of one, and one of both, whose small blobs are worth joining."""
    top = tmp_path_factory.mktemp("progress")
    for name in ("layer", "upper"):
        with tarfile.open(top / f"{name}.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = 2 * _CHUNK
            tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    (top / "meta").mkdir()
    _run(_create(top, "layer"))
    _run(_create(top, "upper"))
    _run(_merge(top, "both", "layer", "upper"))
    (top / "list.json").write_text('{"version": "v1", "files": [{"path": "/layer"}]}')
    return top


def _create(top, layer):
    # Merging takes the name of metadata for the id of its blob.
    return ["create", "-t", "tar-rafs", "-B", str(top / "meta" / layer), "-D", str(top),
            "--blob-id", layer, str(top / f"{layer}.tar")]  # fmt: skip


def _merge(top, target, *layers):
    sources = [str(top / "meta" / layer) for layer in layers]
    return ["merge", "--bootstrap", str(top / target), *sources]


def _commands(top):
    image = ["--bootstrap", str(top / "meta" / "layer"), "--blob-dir", str(top)]
    return {
        "chunking": _create(top, "layer"),
        "merging": _merge(top, "merged", "layer"),
        "checking": ["check", *image],
        "unpacking": ["unpack", *image, "--output", str(top / "unpacked")],
        "reading": ["check", *image, "--data"],
        "compacting": ["compact", "-B", str(top / "both"), "-D", str(top), "-O", str(top / "new")],
        "optimizing": ["optimize", *image, "--prefetch-files", str(top / "list.json"), "-O",
                       str(top / "optimized"), "--output-blob-dir", str(top)],
        "exporting": ["export", "--block", "-B", str(top / "both"), "-D", str(top), "-O",
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


@pytest.mark.parametrize(
    "what",
    ["chunking", "merging", "checking", "reading", "unpacking", "compacting", "optimizing",
     "exporting"],
)  # fmt: skip
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
