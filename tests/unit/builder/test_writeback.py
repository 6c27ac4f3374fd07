"""Writing begins early, where the C library can say so."""

from __future__ import annotations

import ctypes

import pytest

from builder import output, writeback
from builder.output import OutputFile
from builder.writeback import begin_writeback


@pytest.fixture(autouse=True)
def forget():
    writeback._sync_file_range.cache_clear()
    yield
    writeback._sync_file_range.cache_clear()


def test_a_file_is_as_it_was_written(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"content")
        begin_writeback(file.fileno(), 0, 7)
        begin_writeback(-1, 0, 7)
    assert path.read_bytes() == b"content"


def test_a_library_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    begin_writeback(-1, 0, 7)


@pytest.mark.parametrize(
    "write",
    [lambda file: file.write_all([bytes(30), bytes(40)]), lambda file: file.write(bytes(70))],
)
def test_every_part_is_begun_once(tmp_path, monkeypatch, write):
    begun = []
    monkeypatch.setattr(output, "begin_writeback", lambda fd, *place: begun.append(place))
    monkeypatch.setattr(output, "WRITEBACK_BYTES", 100)
    with OutputFile(tmp_path / "file", 0o644) as file:
        for _ in range(5):
            write(file)
        file.commit()
    assert begun == [(0, 140), (140, 140)]
    assert (tmp_path / "file").stat().st_size == 350
