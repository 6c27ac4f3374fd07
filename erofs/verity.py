"""dm-verity, version 1 with SHA-256: where the hash tree of a disk lies and what it says.

Pure: layout, records and texts; `builder.hashtree` fills a tree. Source: Linux
`Documentation/admin-guide/device-mapper/verity.rst`, spec rafs-v6 6.2, vm-runtimes 2.4, 5.5.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from erofs.errors import BadMagic, CorruptStructure, UnsupportedFeature
from erofs.values import Value
from erofs.view import View

__all__ = [
    "BLOCK_SIZE_MAX",
    "BLOCK_SIZE_MIN",
    "DIGEST_SIZE",
    "HASH_BLOCK_SIZE",
    "NYDUS_FILLER",
    "SALT_MAX",
    "SUPERBLOCK_SIZE",
    "HashTree",
    "TreeFormat",
    "TreeLevel",
    "VeritySuperblock",
    "tree_levels",
]

ALGORITHM = "sha256"
VERSION = 1
DIGEST_SIZE = 32
HASH_BLOCK_SIZE = 4096
SUPERBLOCK_SIZE = 512
SALT_MAX = 256
BLOCK_SIZE_MIN, BLOCK_SIZE_MAX = 512, 524288
# What the real exporter puts into unused digest slots, where dm-verity has zeros: the digest
# of 4096 zero bytes. `veritysetup verify` refuses such a tree (spec rafs-v6 6.2).
NYDUS_FILLER = hashlib.sha256(bytes(HASH_BLOCK_SIZE)).digest()

_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6s256s168s")
_SIGNATURE = b"verity\0\0"


class VeritySuperblock(NamedTuple):
    """`struct verity_sb` of veritysetup: 512 bytes; the tree begins at the next hash block.

    `salt` is without its padding.
    """

    data_block_size: int
    hash_block_size: int
    data_blocks: int
    salt: bytes = b""
    uuid: bytes = bytes(16)

    @classmethod
    def parse(cls, view: View, offset: int = 0) -> VeritySuperblock:
        """Decode the record at `offset`.

        Raises:
            BadMagic: there is no superblock.
            UnsupportedFeature: another version or algorithm.
            CorruptStructure: impossible sizes.
            OutOfBounds: the data ends before it.
        """
        fields = view.unpack(_SUPERBLOCK, offset, "verity superblock")
        signature, version, hash_type, uuid, algorithm = fields[:5]
        data_size, hash_size, blocks, salt_size, _, salt, _ = fields[5:]
        if signature != _SIGNATURE:
            raise BadMagic("no verity superblock", offset=offset, got=signature)
        name = algorithm.rstrip(b"\0")
        if version != VERSION or hash_type != VERSION or name != ALGORITHM.encode():
            raise UnsupportedFeature("verity format", offset=offset, got=f"{version}, {name!r}")
        if salt_size > SALT_MAX:
            raise CorruptStructure("size of the verity salt", expected=SALT_MAX, got=salt_size)
        _check_block_sizes(data_size, hash_size)
        return cls(data_size, hash_size, blocks, salt[:salt_size], uuid)

    def pack(self) -> bytes:
        """Encode the record."""
        return _SUPERBLOCK.pack(
            _SIGNATURE,
            VERSION,
            VERSION,
            self.uuid,
            ALGORITHM.encode(),
            self.data_block_size,
            self.hash_block_size,
            self.data_blocks,
            len(self.salt),
            bytes(6),
            self.salt,
            bytes(168),
        )


def _check_block_sizes(*sizes: int) -> None:
    for size in sizes:
        if size & (size - 1) or not BLOCK_SIZE_MIN <= size <= BLOCK_SIZE_MAX:
            raise CorruptStructure("block size of a hash tree", got=size)


class TreeFormat(Value):
    """What a hash tree depends on beside the data.

    Args:
        data_block_size, hash_block_size: bytes, powers of two.
        salt: goes in front of every block; at most 256 bytes.
        filler: digest in unused slots; all zeros but for trees like the real exporter's.
        superblock: the tree follows a superblock, which takes a hash block.
        uuid: of the superblock.
    """

    data_block_size: int
    hash_block_size: int = HASH_BLOCK_SIZE
    salt: bytes = b""
    filler: bytes = bytes(DIGEST_SIZE)
    superblock: bool = False
    uuid: bytes = bytes(16)

    def __post_init__(self) -> None:
        _check_block_sizes(self.data_block_size, self.hash_block_size)
        if len(self.salt) > SALT_MAX or len(self.filler) != DIGEST_SIZE or len(self.uuid) != 16:
            raise CorruptStructure("salt, filler or uuid of a hash tree has the wrong length")


class TreeLevel(NamedTuple):
    """One level: `digests` of the level below, in `blocks` hash blocks at `offset` of the tree."""

    offset: int
    blocks: int
    digests: int


def tree_levels(data_blocks: int, hash_block_size: int = HASH_BLOCK_SIZE) -> list[TreeLevel]:
    """Return the levels of a tree, the leaves first; on disk the last of them comes first.

    A single data block needs none: its digest is the root.
    """
    fan_out = hash_block_size // DIGEST_SIZE
    counts = []
    below = data_blocks
    while below > 1:
        counts.append(below)
        below = -(-below // fan_out)
    levels: list[TreeLevel] = []
    offset = 0
    for digests in reversed(counts):
        blocks = -(-digests // fan_out)
        levels.append(TreeLevel(offset, blocks, digests))
        offset += blocks * hash_block_size
    return levels[::-1]


class HashTree(NamedTuple):
    """A finished tree behind its data: offsets in bytes of the disk.

    `hash_offset` is where the superblock is, if there is one, else the tree.
    """

    format: TreeFormat
    data_blocks: int
    hash_offset: int
    root: bytes

    @property
    def tree_offset(self) -> int:
        """Where the top level begins."""
        superblock = self.format.hash_block_size if self.format.superblock else 0
        return self.hash_offset + superblock

    @property
    def end(self) -> int:
        """Length of the disk up to the end of the tree."""
        levels = tree_levels(self.data_blocks, self.format.hash_block_size)
        blocks = sum(level.blocks for level in levels)
        return self.tree_offset + blocks * self.format.hash_block_size

    def options(self) -> str:
        """Return the words for `veritysetup` as the real tool prints them (spec rafs-v6 6.2)."""
        form = self.format
        superblock = "" if form.superblock else "--no-superblock "
        return (
            f'{superblock}--format={VERSION} -s "{form.salt.hex()}" --hash={ALGORITHM}'
            f" --data-block-size={form.data_block_size} --hash-block-size={form.hash_block_size}"
            f" --data-blocks {self.data_blocks} --hash-offset {self.hash_offset} {self.root.hex()}"
        )

    def as_json(self) -> dict[str, object]:
        """Return the same as a JSON object; sizes and offsets in bytes."""
        form = self.format
        return {
            "version": VERSION,
            "hash_algorithm": ALGORITHM,
            "data_block_size": form.data_block_size,
            "hash_block_size": form.hash_block_size,
            "data_blocks": self.data_blocks,
            "hash_offset": self.hash_offset,
            "salt": form.salt.hex(),
            "superblock": form.superblock,
            "zero_padding": not any(form.filler),
            "root_hash": self.root.hex(),
        }
