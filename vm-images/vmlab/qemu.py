"""QEMU's arguments: pure functions of what a guest shall have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from vmlab.frames import PORT_NAME
from vmlab.processes import need

__all__ = ["KERNEL_ARGUMENTS", "Disk", "Hardware", "base_command", "machine_command"]

# What makes a guest start sooner, and end when it must: a kernel that has lost its mind cannot be
# asked for a command's status.
KERNEL_ARGUMENTS = (
    "console=ttyS0", "loglevel=5", "panic=-1", "oops=panic", "mitigations=off", "init_on_alloc=0",
    "nokaslr", "audit=0", "apparmor=0", "random.trust_cpu=on", "8250.nr_uarts=1",
)  # fmt: skip


class Disk(NamedTuple):
    """A raw image or an `nbd:` or `nbd+unix:` address that the guest reads as `/dev/vdb` and on."""

    source: str
    serial: str = ""

    @classmethod
    def parse(cls, text: str) -> Disk:
        """Return what `--disk SOURCE[,serial=TEXT]` says."""
        source, _, serial = text.partition(",serial=")
        return cls(source, serial)


class Hardware(NamedTuple):
    """What a guest gets; `accelerator` is `auto`, `kvm` or `tcg`."""

    memory_mib: int = 1024
    cpus: int = 2
    scratch_mib: int = 2048
    disks: tuple[Disk, ...] = ()
    accelerator: str = "auto"
    kernel_arguments: tuple[str, ...] = ()


def _escape(value: str) -> str:
    """Write a value so that QEMU does not take its commas for the next option."""
    return value.replace(",", ",,")


def _accelerated(accelerator: str) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]


def base_command(accelerator: str) -> list[str]:
    """Return how QEMU is started whatever it runs; `LabError`: it is not installed."""
    qemu = need("qemu-system-x86_64", "qemu-system-x86")
    return [qemu, *_accelerated(accelerator), "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-nic", "none"]  # fmt: skip


def _drive(name: str, source: str, options: str, serial: str) -> list[str]:
    device = f"virtio-blk-pci,drive={name}" + (f",serial={_escape(serial)}" if serial else "")
    drive = f"file={_escape(source)},format=raw,if=none,id={name},aio=threads{options}"
    return ["-drive", drive, "-device", device]


def _share(socket: Path | None, memory_mib: int) -> list[str]:
    if socket is None:
        return ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,"
                "multidevs=remap"]  # fmt: skip
    return [
        "-object", f"memory-backend-memfd,id=memory,size={memory_mib}M,share=on",
        "-numa", "node,memdev=memory",
        "-chardev", f"socket,id=share,path={_escape(os.fspath(socket))}",
        "-device", "vhost-user-fs-pci,chardev=share,tag=host",
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
    drives = _drive("scratch", os.fspath(directory / "scratch"), ",cache=unsafe", "")
    for number, disk in enumerate(hardware.disks):
        drives += _drive(f"disk{number}", disk.source, ",read-only=on", disk.serial)
    return [
        *base_command(accelerator),
        "-m", f"{hardware.memory_mib}M", "-smp", str(hardware.cpus),
        "-kernel", os.fspath(kernel), "-initrd", os.fspath(directory / "initramfs"),
        "-append", " ".join((*KERNEL_ARGUMENTS, *hardware.kernel_arguments)),
        "-serial", f"file:{directory / 'console'}",
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=agent,fd={port}",
        "-device", f"virtserialport,chardev=agent,name={PORT_NAME}",
        *_share(share, hardware.memory_mib),
        *drives,
    ]  # fmt: skip
