"""Read a mount list as Kata does: overlay directories, the extraoption, virtual volumes.

Takes what the recorded snapshotter gets wrong (spec vm-runtimes 3.2 to 3.4): a view whose
`Mounts` are a plain overlay, guest pulls that say nothing, the disk of no layer in front.
Source: spec vm-runtimes 2.5, 3.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kata.errors import OptionError
from kata.extraoption import NydusExtraOptions
from kata.mounts import HELPER, Mount
from kata.option import EXTRA_OPTION, MAX_OPTION_BYTES, VOLUME_OPTION
from kata.profile import Profile
from kata.volume import KataVirtualVolume

__all__ = ["Rootfs", "is_nydus_type", "read_rootfs"]

_FUSE = "fuse."
_LAYER = re.compile(r"(?:\\.|[^:\\])+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rootfs:
    """What one mount says.

    Args:
        type: of the mount.
        source: of the mount; a path for bind mounts.
        lower: lower directories of an overlay, the topmost first; without escapes.
        upper, work: directories of an active snapshot; empty for a view.
        extra: for nydusd in front of a VM.
        volumes: for Kata, without the stray ones of the recorded snapshotter.
        options: all others, in their order.
    """

    type: str
    source: str
    lower: tuple[str, ...]
    upper: str
    work: str
    extra: NydusExtraOptions | None
    volumes: tuple[KataVirtualVolume, ...]
    options: tuple[str, ...]


def is_nydus_type(mount_type: str, profile: Profile = Profile.STRICT) -> bool:
    """Tell whether Kata takes a mount for one of Nydus.

    Its Rust runtime knows one name; its Go runtime any path and any longer name.
    """
    if profile is not Profile.LENIENT:
        return mount_type == f"{_FUSE}{HELPER}"
    name = mount_type.removeprefix(_FUSE)
    return name != mount_type and name.rpartition("/")[2].startswith(HELPER)


def _unescape(path: str) -> str:
    return re.sub(r"\\(.)", r"\1", path, flags=re.DOTALL)


def _layers(value: str) -> tuple[str, ...]:
    """Split at colons without a backslash in front."""
    return tuple(_unescape(part) for part in _LAYER.findall(value))


def read_rootfs(mounts: Sequence[Mount], profile: Profile = Profile.STRICT) -> Rootfs:
    """Read the one mount of a container's root.

    Args:
        mounts: as containerd hands them on.
        profile: whose rules count; `LENIENT` takes everything that was recorded.

    Raises:
        OptionError: not one mount, too many options, or an option that cannot be used.
    """
    if len(mounts) != 1:
        raise OptionError("mounts of a container", expected=1, got=len(mounts))
    mount = mounts[0]
    size = sum(map(len, mount.options))
    if size > MAX_OPTION_BYTES:
        raise OptionError("mount options", expected=f"{MAX_OPTION_BYTES} bytes", got=size)
    paths = {"lowerdir": "", "upperdir": "", "workdir": ""}
    volumes: list[KataVirtualVolume] = []
    others: list[str] = []
    for option in mount.options:
        key, equals, value = option.partition("=")
        if option.startswith(VOLUME_OPTION):
            volumes.append(KataVirtualVolume.decode(option, profile))
        elif key in paths and equals:
            paths[key] = value
        elif not option.startswith(EXTRA_OPTION):
            others.append(option)
    return Rootfs(
        type=mount.type,
        source=mount.source,
        lower=_layers(paths["lowerdir"]),
        upper=_unescape(paths["upperdir"]),
        work=_unescape(paths["workdir"]),
        extra=NydusExtraOptions.find(mount.options, profile),
        volumes=tuple(volume for volume in volumes if not volume.is_stray),
        options=tuple(others),
    )
