"""Count what images consist of, and what deduplication between them saves (spec tools 2.6).

Numbers and texts are the real tool's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from builder.errors import BuildError
from erofs import AnyBootstrap
from erofs.rafs import ChunkInfo, Digester

__all__ = ["ImageCounts", "ImageStat"]

FILE_SIZE_BUCKETS = 45
CHUNK_SIZE_BITS = range(12, 21)
DEDUP_THRESHOLDS = 20
_PAGE = 4096


@dataclass(slots=True)
class ImageCounts:
    """What one image has, or several together; sizes in bytes.

    `chunk_sizes` tells how many chunks there would be with chunks of 2^12 to 2^20 bytes,
    `file_sizes` how many files have so many bits in their size. `own_*` are distinct chunks,
    `ref_*` those of the target that a base image has, `dedup_*` those of all base images.
    """

    dirs: int = 0
    files: int = 0
    symlinks: int = 0
    chunks: int = 0
    file_size: int = 0
    comp_size: int = 0
    uncomp_size: int = 0
    padding_size: int = 0
    chunk_sizes: list[int] = field(default_factory=lambda: [0] * len(CHUNK_SIZE_BITS))
    file_sizes: list[int] = field(default_factory=lambda: [0] * FILE_SIZE_BUCKETS)
    dedup_chunks: int = 0
    dedup_comp_size: int = 0
    dedup_uncomp_size: int = 0
    own_chunks: int = 0
    own_comp_size: int = 0
    own_uncomp_size: int = 0
    ref_chunks: int = 0
    ref_comp_size: int = 0
    ref_uncomp_size: int = 0

    def add_file(self, size: int, chunks: list[ChunkInfo]) -> None:
        """Count the content of a regular file."""
        self.file_sizes[min(size.bit_length(), FILE_SIZE_BUCKETS - 1)] += 1
        self.file_size += size
        self.padding_size += -size % _PAGE
        self.chunks += len(chunks)
        self.comp_size += sum(chunk.compressed_size for chunk in chunks)
        self.uncomp_size += sum(chunk.uncompressed_size for chunk in chunks)
        for number, bits in enumerate(CHUNK_SIZE_BITS):
            self.chunk_sizes[number] += -(-size >> bits)

    def lines(self) -> Iterator[str]:
        """Yield what is printed of the image."""
        for name, value in (
            ("Directories:", self.dirs),
            ("Files:", self.files),
            ("Symlinks:", self.symlinks),
            ("Chunks:", self.chunks),
            ("File Size:", self.file_size),
            ("Padding Size:", self.padding_size),
            ("Uncompressed Size:", self.uncomp_size),
            ("Compressed Size:", self.comp_size),
        ):
            yield f"{name:<24}{value}"
        yield "\nFile Size Bits:\t\tFile Count:"
        yield from (f"{bits}:\t\t\t{count}" for bits, count in enumerate(self.file_sizes))
        yield "\nChunk Size Bits:\tChunk Count:"
        for bits, count in zip(CHUNK_SIZE_BITS, self.chunk_sizes, strict=True):
            yield f"{bits}:\t\t\t{count}"
        yield f"\nRaw Content Size:\t{self.file_size}"
        for name, value in (
            ("Comp Content Size", self.comp_size),
            ("Raw Chunk Count", self.chunks),
            ("Dedup Comp Size", self.dedup_comp_size),
            ("Dedup Uncomp Size", self.dedup_uncomp_size),
            ("Dedup Chunk Count", self.dedup_chunks),
            ("Owned Comp Size", self.own_comp_size),
            ("Owned Uncomp Size", self.own_uncomp_size),
            ("Owned Chunk Count", self.own_chunks),
            ("Referenced Comp Size", self.ref_comp_size),
            ("Referenced Uncomp Size", self.ref_uncomp_size),
            ("Referenced Chunk Count", self.ref_chunks),
        ):
            yield f"{name}:\t{value}"


class _Sizes(NamedTuple):
    compressed: int
    uncompressed: int


@dataclass(slots=True)
class _Shared:
    """A chunk of base images, and how many of them have it."""

    sizes: _Sizes
    count: int = 0


class ImageStat:
    """Counts base images, and one target image against them.

    Args:
        digester: of the chunks that are compared; images with another one have nothing in
            common.
    """

    def __init__(self, digester: Digester) -> None:
        self.base = ImageCounts()
        self.target: ImageCounts | None = None
        self._digester = digester
        self._chunks: dict[bytes, _Shared] = {}
        self._is_deduplicated = False

    def add_base(self, image: AnyBootstrap) -> None:
        """Count a base image; raise `FormatError`, and then nothing was counted of it."""
        counts = ImageCounts()
        distinct = _count(image, counts)
        _add(self.base, counts)
        for digest, sizes in distinct.items():
            self.base.own_chunks += 1
            self.base.own_comp_size += sizes.compressed
            self.base.own_uncomp_size += sizes.uncompressed
            if image.digester is self._digester:
                self._chunks.setdefault(digest, _Shared(sizes)).count += 1

    def add_target(self, image: AnyBootstrap) -> None:
        """Count the target image; raise `FormatError`."""
        self.target = counts = ImageCounts()
        for digest, sizes in _count(image, counts).items():
            known = self._chunks.get(digest)
            if known is not None and known.sizes.uncompressed == sizes.uncompressed:
                counts.ref_chunks += 1
                counts.ref_comp_size += sizes.compressed
                counts.ref_uncomp_size += sizes.uncompressed
            else:
                counts.own_chunks += 1
                counts.own_comp_size += sizes.compressed
                counts.own_uncomp_size += sizes.uncompressed

    def deduplicate(self) -> None:
        """Count the distinct chunks of all base images together."""
        if self._is_deduplicated:
            raise BuildError("base images are counted already")
        self._is_deduplicated = True
        for shared in self._chunks.values():
            self.base.dedup_chunks += 1
            self.base.dedup_comp_size += shared.sizes.compressed
            self.base.dedup_uncomp_size += shared.sizes.uncompressed

    def _padded(self, counts: ImageCounts) -> ImageCounts:
        """Return the counts as they are told: uncompressed sizes are those of whole pages."""
        told = ImageCounts(**asdict(counts))
        told.uncomp_size += told.padding_size
        return told

    def as_json(self) -> dict[str, object]:
        """Return what goes into the report."""
        target = ImageCounts() if self.target is None else self._padded(self.target)
        return {
            "dedup_enabled": self._is_deduplicated,
            "target_enabled": self.target is not None,
            "base_image": asdict(self._padded(self.base)),
            "target_image": asdict(target),
        }

    def lines(self) -> Iterator[str]:
        """Yield what is printed."""
        if self.target is not None:
            yield "Target Image Statistics:\n"
            yield from self._padded(self.target).lines()
        yield "\n\nBase Image Statistics:\n"
        yield from self._padded(self.base).lines()
        if self._is_deduplicated:
            yield "\n\nChunk Deduplication Statistics:"
            yield from self._threshold_lines()

    def _threshold_lines(self) -> Iterator[str]:
        """Yield what there would be if chunks in more than n images were in a base image."""
        yield "\t".join(
            ("Global Dedup Thresh:", "Raw Chunks:", "Dedup Chunks:", "Comp Content Size:",
             "Comp Base Size:", "Comp Image Size:", "Uncomp Content Size:",
             "Uncomp Base Size", "Uncomp Image Size")
        )  # fmt: skip
        for threshold in range(1, DEDUP_THRESHOLDS + 1):
            row = [0] * 8
            for shared in self._chunks.values():
                row = [old + new for old, new in zip(row, _share(shared, threshold), strict=True)]
            if not row[1]:
                break
            yield f"{threshold:<24}" + "".join(f"0x{value:<14x}" for value in row)


def _share(shared: _Shared, threshold: int) -> tuple[int, ...]:
    """Return what a chunk adds to the eight columns of a threshold."""
    (compressed, uncompressed), count = shared.sizes, shared.count
    all_compressed, all_uncompressed = count * compressed, count * uncompressed
    if threshold <= count:
        return (count, 1, all_compressed, compressed, 0, all_uncompressed, uncompressed, 0)
    return (count, count, all_compressed, 0, all_compressed, all_uncompressed, 0, all_uncompressed)


def _add(total: ImageCounts, counts: ImageCounts) -> None:
    for name, value in asdict(counts).items():
        old = getattr(total, name)
        if isinstance(value, list):
            value = [left + right for left, right in zip(old, value, strict=True)]
        else:
            value += old
        setattr(total, name, value)


def _count(image: AnyBootstrap, counts: ImageCounts) -> dict[bytes, _Sizes]:
    """Count an image and return its distinct chunks; raise `FormatError`."""
    distinct: dict[bytes, _Sizes] = {}
    linked: set[int] = set()
    for _, inode in image.walk():
        if inode.is_dir:
            counts.dirs += 1
        elif inode.is_symlink:
            counts.symlinks += 1
        elif inode.is_regular:
            counts.files += 1
            if inode.nlink > 1:
                if inode.nid in linked:
                    continue
                linked.add(inode.nid)
            chunks = list(inode.file_chunks())
            counts.add_file(inode.size, chunks)
            for chunk in chunks:
                if image.blobs[chunk.blob_index].digester == image.digester:
                    sizes = _Sizes(chunk.compressed_size, chunk.uncompressed_size)
                    distinct.setdefault(chunk.digest, sizes)
    return distinct
