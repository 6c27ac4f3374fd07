"""Guest pull: the volume of an image that only the guest fetches, and what the agent is asked.

Source: spec vm-runtimes 2.6, 3.3, 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping

from kata.errors import OptionError
from kata.guest import Storage
from kata.option import go_json
from kata.path import check_container_id
from kata.volume import PLACEHOLDER, KataVirtualVolume, Metadata, VolumeType

__all__ = ["guest_pull_storage", "guest_pull_volume", "image_reference"]

DRIVER = "image_guest_pull"
PAUSE = "pause"
# Type of the container and name of the image, as containerd's CRI and CRI-O say them.
_ANNOTATIONS = (
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.image-name"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.ImageName"),
)


def guest_pull_volume(labels: Mapping[str, str], reference: str = "") -> KataVirtualVolume:
    """Return the volume for an image whose snapshots hold nothing.

    Args:
        labels: of the snapshot; Kata hands them to the agent.
        reference: of the image, where it is known.
    """
    ordered = dict(sorted(labels.items()))
    return KataVirtualVolume(
        VolumeType.IMAGE_GUEST_PULL,
        source=reference or PLACEHOLDER,
        options=tuple(f"{key}={value}" for key, value in ordered.items()),
        image_pull=Metadata(ordered),
    )


def image_reference(annotations: Mapping[str, str]) -> str:
    """Return which image Kata has the guest pull, from the container's OCI annotations.

    Raises:
        OptionError: no annotation names one.
    """
    for kind, name in _ANNOTATIONS:
        if kind in annotations:
            if annotations[kind] == "sandbox":
                return PAUSE
            if name not in annotations:
                raise OptionError(f"the annotation {name} is missing")
            return annotations[name]
    for _, name in _ANNOTATIONS:
        if name in annotations:
            return annotations[name]
    raise OptionError("no annotation names the image to pull")


def guest_pull_storage(
    container: str, volume: KataVirtualVolume, annotations: Mapping[str, str]
) -> Storage:
    """Return the request to kata-agent; annotations win over the volume's metadata."""
    if volume.volume_type is not VolumeType.IMAGE_GUEST_PULL:
        raise OptionError("a guest pull", got=volume.volume_type.value)
    values = dict(volume.image_pull.values or {}) if volume.image_pull else {}
    metadata = Metadata({**values, **annotations}).as_json()
    return Storage(
        driver=DRIVER,
        driver_options=(f"{DRIVER}={go_json(metadata)}",),
        source=image_reference(annotations),
        fstype="overlay",
        mount_point=f"/run/kata-containers/{check_container_id(container)}/rootfs",
    )
