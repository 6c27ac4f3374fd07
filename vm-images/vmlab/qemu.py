"""QEMU's arguments: pure functions of what a guest shall have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from vmlab.frames import PORT_NAME
from vmlab.processes import need

__all__ = [
    "KERNEL_ARGUMENTS",
    "Disk",
    "Hardware",
    "SharedTree",
    "base_command",
    "machine_command",
]

# What makes a guest start sooner, and end when it must: a kernel that has lost its mind cannot be
# asked for a command's status.
KERNEL_ARGUMENTS = (
    "console=ttyS0", "loglevel=5", "panic=-1", "oops=panic", "mitigations=off", "init_on_alloc=0",
    "nokaslr", "audit=0", "apparmor=0", "random.trust_cpu=on", "8250.nr_uarts=1",
)  # fmt: skip


class Disk(NamedTuple):
    """An image or an `nbd:` or `nbd+unix:` address that the guest reads as `/dev/vdb` and on.

    `format` is QEMU's name of what is in the file: `raw`, `vmdk`.
    """

    source: str
    serial: str = ""
    format: str = "raw"

    @classmethod
    def parse(cls, text: str) -> Disk:
        """Return what `--disk SOURCE[,serial=TEXT]` says."""
        source, _, serial = text.partition(",serial=")
        return cls(source, serial)


class SharedTree(NamedTuple):
    """A virtio-fs that somebody serves at a vhost-user socket, and its name in the guest."""

    tag: str
    socket: Path


class Hardware(NamedTuple):
    """What a guest gets.

    `pmem` are files that the guest has as `/dev/pmem0` and on, and may write to; their sizes are
    multiples of 2 MiB. `accelerator` is `auto`, `kvm` or `tcg`.
    """

    memory_mib: int = 1024
    cpus: int = 2
    scratch_mib: int = 2048
    disks: tuple[Disk, ...] = ()
    pmem: tuple[Path, ...] = ()
    shares: tuple[SharedTree, ...] = ()
    accelerator: str = "auto"
    kernel_arguments: tuple[str, ...] = ()


def _escape(value: str) -> str:
    """Write a value so that QEMU does not take its commas for the next option."""
    return value.replace(",", ",,")


def _accelerated(accelerator: str) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # With a thread for each processor a guest panicked once while it booted: "Oops: int3".
    # Presumably one still ran the breakpoint that Linux had put into its own code for a moment.
    return ["-accel", "tcg,thread=single", "-cpu", "max"]


def base_command(accelerator: str) -> list[str]:
    """Return how QEMU is started whatever it runs; `LabError`: it is not installed."""
    qemu = need("qemu-system-x86_64", "qemu-system-x86")
    return [qemu, *_accelerated(accelerator), "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-nic", "none"]  # fmt: skip


def _drive(name: str, disk: Disk, options: str) -> list[str]:
    serial = f",serial={_escape(disk.serial)}" if disk.serial else ""
    drive = f"file={_escape(disk.source)},format={disk.format},if=none,id={name},aio=threads"
    device = f"virtio-blk-pci,drive={name}{serial}"
    return ["-drive", f"{drive}{options}", "-device", device]


def _memory(hardware: Hardware, *, shared: bool) -> list[str]:
    """Return the memory, which virtiofsd has to have too, and the persistent one beside it."""
    sizes = [path.stat().st_size for path in hardware.pmem]
    more = f",slots={len(sizes)},maxmem={hardware.memory_mib + (sum(sizes) >> 20) + 1024}M"
    words = ["-m", f"{hardware.memory_mib}M{more if sizes else ''}"]
    if shared:
        size = f"{hardware.memory_mib}M"
        words += ["-object", f"memory-backend-memfd,id=memory,size={size},share=on",
                  "-numa", "node,memdev=memory"]  # fmt: skip
    for number, (path, bytes_) in enumerate(zip(hardware.pmem, sizes, strict=True)):
        backend = f"id=mem{number},share=on,mem-path={_escape(os.fspath(path))},size={bytes_}"
        words += ["-object", f"memory-backend-file,{backend}",
                  "-device", f"virtio-pmem-pci,memdev=mem{number}"]  # fmt: skip
    return words


def _share(name: str, tree: SharedTree) -> list[str]:
    return [
        "-chardev", f"socket,id={name},path={_escape(os.fspath(tree.socket))}",
        "-device", f"vhost-user-fs-pci,chardev={name},tag={_escape(tree.tag)}",
    ]  # fmt: skip


def machine_command(
    hardware: Hardware,
    accelerator: str,
    *,
    kernel: Path,
    directory: Path,
    share: Path | None,
    port: int,
) -> list[str]:
    """Return the command line of a guest.

    Args:
        hardware: the guest's.
        accelerator: `kvm` or `tcg`.
        kernel: its kernel, an ELF file.
        directory: has `initramfs` and `scratch`, gets `console`.
        share: virtiofsd's socket; None: QEMU shares the root itself, over 9p.
        port: inherited descriptor of a connected socket, the agent's channel.
    """
    devices = _drive("scratch", Disk(os.fspath(directory / "scratch")), ",cache=unsafe")
    for number, disk in enumerate(hardware.disks):
        devices += _drive(f"disk{number}", disk, ",read-only=on")
    for number, tree in enumerate(hardware.shares):
        devices += _share(f"share{number}", tree)
    if share is None:
        devices += ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,"
                    "multidevs=remap"]  # fmt: skip
    else:
        devices += _share("share", SharedTree("host", share))
    return [
        *base_command(accelerator), "-smp", str(hardware.cpus),
        *_memory(hardware, shared=share is not None or bool(hardware.shares)),
        "-kernel", os.fspath(kernel), "-initrd", os.fspath(directory / "initramfs"),
        "-append", " ".join((*KERNEL_ARGUMENTS, *hardware.kernel_arguments)),
        "-serial", f"file:{directory / 'console'}",
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=agent,fd={port}",
        "-device", f"virtserialport,chardev=agent,name={PORT_NAME}",
        *devices,
    ]  # fmt: skip
