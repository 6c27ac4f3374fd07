"""Original layers as blobs: their chunks are in one blob, the tables in another (rafs-v6 4.10)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from fscache.backend import Backend, BlobReader
from fscache.cache.plan import BlobPlan

__all__ = ["LayerReader", "open_reader", "tables_of"]


class LayerReader:
    """Reads a layer; `tables` reads the blob that says where in it the chunks are."""

    def __init__(self, layer: BlobReader, tables: BlobReader) -> None:
        self._layer = layer
        self.tables = tables

    @property
    def blob_id(self) -> str:
        """The name of the layer."""
        return self._layer.blob_id

    def size(self) -> int:
        """Return the length of the layer in bytes; raise `BackendError`."""
        return self._layer.size()

    def read_at(self, offset: int, length: int) -> bytes:
        """Read a range of the layer; raise `BackendError`."""
        return self._layer.read_at(offset, length)

    def stream(self, offset: int) -> AbstractContextManager[Iterator[bytes]]:
        """Read the layer from an offset on, as `BlobReader.stream`."""
        return self._layer.stream(offset)


def open_reader(backend: Backend, plan: BlobPlan) -> BlobReader:
    """Return a reader of a blob; raise `BackendError` for an id that is refused."""
    reader = backend.open(plan.entry.id)
    return LayerReader(reader, backend.open(plan.tables_id)) if plan.tables_id else reader


def tables_of(reader: BlobReader) -> BlobReader:
    """Return the reader of a blob's tables, which for most blobs is the same."""
    return reader.tables if isinstance(reader, LayerReader) else reader
