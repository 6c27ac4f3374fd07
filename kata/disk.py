"""The disk of a container's EROFS layers: one file, files in a row, or partitions.

Source: spec vm-runtimes 2.7. A single image is attached as it is; a merged one is followed by
its devices, so that EROFS sees one flat device; several layers become partitions of one disk.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kata.dmverityfile import LayerVerity, read_layer_verity
from kata.erofsmounts import ErofsLayer, ErofsRootfs
from kata.errors import OptionError
from kata.gpt import HEAD_SECTORS, Partition, place, write_gpt
from kata.vmdk import SECTOR_SIZE, Extent, file_extents, write_descriptor

__all__ = ["LayerDisk", "make_disk", "partition_options"]

DESCRIPTOR, HEAD, PADDING = "layers.vmdk", "gpt-head.img", "padding.img"
_LOWER = ("X-kata.overlay-lower", "X-kata.multi-layer=true")


class LayerDisk(NamedTuple):
    """What a VM gets.

    Args:
        path: the image itself, or a VMDK descriptor.
        format: `raw` or `vmdk`, for QEMU.
        partitions: of several layers, the topmost first; none for one flat device.
        options: for kata-agent, of each partition, or of the one device.
    """

    path: Path
    format: str
    partitions: tuple[Partition, ...]
    options: tuple[tuple[str, ...], ...]


def partition_options(number: int, verity: LayerVerity | None = None) -> tuple[str, ...]:
    """Return what kata-agent is told of a partition; a lower number hides a higher one."""
    words = (*_LOWER, "X-kata.gpt-partitioned=true", f"X-kata.partition-number={number}")
    return words if verity is None else (*words, *verity.guest_options())


def _size(path: str) -> int:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise OptionError(f"cannot be used: {error.strerror}", path=path) from error
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        raise OptionError("not a file with content", path=path)
    return found.st_size


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).rename(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _partition_extents(
    layers: Sequence[ErofsLayer], partitions: Sequence[Partition], head: Path, padding: Path
) -> list[Extent]:
    extents = [Extent(str(head), HEAD_SECTORS)]
    end = HEAD_SECTORS
    for layer, partition in zip(layers, partitions, strict=True):
        if partition.first > end:
            extents.append(Extent(str(padding), partition.first - end))
        extents += file_extents(layer.path, partition.sectors * SECTOR_SIZE)
        end = partition.last + 1
    return extents


def _make_partitioned(rootfs: ErofsRootfs, directory: Path) -> LayerDisk:
    sizes = [-(-_size(layer.path) // SECTOR_SIZE) for layer in rootfs.layers]
    names = [f"erofs-{number}-s{layer.snapshot_id}" for number, layer in enumerate(rootfs.layers)]
    partitions = place(names, sizes)
    options = []
    for number, layer in enumerate(rootfs.layers, 1):
        verity = None
        if layer.dmverity:
            verity = read_layer_verity(Path(layer.dmverity), Path(layer.path))
        options.append(partition_options(number, verity))
    head, padding = directory / HEAD, directory / PADDING
    text = write_descriptor(_partition_extents(rootfs.layers, partitions, head, padding))
    _write(head, write_gpt(partitions))
    # Less than an alignment lies between two partitions; all gaps show the same zeros.
    _write(padding, bytes(HEAD_SECTORS * SECTOR_SIZE))
    _write(directory / DESCRIPTOR, text.encode())
    options[0] += rootfs.guest_mkdir()
    return LayerDisk(directory / DESCRIPTOR, "vmdk", tuple(partitions), tuple(options))


def make_disk(rootfs: ErofsRootfs, directory: Path) -> LayerDisk:
    """Describe the read-only disk of a container's layers; no layer is copied.

    Args:
        rootfs: as `read_erofs_rootfs` returns it.
        directory: absolute; gets the descriptor and what belongs to it, where one is needed.

    Raises:
        OptionError: a layer that is missing or empty, or verity parameters that cannot be used.
        OSError: a file cannot be written.
    """
    first = rootfs.layers[0]
    if first.dmverity and first.devices:
        raise OptionError("a merged image cannot be checked by dm-verity", path=first.path)
    # Only partitions are checked by dm-verity in the guest, so a single layer may become one.
    if first.dmverity or len(rootfs.layers) > 1:
        return _make_partitioned(rootfs, directory)
    options = (("ro", *_LOWER, *rootfs.guest_mkdir()),)
    if not first.devices:
        _size(first.path)
        return LayerDisk(Path(first.path), "raw", (), options)
    extents: list[Extent] = []
    for path in (first.path, *first.devices):
        extents += file_extents(path, _size(path))
    _write(directory / DESCRIPTOR, write_descriptor(extents).encode())
    return LayerDisk(directory / DESCRIPTOR, "vmdk", (), options)
