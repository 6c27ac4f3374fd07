"""What is written at once is all there, also where the disk takes a part of it at first."""

from __future__ import annotations

import errno
import os

import pytest

from builder.errors import BuildError
from builder.output import OutputFile

PIECES = [b"first", b"", memoryview(b"second"), bytearray(b"third"), b"last"]


@pytest.mark.parametrize("taken", [0, 3, 5, 8, 17, 20])
def test_pieces_follow_what_was_written_before(tmp_path, monkeypatch, taken):
    writev = os.writev

    def partly(descriptor, pieces):
        return writev(descriptor, [b"".join(pieces)[:taken]])

    monkeypatch.setattr(os, "writev", partly)
    with OutputFile(tmp_path / "file", 0o644) as output:
        output.write(b"before ")
        output.write_all(PIECES)
        output.write_all(PIECES)
        output.commit()
    assert (tmp_path / "file").read_bytes() == b"before " + b"".join(PIECES) * 2


def test_a_full_disk_is_told_with_the_name(tmp_path, monkeypatch):
    def full(descriptor, pieces):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    with (
        pytest.raises(BuildError, match=r"file: writing failed \(No space"),
        OutputFile(tmp_path / "file", 0o644) as output,
    ):
        output.write_all(PIECES)
    assert not list(tmp_path.iterdir())
