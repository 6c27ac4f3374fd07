"""Open a bootstrap of whichever version."""

from __future__ import annotations

import mmap

from erofs.base import Source, open_as
from erofs.inode import Inode
from erofs.reader import Bootstrap
from erofs.v5.image import BootstrapV5
from erofs.v5.inode import InodeV5
from erofs.v5.layout import is_v5
from erofs.view import View

__all__ = ["AnyBootstrap", "AnyInode", "open_rafs"]

AnyBootstrap = Bootstrap | BootstrapV5
AnyInode = Inode | InodeV5


def _rafs(view: View, mapping: mmap.mmap | None) -> AnyBootstrap:
    return BootstrapV5(view, mapping) if is_v5(view) else Bootstrap(view, mapping)


def open_rafs(source: Source) -> AnyBootstrap:
    """Open a RAFS v6 or v5 bootstrap from a path (mapped) or from bytes.

    What both kinds have is meant to be used without asking for the kind: `version`, `flags`,
    `chunk_size`, `compressor`, `digester`, `is_tarfs`, `inode_count`, `blobs`, `blob_hints`,
    `tables`, `prefetch_nids`, `root`, `inode`, `lookup`, `walk`, and of inodes the attributes,
    `entries`, `lookup`, `readlink`, `xattrs` and `file_chunks`.

    Raises:
        FormatError: not a bootstrap, or one that strict readers refuse.
        OSError: the path cannot be opened.
    """
    return open_as(_rafs, source)
