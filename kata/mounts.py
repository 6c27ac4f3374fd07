"""Mount lists for containerd: what a snapshotter has to return in each of its modes.

Pure functions of what a snapshot is, so `Mounts` answers what `Prepare` or `View` answered:
the recorded snapshotter does not for views (spec vm-runtimes 3.2). Reading is `kata.rootfs`'s.
Source: spec vm-runtimes 3.1 to 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kata.errors import OptionError
from kata.extraoption import NydusExtraOptions
from kata.path import check_path, escape_layer, escape_option
from kata.verity import DmVerity
from kata.volume import KataVirtualVolume, VolumeType

__all__ = [
    "HELPER",
    "Disk",
    "Mount",
    "Snapshot",
    "disk_volumes",
    "native_mounts",
    "nydus_mounts",
]

HELPER = "nydus-overlayfs"
# mount.fuse puts everything into one argument of a shell, which ends at 128 KiB (section 1.2).
MAX_HELPER_BYTES = 130_900


class Mount(NamedTuple):
    """One of containerd's mounts."""

    type: str
    source: str
    options: tuple[str, ...]
    target: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that is not committed.

    Args:
        root: the snapshotter's directory.
        id: its name below `snapshots`.
        active: has an upper directory; a view has none.
        volatile: let overlayfs skip syncs.
        id_maps: `uidmap` and `gidmap` of a container with a user namespace, like `0:100000:65536`.
    """

    root: str
    id: str
    active: bool = True
    volatile: bool = False
    id_maps: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        check_path(self.root, "root of the snapshotter")
        check_path(f"/{self.id}", "snapshot id")
        if not self.id or "/" in self.id:
            raise OptionError("snapshot id", got=ascii(self.id[:64]))

    def path(self, name: str) -> str:
        """Return the path of `fs`, `work` or `mnt` of this snapshot."""
        return f"{self.root}/snapshots/{self.id}/{name}"


class Disk(NamedTuple):
    """A disk of the tarfs mode: its file, and the parameters of its hash tree if it has one."""

    path: str
    verity: DmVerity | None = None


def disk_volumes(disks: Sequence[Disk], *, whole_image: bool) -> tuple[KataVirtualVolume, ...]:
    """Return the volumes of disks, the topmost layer first; of a whole image there is one.

    A view is no layer: it has no disk here (section 3.4).
    """
    if whole_image and len(disks) != 1:
        raise OptionError("disks of a whole image", expected=1, got=len(disks))
    kind = VolumeType.IMAGE_RAW_BLOCK if whole_image else VolumeType.LAYER_RAW_BLOCK
    return tuple(
        KataVirtualVolume(kind, disk.path, "erofs", ("ro",), dm_verity=disk.verity)
        for disk in disks
    )


def _lowerdir(paths: Sequence[str]) -> str:
    if not paths:
        raise OptionError("an overlay without lower directories")
    return "lowerdir=" + ":".join(escape_layer(check_path(path, "layer")) for path in paths)


def _upper(snapshot: Snapshot) -> list[str]:
    work, upper = escape_option(snapshot.path("work")), escape_option(snapshot.path("fs"))
    return [f"workdir={work}", f"upperdir={upper}"]


def native_mounts(snapshot: Snapshot, parents: Sequence[str]) -> tuple[Mount, ...]:
    """Return the mount of an ordinary snapshot: bind, or overlay of its parents.

    Args:
        snapshot: which one.
        parents: `fs` directories, the topmost first.
    """
    maps: list[str] = []
    if snapshot.id_maps is not None:
        maps = [f"uidmap={snapshot.id_maps[0]}", f"gidmap={snapshot.id_maps[1]}"]
    if not parents or (len(parents) == 1 and not snapshot.active):
        source = parents[0] if parents else snapshot.path("fs")
        flag = "rw" if snapshot.active else "ro"
        return (Mount("bind", check_path(source, "layer"), (flag, "rbind", *maps)),)
    options = _upper(snapshot) if snapshot.active else []
    if snapshot.active and snapshot.volatile:
        options.append("volatile")
    return (Mount("overlay", "overlay", (*options, *maps, _lowerdir(parents))),)


def nydus_mounts(
    snapshot: Snapshot,
    image: str,
    above: Sequence[str] = (),
    *,
    extra: NydusExtraOptions | None = None,
    volumes: Sequence[KataVirtualVolume] = (),
    helper: str = HELPER,
) -> tuple[Mount, ...]:
    """Return the mount of a snapshot on a Nydus image, for runc and for Kata alike.

    Args:
        snapshot: which one.
        image: where the image's filesystem appears on the host (section 3.1).
        above: `fs` directories of plain layers over the image, the topmost first.
        extra: for Kata with nydusd.
        volumes: for Kata, the topmost layer first.
        helper: name or absolute path of the mount helper, which extra and volumes need.

    Raises:
        OptionError: a broken rule, or more options than reach the helper.
    """
    options: list[str] = []
    if snapshot.active:
        options = ["volatile"] if snapshot.volatile else []
        options += [*_upper(snapshot), _lowerdir([*above, image])]
    else:
        # Without an upper directory overlayfs wants two lower ones.
        options = [_lowerdir([*above, image, snapshot.path("fs")])]
    carried = [volume.encode() for volume in volumes]
    if extra is not None:
        carried.append(extra.encode())
    if not carried:
        return (Mount("overlay", "overlay", tuple(options)),)
    options += carried
    size = sum(len(option.encode(errors="replace")) + 1 for option in options)
    if size > MAX_HELPER_BYTES:
        raise OptionError("options for the mount helper", expected=MAX_HELPER_BYTES, got=size)
    return (Mount(f"fuse.{_helper_name(helper)}", "overlay", tuple(options)),)


def _helper_name(helper: str) -> str:
    """Check that Kata recognises the helper: its last component begins with the known name."""
    if "/" in helper:
        check_path(helper, "mount helper")
    if not helper.rpartition("/")[2].startswith(HELPER) or not helper.isprintable():
        raise OptionError("mount helper", expected=f"{HELPER}…", got=ascii(helper[:64]))
    return helper
