"""A Nydus image and what a container has changed on it: the image that has both.

The changes become blobs of their own on top of the blobs that there are; content that the image
has already is not stored again.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from builder.bootstrap import blob_ids, open_any_bootstrap
from builder.build import build
from builder.consistency import profile_of, require_profile
from builder.convert.bootlayer import Content, extract_bootstrap, write_bootstrap_layer
from builder.convert.copying import copy_layers, original_layers
from builder.convert.layer import push_blob
from builder.convert.rework import publish, store_config
from builder.convert.tail import LayerTail, read_tail
from builder.merge import MergeOptions, merge
from builder.oci import media
from builder.oci.config import ImageConfig, history_entry
from builder.oci.errors import ImageError
from builder.oci.place import PieceReader, Source, Target
from builder.oci.records import Descriptor, Manifest
from builder.options import BuildOptions, SourceType
from builder.prefetch import PrefetchPolicy
from builder.source.options import SourceOptions, WhiteoutSpec
from erofs.rafs import Compressor, Digester

__all__ = ["UPPER", "CommitBase", "PackedLayer", "pack_layer", "publish_commit"]

logger = logging.getLogger(__name__)

_TABLE = re.compile(r"[0-9a-f]{64}\.blob\.meta")
_PIECE_BYTES = 1 << 20
_EVERYTHING = (b"/",)
_COMMENT = "Nydus Commit"
UPPER = "upper"
_UPPER_COMMENT = f"{_COMMENT} {UPPER}"
# What was true of the image that is built on, and is not of the result.
_ORIGIN = (media.SOURCE_DIGEST, media.SOURCE_REFERENCE)


@dataclass(frozen=True, slots=True)
class CommitBase:
    """The image below.

    Args:
        source: where it is.
        manifest: of the image.
        config: of the image.
        layer: with its bootstrap.
        bootstrap: that bootstrap as a file.
        tables: other files of that layer, by name.
        commits: digests of the blobs that earlier commits have added.
    """

    source: Source
    manifest: Manifest
    config: ImageConfig
    layer: Descriptor
    bootstrap: Path
    tables: dict[str, Path]
    commits: tuple[str, ...]
    chunk_size: int = 0
    compressor: Compressor = Compressor.ZSTD
    digester: Digester = Digester.BLAKE3

    @classmethod
    def load(
        cls, source: Source, manifest: Manifest, config: ImageConfig, work: Path
    ) -> CommitBase:
        """Read the bootstrap of an image into a scratch directory.

        Raises:
            ImageError: the image is none of Nydus, or its blobs are somewhere else.
            NydusError: it cannot be read, or not be built on.
        """
        layer = manifest.bootstrap
        if layer is None:
            raise ImageError(f"not a nydus image: {source.name}")
        bootstrap = work / "bootstrap-base"
        tables: dict[str, Path] = {}

        def place(name: str) -> Path | None:
            if not _TABLE.fullmatch(name):
                return None
            return tables.setdefault(name, work / name)

        extract_bootstrap(source.pieces(layer), layer, bootstrap, place)
        found = layer.annotations.get(media.COMMIT_BLOBS, "")
        commits = tuple(found.split(",")) if found else ()
        if commits:
            logger.info("detected committed layers: %d", len(commits))
        with open_any_bootstrap(bootstrap) as opened:
            image = require_profile(profile_of(opened), opened, bootstrap)
            known = {one.hex for one in (*manifest.layers, *original_layers(manifest))}
            for blob in blob_ids(image, bootstrap):
                if blob not in known:
                    raise ImageError("a blob of the image is no layer of it", blob=blob)
            usual = image.compressor in (Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD)
            return cls(
                source, manifest, config, layer, bootstrap, tables, commits,
                image.chunk_size,
                image.compressor if usual else Compressor.ZSTD,
                image.digester,
            )  # fmt: skip

    @property
    def times(self) -> int:
        """How often the image was committed; the real tool leaves only that it was."""
        mine = [one for one in self.config.history if one.get("comment") == _UPPER_COMMENT]
        return max(len(mine), bool(self.commits))

    @property
    def blobs(self) -> list[Descriptor]:
        """The layers with data, the lowest first."""
        return [one for one in self.manifest.layers if not one.is_bootstrap]

    def copy_blobs(self, target: Target) -> None:
        """Bring the image's blobs to a place, unless they are there; raise `NydusError`."""
        copy_layers(self.source, target, [*self.blobs, *original_layers(self.manifest)])


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """Changes as a blob in a file; `name` says whose they are.

    `undescribed` are the directories that it has entries in but none for.
    """

    name: str
    path: Path
    undescribed: list[bytes] = field(default_factory=list)


