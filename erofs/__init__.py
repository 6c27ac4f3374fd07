"""EROFS and RAFS v6: records, reader, writer, check and dump. Pure: no device, no network.

Nothing here needs a third-party package to be imported; codecs load on first use.
"""

from erofs.blobcheck import check_blob
from erofs.blobdump import dump_blob
from erofs.check import Finding, check_image
from erofs.dump import dump_image
from erofs.errors import (
    BadMagic,
    CodecError,
    CorruptStructure,
    FormatError,
    IntegrityError,
    NydusError,
    OutOfBounds,
    UnsupportedFeature,
    error_context,
)
from erofs.reader import Bootstrap, Image, Inode, open_bootstrap, open_image
from erofs.tree import Chunk, Node
from erofs.writer import BootstrapSpec, write_bootstrap

__all__ = [
    "BadMagic",
    "Bootstrap",
    "BootstrapSpec",
    "Chunk",
    "CodecError",
    "CorruptStructure",
    "Finding",
    "FormatError",
    "Image",
    "Inode",
    "IntegrityError",
    "Node",
    "NydusError",
    "OutOfBounds",
    "UnsupportedFeature",
    "check_blob",
    "check_image",
    "dump_blob",
    "dump_image",
    "error_context",
    "open_bootstrap",
    "open_image",
    "write_bootstrap",
]
