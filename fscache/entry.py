"""What a node daemon begins with, and the rows of its table of mounts: values only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from erofs.errors import NydusError
from erofs.values import EMPTY, Value, field
from fscache.config import DaemonConfig
from fscache.mounting import ROOT, Progress
from fscache.transport import Transport

if TYPE_CHECKING:
    from fscache.image import ServedImage
    from fscache.mounts.place import PlainMount

__all__ = ["Entry", "NodeOptions", "TableError"]


class TableError(NydusError):
    """A mount that is there already, is not there, or has a path that cannot be."""


class NodeOptions(Value):
    """What a node daemon begins with.

    Args:
        mountpoint: an existing directory.
        bootstrap: the image to mount there, with its `config`.
        shared_dir: a directory to bind there instead.
        virtual: the path below the mount point for either of them.
        writable: bound directories can be written to, and images that have an overlay
            configuration; else nothing can.
        follow: bound directories show what is mounted in them, also later; see `mount_bind`.
        id: name of the instance, as clients gave it.
        environment: adds to the configuration of images that are mounted later.
        transport: how all images are mounted.
        directio: read data files past the page cache.
        progress: called with (bytes done, all bytes) while an eager start fetches.
        holder: have another process keep what a successor needs, if this one is killed.
        restart: the command line which that process starts then, if any.
        exit_leaves: `PUT /daemon/exit` leaves the mounts to a successor.
    """

    mountpoint: Path
    bootstrap: Path | None = None
    config: DaemonConfig | None = None
    shared_dir: Path | None = None
    virtual: str = ROOT
    writable: bool = False
    follow: bool = False
    id: str | None = None
    supervisor: str | None = None
    environment: Mapping[str, str] = field(default=EMPTY, repr=False)
    transport: Transport = Transport.AUTO
    directio: bool = False
    progress: Progress | None = None
    holder: bool = False
    restart: tuple[str, ...] = ()
    exit_leaves: bool = False


class Entry:
    """One mount of the table: an image, or a directory that is passed through.

    `bind` of an image is the writable overlay over it.
    `is_image` says which of the two it is, also while a successor does not serve it yet.
    `adopted` is True for one that a killed daemon made, until a client asks for it again;
    `key` is under which a holder notes it when it is no image;
    `source` is the directory that is passed through.
    """

    def __init__(
        self,
        path: str,
        mounted_at: float,
        image: ServedImage | None,
        bind: PlainMount | None,
        key: str = "",
        source: str = "",
        *,
        adopted: bool = False,
        is_image: bool = False,
    ) -> None:
        self.path = path
        self.mounted_at = mounted_at
        self.image = image
        self.is_image = is_image or image is not None
        self.bind = bind
        self.key = key
        self.source = source
        self.adopted = adopted