def pack_layer(base: CommitBase, name: str, pieces: Generator[bytes], path: Path) -> PackedLayer:
    """Build the blob of a layer from its tar.

    Args:
        base: the image below, whose content is not stored again.
        name: of the layer, for messages and the history; `UPPER` for the upper directory.
        pieces: of the tar.
        path: of the blob.

    Raises:
        NydusError: the tar cannot be made, or the blob not be written.
    """
    layer = PackedLayer(name, path)
    options = BuildOptions(
        source_type=SourceType.TAR,
        blob=path,
        inline_bootstrap=True,
        toc=True,
        chunk_size=base.chunk_size,
        compressor=base.compressor,
        digester=base.digester,
        chunk_dict=base.bootstrap,
        source=SourceOptions(
            whiteout_spec=WhiteoutSpec.NONE, pax_mtime=True, undescribed=layer.undescribed
        ),
    )
    with closing(pieces):
        stream = io.BufferedReader(PieceReader(pieces, name), _PIECE_BYTES)
        build(cast(BinaryIO, stream), options)
    return layer


class _Pushed(NamedTuple):
    """A layer that is in the target, with its metadata."""

    layer: PackedLayer
    descriptor: Descriptor
    tail: LayerTail


def publish_commit(
    base: CommitBase,
    target: Target,
    upper: PackedLayer,
    mounts: Sequence[PackedLayer],
    work: Path,
) -> Descriptor:
    """Push the changes, and the image that has them under the target's name.

    Args:
        base: the image below, whose blobs are in the target.
        target: the result.
        upper: what the container has written.
        mounts: what was mounted in it, to be seen above that.
        work: a scratch directory.

    Raises:
        NydusError: the layers do not fit the image, or the target does not take them.
    """
    pushed = [_push(target, layer) for layer in (upper, *mounts)]
    logger.info("merging base and upper bootstraps")
    merged = _merge(base, pushed, work)
    # As the real tool has them: mounts come before the upper directory.
    new = [*pushed[1:], pushed[0]]
    boot = write_bootstrap_layer(target, _files(base, merged, new), base.layer.media_type)
    commits = [*base.commits, *(one.descriptor.digest for one in new)]
    marks = {**base.layer.annotations, media.COMMIT_BLOBS: ",".join(commits)}
    if media.UNCOMPRESSED in marks:
        marks[media.UNCOMPRESSED] = boot.diff_id
    last = replace(boot.descriptor, annotations=marks)
    blobs = [*base.blobs, *(one.descriptor for one in new)]
    history = base.config.history
    added = [history_entry(f"{_COMMENT} {one.layer.name}") for one in new]
    config = base.config.with_layers(
        [*(one.digest for one in blobs), boot.diff_id],
        [*history[:-1], *added, *history[-1:]],
    )
    old = base.manifest
    kind = old.config.media_type
    if kind == media.NYDUS_CONFIG:
        # An image that stands alone is one of a container to everybody.
        kind = media.OCI_CONFIG
    logger.info("pushing committed image to %s", target.name)
    manifest = replace(
        old,
        config=store_config(target, kind, config),
        layers=(*blobs, last),
        annotations={key: text for key, text in old.annotations.items() if key not in _ORIGIN},
        subject=None,
    )
    return publish(target, manifest)


def _push(target: Target, layer: PackedLayer) -> _Pushed:
    logger.info("pushing blob for %s", layer.name)
    descriptor = push_blob(target, layer.path)
    tail = read_tail(target, descriptor)
    marked = descriptor.annotated(BLOB="true", UNCOMPRESSED=descriptor.digest)
    return _Pushed(layer, marked, tail)


def _merge(base: CommitBase, layers: Sequence[_Pushed], work: Path) -> Path:
    merged = work / "bootstrap-merged"
    sources = []
    for number, one in enumerate(layers):
        # A name up to its first dot is what merging looks at.
        path = work / f"{one.descriptor.hex}.{number}"
        path.write_bytes(one.tail.bootstrap)
        sources.append(path)
    merge(
        sources,
        MergeOptions(
            bootstrap=merged,
            parent_bootstrap=base.bootstrap,
            chunk_dict=base.bootstrap,
            prefetch_policy=PrefetchPolicy.FS,
            prefetch_patterns=_EVERYTHING,
            undescribed=[one.layer.undescribed for one in layers],
        ),
    )
    return merged


def _files(
    base: CommitBase, merged: Path, layers: Sequence[_Pushed]
) -> Iterator[tuple[str, Content]]:
    yield "image.boot", merged
    yield from base.tables.items()
    seen = set(base.tables)
    for one in layers:
        name = f"{one.descriptor.hex}.blob.meta"
        if one.tail.table is not None and name not in seen:
            seen.add(name)
            yield name, one.tail.table
