"""Blobs on their way to a place, when something goes wrong on it."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest

from builder.convert.layer import push_blob
from builder.oci.errors import ImageError
from builder.oci.layout import BlobFolder
from builder.oci.objects import _Spool
from builder.oci.place import uploading

FULL = 64 << 10


@contextmanager
def full_disk():
    """Let no file grow beyond some bytes, as on a full disk: a write fails, and each after it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _fill(upload):
    for _ in range(100):
        upload.write(bytes(FULL // 3))


@pytest.fixture
def folder(tmp_path):
    place = BlobFolder(tmp_path / "blobs")
    yield place
    place.close()


def test_nothing_stays_of_a_blob_that_did_not_fit(folder, tmp_path):
    with (
        full_disk(),
        pytest.raises(ImageError, match="writing failed"),
        uploading(folder) as upload,
    ):
        _fill(upload)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_spool_that_does_not_fit_says_so(tmp_path):
    with full_disk():
        spool = _Spool(None, tmp_path)
        with pytest.raises(ImageError, match=f"{tmp_path}: writing failed"):
            _fill(spool)
        # What is left in the buffer fails again, and there is nobody to tell.
        spool.abort()


def test_a_blob_that_cannot_be_read_leaves_nothing(folder, tmp_path):
    with pytest.raises(OSError, match="Is a directory"):
        push_blob(folder, tmp_path)
    assert list((tmp_path / "blobs").iterdir()) == []
