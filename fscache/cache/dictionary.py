"""Blobs of generated chunk dictionaries: what their image says, put right by the blob itself.

A generated dictionary counts chunks in its own way, and so do images that were built with
it: indexes, number of chunks and sizes in their tables are not those of the blob (spec
rafs-v6 4.12). Places in the uncompressed space are, so the blob's own table gives the rest,
and the cache of the blob is the same as for every other image on it.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

from erofs.blobmeta import CI_HEADER_SIZE
from erofs.citable import CompressionTable
from erofs.errors import CorruptStructure, error_context
from erofs.rafs import BlobFeatures
from fscache.backend.base import BlobReader
from fscache.backend.retry import RetryPolicy
from fscache.cache.layer import tables_of
from fscache.cache.plan import BlobPlan
from fscache.cache.tablefile import TableFile

__all__ = ["put_right", "resolve"]


def resolve(plan: BlobPlan, directory: Path, reader: BlobReader, retry: RetryPolicy) -> BlobPlan:
    """Return a plan with the blob's own numbers; one that has them already as it is.

    Asks the blob for its table, unless that is in the cache directory.

    Raises:
        CorruptStructure: a chunk is not where the dictionary says.
        NydusError: there is no sound table.
    """
    if not plan.entry.features & BlobFeatures.IS_CHUNKDICT_GENERATED:
        return plan
    stop = threading.Event()
    return TableFile(directory, reader.blob_id, plan.entry).use(
        partial(put_right, plan),
        lambda start, length: retry.run(lambda: tables_of(reader).read_at(start, length), stop),
    )


def put_right(plan: BlobPlan, table: CompressionTable) -> BlobPlan:
    """Return the plan with the blob's own numbers.

    Raises:
        CorruptStructure: a chunk is not where the dictionary says.
    """
    header, entry = table.header, plan.entry
    by_offset = {chunk.uncompressed_offset: index for index, chunk in enumerate(table.entries)}
    chunks = []
    for info in plan.chunks:
        with error_context(blob=entry.id, chunk=info.chunk_index):
            index = by_offset.get(info.uncompressed_offset)
            if index is None or not table.agrees(info._replace(chunk_index=index)):
                raise CorruptStructure(
                    "blob has another chunk than its dictionary", offset=info.uncompressed_offset
                )
            chunks.append(info._replace(chunk_index=index))
    table_end = header.ci_offset + header.ci_compressed_size + CI_HEADER_SIZE
    mended = entry._replace(
        chunk_count=header.ci_entries,
        features=entry.features & ~BlobFeatures.IS_CHUNKDICT_GENERATED,
        # As much as is known: the chunks lie before their table.
        compressed_size=max(entry.compressed_size, table_end),
        uncompressed_size=table.uncompressed_size,
        blob_toc_size=0,
        ci_compressor=header.ci_compressor,
    )
    return plan._replace(entry=mended, chunks=chunks)
