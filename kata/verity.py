"""dm-verity parameters of a volume: the JSON object, its other spellings, the kernel's table.

The tree itself is `builder.hashtree`'s, its layout `erofs.verity`'s. Source: spec vm-runtimes
2.4, 3.4; Linux `Documentation/admin-guide/device-mapper/verity.rst`.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from erofs.verity import BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, SALT_MAX, HashTree
from kata.errors import OptionError
from kata.option import MAX_OPTION_BYTES, Fields, decode_json, go_json
from kata.profile import Profile

__all__ = ["DmVerity", "parse_verity"]

DIGEST_HEX = {"sha256": 64, "sha1": 40}
SECTOR_SIZE = 512
# What the label leaves out: all disks of the tarfs mode have these.
LABEL_DATA_BLOCK, LABEL_HASH_BLOCK = 512, 4096
MAX_DATA_BLOCKS = (1 << 32) - 1
_MAX_OFFSET = (1 << 63) - 1

_HEX = re.compile(r"[0-9a-fA-F]*\Z")
_LABEL = re.compile(r"(\d{1,20}),(\d{1,20}),(sha256|sha1):([0-9a-fA-F]+)\Z", re.ASCII)
_EXPORT_LINE = re.compile(
    r"(?:dm-verity options: )?(--no-superblock )?--format=([01]) -s \"([0-9a-fA-F]*)\""
    r" --hash=(\w+) --data-block-size=(\d{1,20}) --hash-block-size=(\d{1,20})"
    r" --data-blocks (\d{1,20}) --hash-offset (\d{1,20}) ([0-9a-fA-F]+)\n?\Z",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class DmVerity:
    """What a consumer needs to open a verity device; sizes and offsets in bytes.

    Args:
        algorithm: `sha256` or `sha1`, in any case.
        root_hash: hex.
        data_blocks: how many blocks are protected.
        data_block_size, hash_block_size: of data and tree, which share one disk.
        hash_offset: where the superblock is, or the tree when there is none.
        salt: hex; empty for none.
        version: of the hash format, 1 but for ChromeOS.
        no_superblock: None when it is not said; the disks of such writers have none.
    """

    root_hash: str
    data_blocks: int
    data_block_size: int
    hash_block_size: int
    hash_offset: int
    algorithm: str = "sha256"
    salt: str = ""
    version: int = 1
    no_superblock: bool | None = None

    @classmethod
    def from_tree(cls, tree: HashTree) -> DmVerity:
        """Return the parameters of a finished tree; says whether there is a superblock."""
        form = tree.format
        return cls(
            root_hash=tree.root.hex(),
            data_blocks=tree.data_blocks,
            data_block_size=form.data_block_size,
            hash_block_size=form.hash_block_size,
            hash_offset=tree.hash_offset,
            salt=form.salt.hex(),
            no_superblock=not form.superblock,
        )

    @classmethod
    def from_fields(cls, fields: Fields) -> DmVerity:
        """Decode the JSON object; raise `OptionError`. Rules are checked by `check`."""
        return cls(
            root_hash=fields.text("hash"),
            data_blocks=fields.integer("blocknum"),
            data_block_size=fields.integer("blocksize"),
            hash_block_size=fields.integer("hashsize"),
            hash_offset=fields.integer("offset"),
            algorithm=fields.text("hashtype"),
            salt=fields.text("salt", ""),
            version=fields.integer("hash_type", 1),
            no_superblock=fields.boolean("no_superblock"),
        )

    def as_json(self) -> dict[str, object]:
        """Return the JSON object; what older readers do not know only where it says something."""
        value: dict[str, object] = {
            "hashtype": self.algorithm,
            "hash": self.root_hash,
            "blocknum": self.data_blocks,
            "blocksize": self.data_block_size,
            "hashsize": self.hash_block_size,
            "offset": self.hash_offset,
        }
        if self.salt:
            value["salt"] = self.salt
        if self.version != 1:
            value["hash_type"] = self.version
        if self.no_superblock is not None:
            value["no_superblock"] = self.no_superblock
        return value

    @property
    def has_superblock(self) -> bool:
        """Whether a superblock precedes the tree; writers that do not say so have none."""
        return self.no_superblock is False

    def check(self, profile: Profile = Profile.STRICT) -> None:
        """Raise `OptionError` at the first rule that is broken."""
        length = DIGEST_HEX.get(self.algorithm.lower())
        if length is None:
            expected = " or ".join(DIGEST_HEX)
            raise _broken("hashtype", expected, ascii(self.algorithm[:32]))
        if not _HEX.match(self.root_hash) or len(self.root_hash) != length:
            raise _broken("hash", f"{length} hex digits", f"{len(self.root_hash)} characters")
        if not 1 <= self.data_blocks <= MAX_DATA_BLOCKS:
            raise _broken("blocknum", f"1 to {MAX_DATA_BLOCKS}", self.data_blocks)
        for name, size in (("blocksize", self.data_block_size), ("hashsize", self.hash_block_size)):
            if not BLOCK_SIZE_MIN <= size <= BLOCK_SIZE_MAX:
                raise _broken(name, f"{BLOCK_SIZE_MIN} to {BLOCK_SIZE_MAX}", size)
            if profile is Profile.STRICT and size & (size - 1):
                raise _broken(name, "a power of two", size)
        if self.hash_offset % self.hash_block_size or self.hash_offset > _MAX_OFFSET:
            raise _broken("offset", f"a multiple of {self.hash_block_size}", self.hash_offset)
        data_bytes = self.data_blocks * self.data_block_size
        if self.hash_offset < data_bytes:
            raise _broken("offset", f"at least {data_bytes}", self.hash_offset)
        if not _HEX.match(self.salt) or len(self.salt) % 2 or len(self.salt) > 2 * SALT_MAX:
            raise _broken("salt", f"up to {SALT_MAX} bytes in hex", f"{len(self.salt)} characters")
        if self.version not in (0, 1):
            raise _broken("hash_type", "0 or 1", self.version)

    def table(self, device: str) -> str:
        """Return the device-mapper table, one line, with data and tree on one device."""
        if not device or not device.isprintable() or " " in device:
            raise OptionError("a device name without blanks is needed", got=ascii(device[:64]))
        sectors = self.data_blocks * self.data_block_size // SECTOR_SIZE
        start = self.hash_offset // self.hash_block_size + self.has_superblock
        return (
            f"0 {sectors} verity {self.version} {device} {device} {self.data_block_size}"
            f" {self.hash_block_size} {self.data_blocks} {start} {self.algorithm.lower()}"
            f" {self.root_hash} {self.salt or '-'}"
        )

    def label(self) -> str:
        """Return the value of the snapshotter's labels, which have no room for anything else.

        Raises:
            OptionError: other block sizes than 512 and 4096, a salt, or a superblock.
        """
        sizes = self.data_block_size, self.hash_block_size
        if sizes != (LABEL_DATA_BLOCK, LABEL_HASH_BLOCK) or self.salt or self.has_superblock:
            raise OptionError(
                "a verity label",
                expected=f"blocks of {LABEL_DATA_BLOCK} and {LABEL_HASH_BLOCK} bytes, no salt,"
                " no superblock",
            )
        return f"{self.data_blocks},{self.hash_offset},{self.algorithm.lower()}:{self.root_hash}"

    def export_line(self) -> str:
        """Return what `nydus-image export --verity` prints, without the line end."""
        superblock = "" if self.has_superblock else "--no-superblock "
        return (
            f"dm-verity options: {superblock}--format={self.version} -s \"{self.salt}\""
            f" --hash={self.algorithm.lower()} --data-block-size={self.data_block_size}"
            f" --hash-block-size={self.hash_block_size} --data-blocks {self.data_blocks}"
            f" --hash-offset {self.hash_offset} {self.root_hash}"
        )  # fmt: skip

    def json_text(self) -> str:
        """Return the JSON object as text, as Go writes it."""
        return go_json(self.as_json())


def _broken(field: str, expected: str, got: object) -> OptionError:
    return OptionError(f"dm_verity.{field}", expected=expected, got=got)


def _from_export_line(match: re.Match[str]) -> DmVerity:
    superblock, version, salt, algorithm, data, tree, blocks, offset, root = match.groups()
    return DmVerity(
        root_hash=root,
        data_blocks=int(blocks),
        data_block_size=int(data),
        hash_block_size=int(tree),
        hash_offset=int(offset),
        algorithm=algorithm,
        salt=salt,
        version=int(version),
        no_superblock=superblock is not None,
    )


def parse_verity(text: str, profile: Profile = Profile.STRICT) -> DmVerity:
    """Decode any spelling: JSON, base64 of it, a label, or the exporter's line.

    Raises:
        OptionError: none of them, or a broken rule.
    """
    if len(text) > MAX_OPTION_BYTES:
        raise OptionError("dm-verity parameters are too long", expected=MAX_OPTION_BYTES)
    label, line = _LABEL.match(text), _EXPORT_LINE.match(text)
    if label:
        blocks, offset, algorithm, root = label.groups()
        sizes = LABEL_DATA_BLOCK, LABEL_HASH_BLOCK
        verity = DmVerity(root, int(blocks), *sizes, int(offset), algorithm, no_superblock=True)
    elif line:
        verity = _from_export_line(line)
    else:
        verity = DmVerity.from_fields(Fields(_json_object(text), "dm_verity"))
    verity.check(profile)
    return verity


def _json_object(text: str) -> dict[str, object]:
    if text.lstrip().startswith("{"):
        return decode_json(text.encode(errors="replace"), "dm-verity parameters")
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except ValueError:
        data = b""
    if not data or base64.b64encode(data).decode() != text:
        raise OptionError(
            "dm-verity parameters", expected="JSON, its base64, a label or the exporter's line"
        )
    return decode_json(data, "dm-verity parameters")
