"""Places and requests inside the guest, where nydusd's mounts and the agent's have to meet.

Source: spec vm-runtimes 2.5.
"""

from __future__ import annotations

from typing import NamedTuple

from kata.path import check_container_id

__all__ = ["Storage", "image_mountpoint", "overlay_storage"]

SHARED = "/run/kata-containers/shared"
PASSTHROUGH_MOUNTPOINT = "/containers"


class Storage(NamedTuple):
    """kata-agent's message of this name, without group and sharing."""

    driver: str
    source: str
    fstype: str
    mount_point: str
    options: tuple[str, ...] = ()
    driver_options: tuple[str, ...] = ()


def image_mountpoint(container: str) -> str:
    """Return where Kata has nydusd mount the image of a container."""
    return f"/rafs/{check_container_id(container)}/lowerdir"


def overlay_storage(container: str) -> Storage:
    """Return the request for a container's root: its snapshot directory over its image."""
    place = f"{SHARED}{PASSTHROUGH_MOUNTPOINT}/{check_container_id(container)}"
    return Storage(
        driver="overlayfs",
        source="overlay",
        fstype="overlay",
        mount_point=f"{place}/rootfs",
        options=(
            f"upperdir={place}/snapshotdir/fs",
            f"workdir={place}/snapshotdir/work",
            f"lowerdir={SHARED}{image_mountpoint(container)}",
            "index=off",
        ),
    )
