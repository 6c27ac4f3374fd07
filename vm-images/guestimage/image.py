"""Put a guest image together: filesystem, hash tree, partition table, kernel command line."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from builder.hashtree import add_hash_tree
from builder.output import OutputDisk, write_file
from erofs.verity import ALGORITHM, HASH_BLOCK_SIZE, VERSION, HashTree, TreeFormat
from guestimage.errors import GuestImageError
from guestimage.layout import DAX_BYTES, MIB, Layout, Table, dax_header, plan, write_table
from guestimage.rootfs import make_filesystem
from kata.cmdline import plain_root, verity_root

__all__ = ["ImageOptions", "make_image"]

IMAGE_NAME, PARAMETERS_NAME, CMDLINE_NAME = "guest.img", "root_hash.txt", "kernel.cmdline"
BLOCK_BYTES = 4096
_SECTOR_BYTES = 512
_MODE = 0o644
_COPY_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How an image is made.

    Args:
        measured: with a hash tree in a second partition.
        table: kind of the partition table.
        dax: with the header for guests that map it as persistent memory.
        own_init: our first program in place of the source's.
        device: what the guest calls the disk; `/dev/pmem0` for persistent memory.
    """

    measured: bool = True
    table: Table = Table.GPT
    dax: bool = False
    own_init: bool = True
    device: str = "/dev/vda"


def make_image(source: Path, output: Path, options: ImageOptions | None = None) -> str:
    """Make an image in a folder and return the kernel's command line for it.

    The same source and options give the same bytes.

    Args:
        source: directory or tar of the guest's files.
        output: an existing folder, which gets `guest.img`, `root_hash.txt` if it is measured,
            and `kernel.cmdline`.
        options: see there.

    Raises:
        NydusError: the source cannot be read, a program is missing, or the disk is full.
    """
    options = options or ImageOptions()
    if not output.is_dir():
        raise GuestImageError("is no folder", path=output)
    with tempfile.TemporaryDirectory(dir=output, prefix=".guest-image-") as name:
        work = Path(name)
        filesystem = work / "rootfs.erofs"
        make_filesystem(source, filesystem, work, own_init=options.own_init)
        layout = plan(filesystem.stat().st_size, options.table, measured=options.measured)
        digest = _digest(filesystem)
        tree = _append_tree(filesystem, layout, digest) if options.measured else None
        disk = work / "disk"
        _write_disk(disk, filesystem, layout, options, digest.hex())
        line = _command_line(tree, options.device)
        write_file(output / CMDLINE_NAME, f"{line}\n".encode(), _MODE)
        parameters = output / PARAMETERS_NAME
        parameters.unlink(missing_ok=True)
        if tree is not None:
            write_file(parameters, f"{_parameters(tree)}\n".encode(), _MODE)
        disk.rename(output / IMAGE_NAME)
    return line


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _append_tree(filesystem: Path, layout: Layout, salt: bytes) -> HashTree:
    """Make the file as large as its partition, with the tree of all of that behind it.

    The salt must not be empty (spec vm-runtimes 6.2) and is made from the content.
    """
    size = layout.data_bytes
    source = filesystem.with_suffix(".plain")
    filesystem.rename(source)
    with OutputDisk(filesystem, _MODE) as disk:
        _copy(source, disk, 0)
        disk.resize(size)
        tree = add_hash_tree(disk, size, TreeFormat(BLOCK_BYTES, HASH_BLOCK_SIZE, salt))
        disk.commit()
    source.unlink()
    if tree.end - size > layout.hash_bytes:
        raise GuestImageError("the hash tree is larger than its partition")
    return tree


def _copy(source: Path, disk: OutputDisk, offset: int) -> None:
    """Copy a file to an offset of the disk; zeros stay holes."""
    with source.open("rb") as file:
        while data := file.read(_COPY_BYTES):
            if data.count(0) != len(data):
                disk.write_at(offset, data)
            offset += len(data)


def _write_disk(
    path: Path, filesystem: Path, layout: Layout, options: ImageOptions, seed: str
) -> None:
    """Write the disk; the table comes first, as its program wants a disk of its own."""
    with path.open("wb") as file:
        file.truncate(layout.disk * MIB)
    write_table(path, layout, options.table, seed)
    front = DAX_BYTES if options.dax else 0
    plain = path.with_suffix(".table")
    path.rename(plain)
    with OutputDisk(path, _MODE) as disk:
        disk.resize(front + layout.disk * MIB)
        if front:
            disk.write_at(0, dax_header(layout))
        _copy(plain, disk, front)
        _copy(filesystem, disk, front + MIB)
        disk.commit()
    plain.unlink()
    filesystem.unlink()


def _parameters(tree: HashTree) -> str:
    """Return what Kata's configuration takes as `kernel_verity_params`."""
    form = tree.format
    values = {
        "root_hash": tree.root.hex(),
        "salt": form.salt.hex(),
        "data_blocks": tree.data_blocks,
        "data_block_size": form.data_block_size,
        "hash_block_size": form.hash_block_size,
    }
    return ",".join(f"{key}={value}" for key, value in values.items())


def _command_line(tree: HashTree | None, device: str) -> str:
    data, hashes = (f"{device}{'p' * device[-1].isdigit()}{number}" for number in (1, 2))
    if tree is None:
        return plain_root(data)
    form = tree.format
    sectors = tree.data_blocks * form.data_block_size // _SECTOR_BYTES
    table = (
        f"0 {sectors} verity {VERSION} {data} {hashes} {form.data_block_size}"
        f" {form.hash_block_size} {tree.data_blocks} 0 {ALGORITHM} {tree.root.hex()}"
        f" {form.salt.hex()}"
    )
    return verity_root(table, wait_for=hashes)
