"""The files of a bundle that are text: what each platform is told of the disk.

Everything here depends on the disk, its inputs and the place where the bundle will be, and on
nothing else. Sources: QEMU `qemu-system(1)`; Cloud Hypervisor `docs/disk_locking.md` and `--help`;
Firecracker `docs/getting-started.md`; CycloneDX 1.5.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from kata.bundlesource import Input
from kata.cmdline import verity_root
from kata.errors import OptionError
from kata.path import check_path
from kata.verity import DmVerity
from kata.volume import KataVirtualVolume, VolumeType

__all__ = ["DISK_NAME", "BundledDisk", "bundle_files"]

DISK_NAME = "image.disk"
# A virtio-blk serial has 20 bytes.
_SERIAL_DIGITS = 12
_GUEST_DEVICE = "/dev/vda"


class BundledDisk(NamedTuple):
    """The disk: its tree, its SHA-256 in hex, its bytes with the tree, and where it will be."""

    verity: DmVerity
    sha256: str
    size: int
    path: PurePosixPath

    @property
    def serial(self) -> str:
        """What the guest finds the disk by."""
        return f"image-{self.verity.root_hash[:_SERIAL_DIGITS]}"


def bundle_files(
    disk: BundledDisk, verity: dict[str, object], inputs: Sequence[Input], version: str
) -> dict[str, str]:
    """Return the texts by name.

    Args:
        disk: what they are about.
        verity: the tree as `nydus-image export --output-json` has it.
        inputs: what the disk was made of.
        version: of this program.

    Raises:
        OptionError: a place that cannot be written into one of them.
    """
    path = check_path(str(disk.path), "place of the bundle")
    if set(path) & set(' ,"\\=%'):
        raise OptionError("place of the bundle has characters that virtual machines cannot take")
    volume = KataVirtualVolume(
        VolumeType.IMAGE_RAW_BLOCK, path, "erofs", ("ro",), dm_verity=disk.verity
    )
    return {
        "verity.txt": f"{disk.verity.export_line()}\n",
        "verity.json": _json(verity),
        "volume.json": _json(volume.as_json()),
        "volume.option": f"{volume.encode()}\n",
        "kernel.cmdline": f"{_command_line(disk.verity)}\n",
        "qemu.args": _qemu(path, disk.serial),
        "cloud-hypervisor.args": f"--disk\npath={path},readonly=on,serial={disk.serial}\n",
        "firecracker.json": _json(_firecracker(path)),
        "sbom.json": _json(_sbom(disk, inputs, version)),
    }


def _json(value: object) -> str:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n"


def _command_line(verity: DmVerity) -> str:
    return verity_root(verity.table(_GUEST_DEVICE), wait_for=_GUEST_DEVICE)


def _qemu(path: str, serial: str) -> str:
    """Return arguments, one a line."""
    drive = f"file={path},format=raw,if=none,id=image,read-only=on"
    return f"-drive\n{drive}\n-device\nvirtio-blk-pci,drive=image,serial={serial}\n"


def _firecracker(path: str) -> dict[str, object]:
    drive = {
        "drive_id": "image",
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": True,
    }
    return {"drives": [drive]}


def _sbom(disk: BundledDisk, inputs: Sequence[Input], version: str) -> dict[str, object]:
    """Return a bill of materials without times and random numbers."""
    made = _component(Input(DISK_NAME, "disk", disk.sha256, disk.size))
    tool = {"type": "application", "name": "nydus-erofs", "version": version}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"tools": {"components": [tool]}, "component": made},
        "components": [_component(item) for item in inputs],
        "dependencies": [{"ref": disk.sha256, "dependsOn": sorted({i.sha256 for i in inputs})}],
    }


def _component(item: Input) -> dict[str, object]:
    return {
        "type": "file",
        "bom-ref": item.sha256,
        "name": item.name,
        "hashes": [{"alg": "SHA-256", "content": item.sha256}],
        "properties": [
            {"name": "nydus-erofs:kind", "value": item.kind},
            {"name": "nydus-erofs:bytes", "value": str(item.size)},
        ],
    }
