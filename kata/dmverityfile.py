"""`.dmverity`, the side file of an EROFS layer, and what Kata's agent is told of it.

Source: spec vm-runtimes 2.7, 4.6 (kata-types `gpt_disk.rs`, containerd's EROFS snapshotter).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from erofs.errors import BadMagic, OutOfBounds, error_context
from erofs.verity import BLOCK_SIZE_MAX, SUPERBLOCK_SIZE, VeritySuperblock
from erofs.view import View
from kata.errors import OptionError
from kata.option import Fields, decode_json
from kata.verity import DmVerity

__all__ = ["DmVerityFile", "LayerVerity", "read_layer_verity"]

MAX_FILE_BYTES = 64 << 10
# containerd writes no salt and means this one.
DEFAULT_SALT = "00" * 32
# What the agent takes when nothing else is said.
BLOCK_SIZE = 4096
_ROOT = re.compile(r"[0-9a-fA-F]{64}\Z")
_SALT = re.compile(r"(?:[0-9a-fA-F]{2}){0,256}\Z")


@dataclass(frozen=True, slots=True)
class DmVerityFile:
    """The content of the file: root hash and salt in hex, offset of the hash area in bytes.

    `salt` is None when the file has none; it is then the superblock's, or containerd's own.
    """

    root_hash: str
    hash_offset: int
    salt: str | None = None

    def __post_init__(self) -> None:
        if not _ROOT.match(self.root_hash):
            raise OptionError("roothash", expected="64 hex digits")
        if not 0 < self.hash_offset < 1 << 63 or self.hash_offset % BLOCK_SIZE:
            expected = f"a multiple of {BLOCK_SIZE}"
            raise OptionError("hashoffset", expected=expected, got=self.hash_offset)
        if self.salt is not None and not _SALT.match(self.salt):
            raise OptionError("salt", expected="up to 256 bytes in hex")

    @classmethod
    def parse(cls, data: bytes) -> DmVerityFile:
        """Decode the file; raise `OptionError`."""
        if len(data) > MAX_FILE_BYTES:
            raise OptionError("a .dmverity file", expected=f"at most {MAX_FILE_BYTES} bytes")
        fields = Fields(decode_json(data, "a .dmverity file"))
        salt = fields.text("salt") if fields.has("salt") else None
        return cls(fields.text("roothash"), fields.integer("hashoffset"), salt)

    def pack(self) -> bytes:
        """Encode the file."""
        value: dict[str, object] = {"roothash": self.root_hash, "hashoffset": self.hash_offset}
        if self.salt is not None:
            value["salt"] = self.salt
        return json.dumps(value, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class LayerVerity:
    """How a layer's device is opened: the file, and what the disk itself says.

    Block sizes in bytes; the salt in hex, which is known here.
    """

    root_hash: str
    hash_offset: int
    salt: str
    has_superblock: bool
    data_block_size: int = BLOCK_SIZE
    hash_block_size: int = BLOCK_SIZE

    def guest_options(self) -> tuple[str, ...]:
        """Return the words for kata-agent, in its runtime's order; defaults are left out."""
        prefix = "X-kata.dmverity."
        words = [
            "X-kata.dmverity-enabled=true",
            f"{prefix}roothash={self.root_hash}",
            f"{prefix}hashoffset={self.hash_offset}",
            f"{prefix}no-superblock={'false' if self.has_superblock else 'true'}",
            f"{prefix}salt={self.salt}",
        ]
        sizes = ("blocksize", self.data_block_size), ("hashsize", self.hash_block_size)
        words += [f"{prefix}{name}={size}" for name, size in sizes if size != BLOCK_SIZE]
        return tuple(words)

    def device_name(self, partition: int) -> str:
        """Return the name that the agent gives the device of a partition."""
        return f"kata-verity-{partition}-off{self.hash_offset}-{self.root_hash[:32]}"

    def parameters(self) -> DmVerity:
        """Return what the agent opens: the data are everything in front of the hash area."""
        return DmVerity(
            root_hash=self.root_hash,
            data_blocks=self.hash_offset // self.data_block_size,
            data_block_size=self.data_block_size,
            hash_block_size=self.hash_block_size,
            hash_offset=self.hash_offset,
            salt=self.salt,
            no_superblock=not self.has_superblock,
        )


def _superblock(data: bytes) -> VeritySuperblock | None:
    try:
        return VeritySuperblock.parse(View(data))
    except BadMagic:
        return None
    except OutOfBounds as error:
        raise OptionError("the hash area is not in the layer") from error


def read_layer_verity(path: Path, layer: Path) -> LayerVerity:
    """Read a `.dmverity` file, and look for the superblock in its layer.

    Args:
        path: the side file, of at most 64 KiB.
        layer: the EROFS image with the hash area behind it.

    Raises:
        OptionError: a file cannot be read, is something else, or the two contradict each other.
    """
    try:
        with path.open("rb") as file:
            record = DmVerityFile.parse(file.read(MAX_FILE_BYTES + 1))
        with layer.open("rb") as file:
            file.seek(record.hash_offset)
            data = file.read(SUPERBLOCK_SIZE)
    except OSError as error:
        raise OptionError(f"cannot be read: {error.strerror}", path=error.filename) from error
    except OptionError as error:
        error.add_context(path=path)
        raise
    with error_context(path=layer, offset=record.hash_offset):
        superblock = _superblock(data)
        if superblock is None:
            salt = DEFAULT_SALT if record.salt is None else record.salt
            return LayerVerity(record.root_hash, record.hash_offset, salt, False)
        end = superblock.data_blocks * superblock.data_block_size
        if end != record.hash_offset or superblock.hash_block_size > BLOCK_SIZE_MAX:
            raise OptionError("end of the data", expected=record.hash_offset, got=end)
        return LayerVerity(
            root_hash=record.root_hash,
            hash_offset=record.hash_offset,
            salt=superblock.salt.hex() if record.salt is None else record.salt,
            has_superblock=True,
            data_block_size=superblock.data_block_size,
            hash_block_size=superblock.hash_block_size,
        )
