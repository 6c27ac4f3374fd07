"""EROFS, RAFS v6 and v5: records, reader, writer, check and dump. Pure: no device, no network.

Nothing here needs a third-party package to be imported; codecs load on first use.

The names below, but for the errors, are loaded with their modules when they are used for the
first time: a daemon that starts needs few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from erofs.blobcheck import check_blob
    from erofs.blobdump import dump_blob
    from erofs.check import Finding, check_image
    from erofs.dump import dump_image
    from erofs.load import load_tree
    from erofs.opening import AnyBootstrap, AnyInode, open_rafs
    from erofs.reader import Bootstrap, Image, Inode, open_bootstrap, open_image
    from erofs.translation import PlacedBlob, Translation, translate
    from erofs.tree import Chunk, Node
    from erofs.v5.image import BootstrapV5
    from erofs.v5.inode import InodeV5
    from erofs.writer import BootstrapSpec, write_bootstrap

__all__ = [
    "AnyBootstrap",
    "AnyInode",
    "BadMagic",
    "Bootstrap",
    "BootstrapSpec",
    "BootstrapV5",
    "Chunk",
    "CodecError",
    "CorruptStructure",
    "Finding",
    "FormatError",
    "Image",
    "Inode",
    "InodeV5",
    "IntegrityError",
    "Node",
    "NydusError",
    "OutOfBounds",
    "PlacedBlob",
    "Translation",
    "UnsupportedFeature",
    "check_blob",
    "check_image",
    "dump_blob",
    "dump_image",
    "error_context",
    "load_tree",
    "open_bootstrap",
    "open_image",
    "open_rafs",
    "translate",
    "write_bootstrap",
]

_NAMES_BY_MODULE = {
    "blobcheck": "check_blob",
    "blobdump": "dump_blob",
    "check": "Finding check_image",
    "dump": "dump_image",
    "load": "load_tree",
    "opening": "AnyBootstrap AnyInode open_rafs",
    "reader": "Bootstrap Image Inode open_bootstrap open_image",
    "translation": "PlacedBlob Translation translate",
    "tree": "Chunk Node",
    "v5.image": "BootstrapV5",
    "v5.inode": "InodeV5",
    "writer": "BootstrapSpec write_bootstrap",
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
