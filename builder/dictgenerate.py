"""Generate a chunk dictionary: a bootstrap that lists chunks worth sharing (spec 4.12)."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builder.bootstrap import load_tree, open_any_bootstrap
from builder.build import write_bootstrap_file
from builder.chunkdb import BlobRow, ChunkDatabase, ChunkRow
from builder.chunkdict import foreign_blobs
from builder.consistency import Profile, profile_of, require_profile
from builder.dictselect import choose
from builder.errors import BuildError
from builder.listing import log_features
from builder.options import BuildResult
from builder.report import COMPRESSOR_NAMES
from erofs import Bootstrap, BootstrapSpec, Chunk, Node, write_bootstrap
from erofs.blobmeta import DIGEST_SIZE
from erofs.layout import BLOCK_SIZE
from erofs.rafs import BlobEntry, BlobFeatures, ChunkFlags, Compressor, Digester

__all__ = ["DictionaryOptions", "generate_dictionary"]

logger = logging.getLogger(__name__)

DICTIONARY_NAME = b"chunkdict"
_DIRECTORY_MODE = stat.S_IFDIR | 0o660
_FILE_MODE = stat.S_IFREG | 0o660
_OWNER = 1000


@dataclass(frozen=True, slots=True)
class DictionaryOptions:
    """Where chunks are collected, and where the dictionary goes.

    Args:
        database: a file of SQLite, or `:memory:`.
        bootstrap: path of the dictionary; None puts it into `blob_dir` under its SHA-256.
    """

    database: str = ":memory:"
    bootstrap: Path | None = None
    blob_dir: Path | None = None


@dataclass(slots=True)
class _Collector:
    """Takes over the chunks of images; remembers what their blobs are."""

    database: ChunkDatabase
    profile: Profile | None = None
    compressor: Compressor = Compressor.NONE
    digester: Digester = Digester.BLAKE3
    features: int = BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC
    entries: dict[str, BlobEntry] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        """Add an image; the name of its directory ends with `image:version`."""
        words = path.absolute().parent.name.split(":")
        if len(words) < 2:
            raise BuildError("directory of a bootstrap is not named IMAGE:VERSION", path=path)
        with open_any_bootstrap(path) as opened:
            log_features(opened)
            image = self._fitting(opened if isinstance(opened, Bootstrap) else None, path)
            blobs = foreign_blobs(image, path)
            chunks = _chunk_rows(image, blobs, *words[-2:])
            self.database.add(map(_blob_row, blobs), chunks)
        for blob in blobs:
            self.entries.setdefault(blob.id, blob)

    def _fitting(self, image: Bootstrap | None, path: Path) -> Bootstrap:
        if image is None:
            raise BuildError("RAFS v5 cannot be in a dictionary, it is not written", path=path)
        if self.profile is None:
            self.profile = profile_of(image)
            self.compressor, self.digester = image.compressor, image.digester
            if image.blobs:
                self.features = image.blobs[0].features & ~BlobFeatures.INLINED_FS_META
        if image.is_tarfs:
            raise BuildError("tarfs has no digests for a dictionary", path=path)
        if image.digester is not self.digester:
            raise BuildError(
                "Inconsistent configuration of digester",
                path=path,
                expected=self.digester.name.lower(),
                got=image.digester.name.lower(),
            )
        return require_profile(self.profile, image, path)


def _blob_row(blob: BlobEntry) -> BlobRow:
    return BlobRow(
        blob.id,
        blob.compressed_size,
        blob.uncompressed_size,
        COMPRESSOR_NAMES[Compressor(blob.compressor)],
        blob.ci_compressed_size,
        blob.ci_uncompressed_size,
        blob.ci_offset,
    )


def _chunk_rows(
    image: Bootstrap, blobs: Sequence[BlobEntry], name: str, version: str
) -> Iterator[ChunkRow]:
    """Yield a row for each reference of a chunk, depth first."""
    stack = [load_tree(image)]
    while stack:
        node = stack.pop()
        for chunk in node.chunks:
            yield ChunkRow(
                name,
                version,
                blobs[chunk.blob_index].id,
                chunk.digest.hex(),
                chunk.crc32c,
                chunk.compressed_size,
                chunk.uncompressed_size,
                chunk.compressed_offset,
                chunk.uncompressed_offset,
            )
        if node.children:
            stack += [node.children[child] for child in sorted(node.children, reverse=True)]


def _digest(row: ChunkRow) -> bytes:
    """Return the digest in a row, which an earlier run may not have written."""
    try:
        digest = bytes.fromhex(row.digest)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_SIZE:
        raise BuildError("database has a chunk without a digest", blob=row.blob_id)
    return digest


def _completed(database: ChunkDatabase, chosen: Iterable[ChunkRow]) -> list[ChunkRow]:
    """Return all chunks of the blobs that have chosen ones, each once, sorted by place."""
    rows: list[ChunkRow] = []
    for blob_id in sorted({row.blob_id for row in chosen}):
        found = {
            (row.compressed_offset, row.uncompressed_offset, row.digest): row
            for row in database.chunks(blob_id)
        }
        size = sum(row.uncompressed_size for row in found.values())
        if size < BLOCK_SIZE:
            logger.warning("Blob with id '%s' is smaller than %s bytes.", blob_id, BLOCK_SIZE)
        else:
            rows += [found[place] for place in sorted(found)]
    return rows


class _Writer:
    """Makes the one file that refers to all chunks, and the blob table of a dictionary."""

    def __init__(self, collector: _Collector, profile: Profile) -> None:
        self._collector = collector
        self._chunk_size = profile.chunk_size
        self._blobs: dict[str, BlobEntry] = {}
        self.file = Node(_FILE_MODE)

    def add(self, row: ChunkRow) -> None:
        """Append a chunk to the file; raise `BuildError`."""
        blob = self._blobs.get(row.blob_id) or self._entry(row.blob_id)
        index = blob.chunk_count
        self._blobs[row.blob_id] = blob._replace(chunk_count=index + 1)
        flags = ChunkFlags.ENCRYPTED if blob.cipher else ChunkFlags(0)
        # Of chunks in batches the stored size is not known here; it is 0.
        if 0 < row.compressed_size != row.uncompressed_size and blob.compressor:
            flags |= ChunkFlags.COMPRESSED
        self.file.chunks.append(
            Chunk(
                digest=_digest(row),
                blob_index=blob.blob_index,
                flags=flags,
                compressed_size=row.compressed_size,
                uncompressed_size=row.uncompressed_size,
                compressed_offset=row.compressed_offset,
                uncompressed_offset=row.uncompressed_offset,
                file_offset=self.file.size,
                chunk_index=index,
                crc32c=row.crc32c,
            )
        )
        self.file.size += row.uncompressed_size

    def _entry(self, blob_id: str) -> BlobEntry:
        """Return the entry of a blob, its chunks not counted yet; raise `BuildError`."""
        row = self._collector.database.blob(blob_id)
        known = self._collector.entries.get(blob_id)
        generated = BlobFeatures.IS_CHUNKDICT_GENERATED
        if known is not None:
            return known._replace(
                blob_index=len(self._blobs), chunk_count=0, features=known.features | generated
            )
        compressors = {name: compressor for compressor, name in COMPRESSOR_NAMES.items()}
        compressor = compressors.get(row.compressor, self._collector.compressor)
        is_raw = row.ci_compressed_size == row.ci_uncompressed_size
        return BlobEntry(
            blob_id=blob_id.encode("ascii", "backslashreplace"),
            blob_index=len(self._blobs),
            chunk_size=self._chunk_size,
            chunk_count=0,
            compressor=compressor,
            digester=self._collector.digester,
            features=self._collector.features | generated,
            compressed_size=row.compressed_size,
            uncompressed_size=row.uncompressed_size,
            blob_toc_size=0,
            ci_compressor=Compressor.NONE if is_raw else compressor,
            ci_offset=row.ci_offset,
            ci_compressed_size=row.ci_compressed_size,
            ci_uncompressed_size=row.ci_uncompressed_size,
        )

    @property
    def blobs(self) -> list[BlobEntry]:
        """The blob table."""
        return list(self._blobs.values())


def generate_dictionary(sources: Sequence[Path], options: DictionaryOptions) -> BuildResult:
    """Choose common chunks of images and write them down as a dictionary.

    Args:
        sources: bootstraps, in directories whose names end with `image:version`.
        options: where chunks of earlier runs are, and where the dictionary goes.

    Raises:
        BuildError: sources that do not fit together, or a database that fails.
        FormatError: a broken source.
    """
    result = BuildResult()
    with ChunkDatabase(options.database) as database:
        collector = _Collector(database)
        with result.timed("load_tree_from_bootstrap"):
            for path in sources:
                collector.add(path)
        choice = choose(database.chunks())
        rows = _completed(database, choice.chunks)
        logger.info("The length of chunkdict is %s", len(rows))
        logger.info("It is not recommended to use image deduplication")
        for name in choice.noise:
            logger.info("%s", name)
        if collector.profile is None:
            raise BuildError("no images for a dictionary")
        writer = _Writer(collector, collector.profile)
        for row in rows:
            writer.add(row)
        root = Node(
            _DIRECTORY_MODE, uid=_OWNER, gid=_OWNER, children={DICTIONARY_NAME: writer.file}
        )
        with result.timed("dump_bootstrap"):
            data = write_bootstrap(
                BootstrapSpec(
                    root=root,
                    blobs=writer.blobs,
                    chunk_size=collector.profile.chunk_size,
                    compressor=collector.compressor,
                    digester=collector.digester,
                    force_xattr_flag=True,
                    dictionary=True,
                )
            )
            result.bootstrap = write_bootstrap_file(data, options.bootstrap, options.blob_dir)
    result.blobs = [blob.id for blob in writer.blobs]
    result.compressor = collector.compressor
    return result
