"""Merge the bootstraps of layers into one (spec rafs-v6 5.4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from builder.bootstrap import load_tree, open_source_image
from builder.build import write_bootstrap_file
from builder.chunkdict import foreign_blobs
from builder.consistency import Profile, profile_of, require_profile
from builder.errors import BuildError
from builder.options import BuildResult
from builder.overlay import apply_layer
from builder.prefetch import PrefetchPolicy, find_node, parse_patterns, pattern_nodes
from builder.source.options import WhiteoutSpec
from builder.throughlinks import follow_links
from erofs import AnyBootstrap, Bootstrap, BootstrapSpec, Node
from erofs.rafs import BlobEntry, BlobFeatures, SuperFlags
from erofs.tree import iter_directories
from erofs.writer import emit_bootstrap

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

    Args:
        chunk_dict: bootstrap whose blobs do not count as a layer's own.
        keep_ids: blobs are called as the bootstraps say, not as their files or `original_blob_ids`.
        inlined: a source may be a blob that carries its bootstrap.
        undescribed: for each source the directories that it knows only the paths of; those
            below keep their attributes.
        progress: called with the bytes of each bootstrap that is in.
    """

    bootstrap: Path | None = None
    blob_dir: Path | None = None
    parent_bootstrap: Path | None = None
    chunk_dict: Path | None = None
    keep_ids: bool = False
    inlined: bool = False
    whiteout_spec: WhiteoutSpec = WhiteoutSpec.OCI
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.NONE
    prefetch_patterns: Sequence[bytes] = ()
    original_blob_ids: Sequence[str] = ()
    blob_digests: Sequence[bytes] = ()
    blob_sizes: Sequence[int] = ()
    blob_toc_digests: Sequence[bytes] = ()
    blob_toc_sizes: Sequence[int] = ()
    undescribed: Sequence[Collection[bytes]] = ()
    progress: Callable[[int], None] | None = None


@dataclass(slots=True)
class _Merger:
    """The layers so far: their tree, and all blobs, numbered as they came.

    `blobs` has them by the ids that their layers use, under the names that they will have.
    """

    options: MergeOptions
    profile: Profile | None = None
    last: Bootstrap | None = None
    root: Node | None = None
    blobs: dict[bytes, BlobEntry] = field(default_factory=dict)
    is_encrypted: bool = False
    # Ids of the blobs that a layer only refers to.
    shared: frozenset[bytes] = frozenset()

    def _fitting(self, opened: AnyBootstrap, path: Path) -> Bootstrap:
        """Return an image that can be in one with those before it."""
        self.profile = self.profile or profile_of(opened)
        return require_profile(self.profile, opened, path, InconsistentLayers)

    def take_dictionary(self, opened: AnyBootstrap, path: Path) -> None:
        """Learn which blobs do not count as a layer's own; raise `BuildError`."""
        image = self._fitting(opened, path)
        self.shared = frozenset(blob.blob_id for blob in foreign_blobs(image, path))

    def add(self, opened: AnyBootstrap, path: Path, number: int | None) -> None:
        """Lay one bootstrap on top; `number` is its place among the sources, None for the parent.

        Raises:
            BuildError: it does not fit those below it.
            FormatError: it is broken.
        """
        image = self._fitting(opened, path)
        for given, name in (
            (self.options.parent_bootstrap, "parent"),
            (self.options.chunk_dict, "chunk dictionary"),
        ):
            if image.is_tarfs and given is not None:
                raise BuildError(f"tarfs bootstraps cannot be merged with a {name}", path=path)
        if SuperFlags.ENCRYPTION_ASE_128_XTS in image.flags:
            self.is_encrypted = True
        blobs = foreign_blobs(image, path)
        ids = [blob.blob_id for blob in blobs]
        if number is not None:
            own = [blob.blob_index for blob in blobs if blob.blob_id not in self.shared]
            if len(own) > 1:
                raise BuildError(
                    "a layer may have one blob besides those of a chunk dictionary",
                    path=path,
                    got=len(own),
                )
            for index in own:
                blobs[index] = self._renamed(blobs[index], path, number)
        for blob_id, blob in zip(ids, blobs, strict=True):
            self.blobs.setdefault(blob_id, blob)
        places = {blob_id: place for place, blob_id in enumerate(self.blobs)}
        tree = load_tree(image, [places[blob_id] for blob_id in ids])
        if self.root is not None:
            paths = self.options.undescribed
            known = () if number is None or not paths else paths[number]
            nodes = (find_node(tree, path) for path in known)
            kept = {id(node) for node in nodes if node is not None}
            follow_links(self.root, tree, kept)
            tree = apply_layer(self.root, tree, self.options.whiteout_spec, kept)
        self.root, self.last = tree, image
        if self.options.progress is not None:
            self.options.progress(image.view.length)

    def _renamed(self, blob: BlobEntry, path: Path, number: int) -> BlobEntry:
        options = self.options
        # The name of a tar is in its bootstrap, whatever the file or a list says (spec 5.4).
        if options.keep_ids or blob.features & BlobFeatures.TARFS:
            name = blob.id
        elif options.original_blob_ids:
            name = options.original_blob_ids[number]
        else:
            name = path.name.split(".", 1)[0]
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
        return blob._replace(blob_id=blob_id)

    def used_blobs(self, root: Node) -> list[BlobEntry]:
        """Number the blobs in order of first reference and return those that are used.

        Raises:
            BuildError: two different ones have one name.
        """
        known = list(self.blobs.values())
        numbers: dict[int, int] = {}
        table: dict[bytes, BlobEntry] = {}
        settled: set[int] = set()
        for _, directory in iter_directories(root):
            children = directory.node.entries
            for name in directory.names:
                for chunk in children[name].chunks:
                    if id(chunk) in settled:
                        continue
                    settled.add(id(chunk))
                    number = numbers.get(chunk.blob_index)
                    if number is None:
                        blob = known[chunk.blob_index]
                        number = numbers[chunk.blob_index] = _enter(table, blob)
                    chunk.blob_index = number
        return list(table.values())


