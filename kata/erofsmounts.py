"""EROFS layers for Kata's Rust runtime: several mounts that nobody on the host makes.

Source: spec vm-runtimes 2.7 (kata-containers `erofs_rootfs.rs`, containerd's EROFS snapshotter).
The disk that follows from them is `kata.disk`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kata.errors import OptionError
from kata.gpt import MAX_PARTITIONS
from kata.mounts import Mount
from kata.path import check_path

__all__ = ["ErofsLayer", "ErofsRootfs", "erofs_mounts", "is_erofs_rootfs", "read_erofs_rootfs"]

_DMVERITY = "X-containerd.dmverity="
_MKDIR = "X-containerd.mkdir.path="
_GUEST_MKDIR = "X-kata.mkdir.path="
_DEVICE = "device="
_OVERLAYS = ("overlay", "format/overlay", "format/mkdir/overlay")
_WRITABLE = "ext4"
_EROFS = "erofs"
_MODE = "0755"


@dataclass(frozen=True, slots=True)
class ErofsLayer:
    """One EROFS mount: the image, its `.dmverity` file, and the devices of a merged image.

    `devices` are the layers' images, the lowest first; only a merged image has them.
    """

    path: str
    dmverity: str = ""
    devices: tuple[str, ...] = ()

    @property
    def snapshot_id(self) -> str:
        """The directory in which the image lies, which names its partition."""
        return self.path.split("/")[-2] or "unknown"


@dataclass(frozen=True, slots=True)
class ErofsRootfs:
    """A container's root as Kata gets it.

    Args:
        layers: the topmost first.
        writable: path of the ext4 image of the upper layer; "" when the guest uses its memory.
        mkdir: directories that the guest makes, as `path:mode`.
    """

    layers: tuple[ErofsLayer, ...]
    writable: str = ""
    mkdir: tuple[str, ...] = ()

    def guest_mkdir(self) -> tuple[str, ...]:
        """Return the words for kata-agent, which go to the first EROFS storage."""
        return tuple(f"{_GUEST_MKDIR}{item}" for item in self.mkdir)


def _check_layers(layers: Sequence[ErofsLayer]) -> None:
    if not 1 <= len(layers) <= MAX_PARTITIONS:
        raise OptionError("EROFS layers", expected=f"1 to {MAX_PARTITIONS}", got=len(layers))
    for layer in layers:
        for path in (layer.path, *layer.devices):
            check_path(path, "EROFS layer")
        if layer.dmverity:
            check_path(layer.dmverity, "X-containerd.dmverity")
        if layer.devices and len(layers) > 1:
            raise OptionError("devices belong to one merged image, not to one of several layers")


def erofs_mounts(layers: Sequence[ErofsLayer], writable: str = "") -> tuple[Mount, ...]:
    """Return the mounts of an active snapshot.

    Args:
        layers: the topmost first, or one merged image with its devices.
        writable: path of an ext4 image, ready made; "" for memory of the guest.

    Raises:
        OptionError: too many layers, or a path that is not plain.
    """
    _check_layers(layers)
    mounts: list[Mount] = []
    options: list[str] = []
    if writable:
        mounts.append(Mount(_WRITABLE, check_path(writable, "writable layer"), ("rw", "loop")))
        upper, work = "{{ mount 0 }}/upper", "{{ mount 0 }}/work"
        options = [f"{_MKDIR}{upper}:{_MODE}", f"{_MKDIR}{work}:{_MODE}"]
        options += [f"workdir={work}", f"upperdir={upper}"]
    first = len(mounts)
    for layer in layers:
        words = ["ro", "loop", *(f"{_DEVICE}{path}" for path in layer.devices)]
        if layer.dmverity:
            words.append(f"{_DMVERITY}{layer.dmverity}")
        mounts.append(Mount(_EROFS, layer.path, tuple(words)))
    last = len(mounts) - 1
    template = f"{{{{ mount {first} }}}}" if first == last else f"{{{{ overlay {first} {last} }}}}"
    options.append(f"lowerdir={template}")
    return (*mounts, Mount("format/mkdir/overlay", "overlay", tuple(options)))


def is_erofs_rootfs(mounts: Sequence[Mount]) -> bool:
    """Tell whether Kata takes a mount list for EROFS layers."""
    kinds = {mount.type.lower() for mount in mounts}
    return len(mounts) > 1 and _EROFS in kinds and bool(kinds.intersection(_OVERLAYS))


def read_erofs_rootfs(mounts: Sequence[Mount]) -> ErofsRootfs:
    """Read a mount list as Kata does, which goes by types and not by positions.

    Raises:
        OptionError: not EROFS layers, or what `erofs_mounts` would not write.
    """
    if not is_erofs_rootfs(mounts):
        raise OptionError("not the mounts of EROFS layers")
    layers: list[ErofsLayer] = []
    writable: list[str] = []
    mkdir: list[str] = []
    for mount in mounts:
        kind = mount.type.lower()
        if kind == _WRITABLE:
            writable.append(check_path(mount.source, "writable layer"))
        elif kind == _EROFS:
            layers.append(_read_layer(mount))
        elif kind in _OVERLAYS:
            mkdir += [
                item.removeprefix(_MKDIR) for item in mount.options if item.startswith(_MKDIR)
            ]
        else:
            raise OptionError("type of a mount among EROFS layers", got=ascii(mount.type[:32]))
    _check_layers(layers)
    if len(writable) > 1:
        raise OptionError("writable layers", expected="at most 1", got=len(writable))
    return ErofsRootfs(tuple(layers), "".join(writable), tuple(mkdir))


def _read_layer(mount: Mount) -> ErofsLayer:
    devices = [item.removeprefix(_DEVICE) for item in mount.options if item.startswith(_DEVICE)]
    files = [item.removeprefix(_DMVERITY) for item in mount.options if item.startswith(_DMVERITY)]
    if len(files) > 1:
        raise OptionError("X-containerd.dmverity", expected="at most 1", got=len(files))
    return ErofsLayer(mount.source, "".join(files), tuple(devices))
