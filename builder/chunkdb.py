"""The database of chunks and blobs that dictionaries are chosen from: the real tool's tables.

Rows of earlier runs stay and count, which is what a database in a file is for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

from builder.errors import BuildError

__all__ = ["BlobRow", "ChunkDatabase", "ChunkRow", "database_path"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (
    id INTEGER PRIMARY KEY, image_reference TEXT, version TEXT, chunk_blob_id TEXT NOT NULL,
    chunk_digest TEXT, chunk_crc32 INT, chunk_compressed_size INT, chunk_uncompressed_size INT,
    chunk_compressed_offset INT, chunk_uncompressed_offset INT
);
CREATE TABLE IF NOT EXISTS blob (
    id INTEGER PRIMARY KEY, blob_id TEXT NOT NULL, blob_compressed_size INT,
    blob_uncompressed_size INT, blob_compressor TEXT, blob_meta_ci_compressed_size INT,
    blob_meta_ci_uncompressed_size INT, blob_meta_ci_offset INT
);
"""
# Rows of earlier runs may be anybody's, and SQLite does not insist on declared types. Digests are
# decoded when they are chosen.
_BROKEN_ROWS = """
SELECT 1 FROM chunk WHERE NOT (
    typeof(image_reference) = 'text' AND typeof(version) = 'text'
    AND typeof(chunk_blob_id) = 'text' AND typeof(chunk_digest) = 'text'
    AND typeof(chunk_crc32) = 'integer' AND chunk_crc32 BETWEEN 0 AND 4294967295
    AND typeof(chunk_compressed_size) = 'integer'
    AND chunk_compressed_size BETWEEN 0 AND 4294967295
    AND typeof(chunk_uncompressed_size) = 'integer'
    AND chunk_uncompressed_size BETWEEN 0 AND 4294967295
    AND typeof(chunk_compressed_offset) = 'integer' AND chunk_compressed_offset >= 0
    AND typeof(chunk_uncompressed_offset) = 'integer' AND chunk_uncompressed_offset >= 0)
UNION ALL SELECT 1 FROM blob WHERE NOT (
    typeof(blob_id) = 'text' AND typeof(blob_compressor) = 'text'
    AND typeof(blob_compressed_size) = 'integer' AND blob_compressed_size >= 0
    AND typeof(blob_uncompressed_size) = 'integer' AND blob_uncompressed_size >= 0
    AND typeof(blob_meta_ci_compressed_size) = 'integer' AND blob_meta_ci_compressed_size >= 0
    AND typeof(blob_meta_ci_uncompressed_size) = 'integer' AND blob_meta_ci_uncompressed_size >= 0
    AND typeof(blob_meta_ci_offset) = 'integer' AND blob_meta_ci_offset >= 0)
LIMIT 1
"""
_MEMORY = ":memory:"


class ChunkRow(NamedTuple):
    """A reference of an image to a chunk; sizes and offsets in bytes, the digest in hex."""

    image: str
    version: str
    blob_id: str
    digest: str
    crc32c: int
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int


class BlobRow(NamedTuple):
    """A blob; `ci_*` place its compression table, in bytes."""

    blob_id: str
    compressed_size: int
    uncompressed_size: int
    compressor: str
    ci_compressed_size: int
    ci_uncompressed_size: int
    ci_offset: int


_INSERT_CHUNK = """
INSERT INTO chunk (image_reference, version, chunk_blob_id, chunk_digest, chunk_crc32,
    chunk_compressed_size, chunk_uncompressed_size, chunk_compressed_offset,
    chunk_uncompressed_offset) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_INSERT_BLOB = """
INSERT INTO blob (blob_id, blob_compressed_size, blob_uncompressed_size, blob_compressor,
    blob_meta_ci_compressed_size, blob_meta_ci_uncompressed_size, blob_meta_ci_offset)
    VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_SELECT_CHUNKS = """
SELECT image_reference, version, chunk_blob_id, chunk_digest, chunk_crc32,
    chunk_compressed_size, chunk_uncompressed_size, chunk_compressed_offset,
    chunk_uncompressed_offset FROM chunk WHERE ?1 IS NULL OR chunk_blob_id = ?1 ORDER BY id
"""
_SELECT_BLOB = """
SELECT blob_id, blob_compressed_size, blob_uncompressed_size, blob_compressor,
    blob_meta_ci_compressed_size, blob_meta_ci_uncompressed_size, blob_meta_ci_offset
    FROM blob WHERE blob_id = ?
"""


def database_path(url: str) -> str:
    """Return the path in `sqlite:///path` or `sqlite://:memory:`; raise `BuildError`."""
    kind, separator, path = url.partition("://")
    if not separator or "://" in path or not path.startswith(("/", ":")):
        raise BuildError(f"Invalid database URL: {url}")
    if kind != "sqlite":
        raise BuildError(
            f"Unsupported database type: {kind}", expected="sqlite:///path/to/chunkdict.db"
        )
    return path


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise BuildError(f"database failed ({error})", path=path) from error


class ChunkDatabase:
    """An open database; a context manager that keeps what was added when all went well.

    Args:
        path: a file, which is made when it is not there, or `:memory:`.

    Raises:
        BuildError: from every step; names the file.
    """

    def __init__(self, path: str = _MEMORY) -> None:
        self._path = path
        with _errors(path):
            self._connection = sqlite3.connect(path)
            self._connection.executescript(_SCHEMA)
            broken = self._connection.execute(_BROKEN_ROWS).fetchone()
        if broken is not None:
            raise BuildError("database has a row that is neither a chunk nor a blob", path=path)

    def add(self, blobs: Iterable[BlobRow], chunks: Iterable[ChunkRow]) -> None:
        """Add the rows of one image."""
        with _errors(self._path):
            self._connection.executemany(_INSERT_BLOB, blobs)
            self._connection.executemany(_INSERT_CHUNK, chunks)

    def chunks(self, blob_id: str | None = None) -> list[ChunkRow]:
        """Return all chunks, or those of one blob, in the order in which they were added."""
        with _errors(self._path):
            rows = self._connection.execute(_SELECT_CHUNKS, (blob_id,))
            return [ChunkRow._make(row) for row in rows]

    def blob(self, blob_id: str) -> BlobRow:
        """Return a blob."""
        with _errors(self._path):
            row = self._connection.execute(_SELECT_BLOB, (blob_id,)).fetchone()
        if row is None:
            raise BuildError("blob that is not in the database", path=self._path, blob=blob_id)
        return BlobRow._make(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with _errors(self._path):
                    self._connection.commit()
        finally:
            self._connection.close()
