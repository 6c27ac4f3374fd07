"""Put the chunks that a start-up needs into one blob more (spec tools 2.10, rafs-v6 4.11).

The files that were asked for then point to that blob, so that one sequential read brings
them all; everything else stays where it is.
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from builder.chunkreader import BlobProvider
from builder.errors import BuildError
from builder.listing import readable
from builder.options import BuildResult
from builder.output import OutputFile
from builder.prefetch import find_node
from builder.rewrite import BlobCopy, LoadedImage, is_encrypted, load_image
from erofs import Chunk, Node

__all__ = ["FileRanges", "OptimizeOptions", "optimize", "parse_files"]

logger = logging.getLogger(__name__)

BOOTSTRAP_MODE = 0o644
_VERSION = "v1"


class FileRanges(NamedTuple):
    """A file by absolute path, and the (offset, size) ranges of it in bytes, None for all."""

    path: bytes
    ranges: tuple[tuple[int, int], ...] | None = None

    def wants(self, start: int, size: int) -> bool:
        """Tell whether a piece of the file is asked for."""
        if self.ranges is None:
            return True
        return any(
            offset < start + size and start < offset + length for offset, length in self.ranges
        )


@dataclass(frozen=True, slots=True)
class OptimizeOptions:
    """Where the results go: the metadata, and the directory of the new blob.

    `progress` is called with the number of content bytes after each chunk that is copied.
    """

    bootstrap: Path
    blob_dir: Path
    progress: Callable[[int], None] | None = None


def parse_files(text: str) -> list[FileRanges]:
    """Decode a list of files, `{"version": "v1", "files": […]}`; no text is no files.

    Raises:
        BuildError: no JSON, another version, or members of the wrong type.
    """
    if not text.strip():
        return []
    try:
        values = json.loads(text)
        if values["version"] != _VERSION:
            raise BuildError("unsupported prefetch file version", got=values["version"])
        return list(_files(values["files"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BuildError(f"prefetch files are not understood ({error!r})") from error


def _files(items: Sequence[Any]) -> Iterator[FileRanges]:
    for item in items:
        path, ranges = item["path"], item.get("ranges")
        if not isinstance(path, str):
            raise TypeError(f"no path: {path}")
        if not path.startswith("/"):
            logger.warning("prefetch file path is not absolute, skipping: %s", path)
            continue
        pairs = None
        if ranges is not None:
            pairs = tuple((_natural(offset), _natural(size)) for offset, size in ranges)
        yield FileRanges(path.encode("utf-8", "surrogateescape"), pairs)


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"no offset or size: {value}")
    return value


def _wanted(image: LoadedImage, files: Sequence[FileRanges]) -> Iterator[tuple[Node, FileRanges]]:
    for file in files:
        node = find_node(image.root, file.path)
        if node is None or not stat.S_ISREG(node.mode):
            what = "is not in the image" if node is None else "is no regular file"
            logger.warning("prefetch file %s %s, skip it", readable(file.path), what)
            continue
        yield node, file


def optimize(
    bootstrap: Path,
    files: Sequence[FileRanges],
    blobs: BlobProvider,
    options: OptimizeOptions,
) -> BuildResult:
    """Copy the chunks of files to a new blob, and write metadata that points to it.

    A chunk that a range touches is copied whole, and only once however many files have it.
    Without anything to copy there is no new blob.

    Raises:
        BuildError: the image or an output is at fault.
        NydusError: a chunk cannot be read, or is not what the image promises.
    """
    result = BuildResult()
    with result.timed("load_tree_from_bootstrap"):
        image = load_image(bootstrap)
    result.compressor = image.compressor
    places = [
        (node, number)
        for node, file in _wanted(image, files)
        for number, chunk in enumerate(node.chunks)
        if file.wants(number * image.chunk_size, chunk.uncompressed_size)
    ]
    if not places:
        return _finish(image, None, options, result)
    touched = {node.chunks[number].blob_index for node, number in places}
    encrypted = any(is_encrypted(image.blobs[index]) for index in touched)
    form = image.form(encrypted=encrypted, framed=True)
    with BlobCopy(options.blob_dir, form, image.reader(blobs), options.progress) as copy:
        # The originals stay alive, so that no other chunk gets their identity.
        twins: dict[int, tuple[Chunk, Chunk]] = {}
        for node, number in places:
            old = node.chunks[number]
            if old.blob_index == len(image.blobs):
                continue
            if id(old) not in twins:
                twins[id(old)] = old, copy.copy(old, len(image.blobs))
            node.chunks[number] = twins[id(old)][1]
        return _finish(image, copy, options, result)


def _finish(
    image: LoadedImage, copy: BlobCopy | None, options: OptimizeOptions, result: BuildResult
) -> BuildResult:
    """Write the metadata; both outputs are whole before one gets its name."""
    table = list(image.blobs)
    entry = None
    if copy is not None:
        entry = copy.seal()._replace(blob_index=len(table))
        table.append(entry)
    with result.timed("dump_bootstrap"), OutputFile(options.bootstrap, BOOTSTRAP_MODE) as output:
        output.write(image.write(table))
        output.sync()
        if copy is not None and entry is not None:
            result.blob_path = copy.commit(entry)
        result.bootstrap = output.commit()
    result.blobs = [blob.id for blob in table]
    return result