def _enter(table: dict[bytes, BlobEntry], blob: BlobEntry) -> int:
    """Return the number of a blob, which gets an entry unless it has one."""
    found = table.setdefault(blob.blob_id, blob._replace(blob_index=len(table)))
    if found != blob._replace(blob_index=found.blob_index):
        raise BuildError("layers have different blobs of one name", blob=blob.id)
    return found.blob_index


def _check_lists(sources: Sequence[Path], options: MergeOptions) -> None:
    lists: dict[str, Sequence[object]] = {
        "original blob id": options.original_blob_ids,
        "blob digest": options.blob_digests,
        "blob size": options.blob_sizes,
        "toc digest": options.blob_toc_digests,
        "toc size": options.blob_toc_sizes,
        "undescribed": options.undescribed,
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


def merge(sources: Sequence[Path], options: MergeOptions) -> BuildResult:
    """Merge bootstraps, lowest layer first, and write the result.

    Raises:
        InconsistentLayers: layers that differ in what an image has only once.
        BuildError: a list of the wrong length, or a source with more than one blob of its own.
        FormatError: a broken source.
    """
    _check_lists(sources, options)
    result = BuildResult()
    merger = _Merger(options)
    opened = partial(open_source_image, inlined=options.inlined)
    with result.timed("load_tree_from_bootstrap"):
        if options.chunk_dict is not None:
            merger.take_dictionary(opened(options.chunk_dict), options.chunk_dict)
        if options.parent_bootstrap is not None:
            parent = options.parent_bootstrap
            merger.add(opened(parent), parent, None)
        for number, path in enumerate(sources):
            merger.add(opened(path), path, number)
    root, last = merger.root, merger.last
    if root is None or last is None:
        raise BuildError("nothing to merge")
    blobs = merger.used_blobs(root)
    prefetch: list[Node] = []
    if blobs and options.prefetch_policy is PrefetchPolicy.FS:
        prefetch = pattern_nodes(root, parse_patterns(options.prefetch_patterns))
    with result.timed("dump_bootstrap"):
        data = emit_bootstrap(
            BootstrapSpec(
                root=root,
                blobs=blobs,
                chunk_size=last.chunk_size,
                compressor=last.compressor,
                digester=last.digester,
                prefetch=prefetch,
                explicit_owners=bool(last.flags & SuperFlags.EXPLICIT_UID_GID),
                force_xattr_flag=True,
                tarfs=last.is_tarfs,
                encrypted=merger.is_encrypted,
            )
        )
        result.bootstrap = write_bootstrap_file(data, options.bootstrap, options.blob_dir)
    result.blobs = [blob.id for blob in blobs]
    result.compressor = last.compressor
    return result
