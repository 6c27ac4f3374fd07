"""Merge the bootstraps of layers into one (spec rafs-v6 5.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builder.bootstrap import load_tree, open_any_bootstrap
from builder.build import BuildResult, write_bootstrap_file
from builder.errors import BuildError
from builder.overlay import apply_layer, iter_nodes
from builder.prefetch import PrefetchPolicy, parse_patterns, pattern_nodes
from builder.source.options import WhiteoutSpec
from erofs import Bootstrap, BootstrapSpec, Node, write_bootstrap
from erofs.rafs import BlobEntry, BlobFeatures, Compressor, SuperFlags
from erofs.tree import iter_names

__all__ = ["InconsistentLayers", "MergeOptions", "merge"]

_MAX_LAYERS = 65535


class InconsistentLayers(BuildError):
    """Layers that cannot be in one image; the command line exits with 2."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge and where to put the result.

    The lists hold one item for each source, or are empty: `original_blob_ids` and
    `blob_digests` name the blobs in place of the source's file name, `blob_sizes` and
    `blob_toc_sizes` are in bytes.
    """

    bootstrap: Path | None = None
    blob_dir: Path | None = None
    parent_bootstrap: Path | None = None
    whiteout_spec: WhiteoutSpec = WhiteoutSpec.OCI
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.NONE
    prefetch_patterns: Sequence[bytes] = ()
    original_blob_ids: Sequence[str] = ()
    blob_digests: Sequence[bytes] = ()
    blob_sizes: Sequence[int] = ()
    blob_toc_digests: Sequence[bytes] = ()
    blob_toc_sizes: Sequence[int] = ()


@dataclass(slots=True)
class _Layer:
    """A source: its tree, and its blob table as the result will have it."""

    tree: Node
    blobs: list[BlobEntry]


@dataclass(slots=True)
class _Merger:
    options: MergeOptions
    first: Bootstrap | None = None
    last: Bootstrap | None = None
    layers: list[_Layer] = field(default_factory=list)

    def add(self, image: Bootstrap, path: Path, number: int | None) -> None:
        """Take one bootstrap; `number` is the place among the sources, None for the parent."""
        if self.first is not None:
            _require_same(self.first, image, path)
        self.first = self.first or image
        self.last = image
        if image.is_tarfs:
            raise BuildError("tarfs bootstraps cannot be merged by this version", path=path)
        blobs = list(image.blobs)
        if number is not None:
            if len(blobs) > 1:
                raise BuildError("a layer may have one blob", path=path, got=len(blobs))
            blobs = [self._renamed(blob, path, number) for blob in blobs]
        self.layers.append(_Layer(load_tree(image), blobs))

    def _renamed(self, blob: BlobEntry, path: Path, number: int) -> BlobEntry:
        options = self.options
        name = path.name.split(".", 1)[0]
        if options.original_blob_ids:
            name = options.original_blob_ids[number]
        separate = bool(blob.features & BlobFeatures.SEPARATE)
        if options.blob_digests:
            if separate:
                blob = blob._replace(blob_meta_digest=options.blob_digests[number])
            else:
                name = options.blob_digests[number].hex()
        if options.blob_sizes:
            size = options.blob_sizes[number]
            if separate:
                blob = blob._replace(blob_meta_size=size)
            else:
                blob = blob._replace(compressed_size=size)
        if options.blob_toc_digests:
            blob = blob._replace(blob_toc_digest=options.blob_toc_digests[number])
        if options.blob_toc_sizes:
            blob = blob._replace(blob_toc_size=options.blob_toc_sizes[number])
        blob_id = name.encode("utf-8", "surrogateescape")
        if not 0 < len(blob_id) <= 64:
            raise BuildError("blob id of 1 to 64 bytes is needed", path=path, got=name)
        features = blob.features & ~BlobFeatures.INLINED_FS_META
        return blob._replace(blob_id=blob_id, features=features)

    def combine(self) -> tuple[Node, list[BlobEntry]]:
        """Return the merged tree and the blobs it refers to, in order of first reference."""
        root = self.layers[0].tree
        tables: dict[int, BlobEntry] = {}
        for layer in self.layers:
            for node in iter_nodes(layer.tree):
                for chunk in node.chunks:
                    tables.setdefault(id(chunk), layer.blobs[chunk.blob_index])
        for layer in self.layers[1:]:
            root = apply_layer(root, layer.tree, self.options.whiteout_spec)
        numbers: dict[bytes, int] = {}
        blobs: list[BlobEntry] = []
        settled: set[int] = set()
        for _, _, node in iter_names(root):
            for chunk in node.chunks:
                if id(chunk) in settled:
                    continue
                settled.add(id(chunk))
                blob = tables[id(chunk)]
                number = numbers.setdefault(blob.blob_id, len(blobs))
                if number == len(blobs):
                    blobs.append(blob._replace(blob_index=number))
                chunk.blob_index = number
        return root, blobs


def _require_same(first: Bootstrap, other: Bootstrap, path: Path) -> None:
    checks = {
        "chunk_size": (first.chunk_size, other.chunk_size),
        "explicit_uidgid": (
            bool(first.flags & SuperFlags.EXPLICIT_UID_GID),
            bool(other.flags & SuperFlags.EXPLICIT_UID_GID),
        ),
        "tarfs mode": (first.is_tarfs, other.is_tarfs),
    }
    for name, (expected, got) in checks.items():
        if expected != got:
            raise InconsistentLayers(
                f"Inconsistent configuration of {name}", path=path, expected=expected, got=got
            )


def _check_lists(sources: Sequence[Path], options: MergeOptions) -> None:
    lists: dict[str, Sequence[object]] = {
        "original blob id": options.original_blob_ids,
        "blob digest": options.blob_digests,
        "blob size": options.blob_sizes,
        "toc digest": options.blob_toc_digests,
        "toc size": options.blob_toc_sizes,
    }
    for name, items in lists.items():
        if items and len(items) != len(sources):
            raise BuildError(
                f"number of {name} entries {len(items)} doesn't match"
                f" number of sources {len(sources)}"
            )
    for digest in (*options.blob_digests, *options.blob_toc_digests):
        if len(digest) != 32:
            raise BuildError("digest of the wrong length", expected="32 bytes", got=len(digest))
    if not 0 < len(sources) <= _MAX_LAYERS:
        raise BuildError("number of sources", expected=f"1 to {_MAX_LAYERS}", got=len(sources))


def merge(sources: Sequence[Path], options: MergeOptions) -> tuple[BuildResult, Compressor]:
    """Merge bootstraps, lowest layer first, and write the result.

    Returns:
        What was written, and the compressor that the result names.

    Raises:
        InconsistentLayers: layers that differ in what an image has only once.
        BuildError: a list of the wrong length, or a source with more than one blob.
        FormatError: a broken source.
    """
    _check_lists(sources, options)
    result = BuildResult()
    merger = _Merger(options)
    with result.timed("load_tree_from_bootstrap"):
        if options.parent_bootstrap is not None:
            parent = options.parent_bootstrap
            merger.add(_open(parent), parent, None)
        for number, path in enumerate(sources):
            merger.add(_open(path), path, number)
    with result.timed("merge_tree"):
        root, blobs = merger.combine()
    last = merger.last
    if last is None:
        raise BuildError("nothing to merge")
    prefetch: list[Node] = []
    if blobs and options.prefetch_policy is PrefetchPolicy.FS:
        prefetch = pattern_nodes(root, parse_patterns(options.prefetch_patterns))
    with result.timed("dump_bootstrap"):
        data = write_bootstrap(
            BootstrapSpec(
                root=root,
                blobs=blobs,
                chunk_size=last.chunk_size,
                compressor=last.compressor,
                digester=last.digester,
                prefetch=prefetch,
                explicit_owners=bool(last.flags & SuperFlags.EXPLICIT_UID_GID),
                force_xattr_flag=True,
            )
        )
        result.bootstrap = write_bootstrap_file(data, options.bootstrap, options.blob_dir)
    result.blobs = [blob.id for blob in blobs]
    return result, last.compressor


def _open(path: Path) -> Bootstrap:
    try:
        return open_any_bootstrap(path)
    except OSError as error:
        raise BuildError(f"cannot be opened ({error.strerror})", path=path) from error
