"""Start a guest: the files that QEMU reads, the share, QEMU itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from vmlab import share
from vmlab.catalogue import VIRTIOFS, Kernel
from vmlab.errors import LabError
from vmlab.initramfs import build_initramfs, busybox
from vmlab.kvm import kvm_defect
from vmlab.machine import Guest
from vmlab.processes import CHECKOUT, need, run
from vmlab.qemu import Hardware, machine_command
from vmlab.store import StoredKernel, find, kernels_directory

__all__ = ["BOOT_SECONDS", "boot", "boot_defect"]

# An emulated processor on a busy machine; 5 to 12 s on an idle one.
BOOT_SECONDS = 180
_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mkfs.ext4": "e2fsprogs",
    "setpriv": "util-linux",
}
_LAB = Path(__file__).resolve().parents[1]


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _interpreter() -> Path:
    """Return this Python without its virtual environment, as a path that a guest has."""
    return Path(os.path.realpath(sys.executable))


def _prepare(stored: StoredKernel, kernel: Kernel, hardware: Hardware, directory: Path) -> None:
    """Write the files that QEMU reads: initramfs and scratch disk."""
    settings = {
        "share": kernel.share,
        "release": stored.release,
        "tree": os.fspath(stored.modules),
        "lab": os.fspath(_LAB),
        "checkout": os.fspath(CHECKOUT),
        "python": os.fspath(_interpreter()),
    }
    modules = (*kernel.boot_modules, *kernel.rebuilt)
    (directory / "initramfs").write_bytes(build_initramfs(stored.modules, modules, settings))
    scratch = directory / "scratch"
    with scratch.open("wb") as file:
        file.truncate(hardware.scratch_mib << 20)
    options = "lazy_itable_init=1,lazy_journal_init=1"
    run([need("mkfs.ext4", "e2fsprogs"), "-q", "-F", "-E", options, scratch])


def _start(
    stored: StoredKernel, kernel: Kernel, hardware: Hardware, resources: contextlib.ExitStack
) -> Guest:
    directory = Path(tempfile.mkdtemp(prefix="vmlab-"))
    resources.callback(shutil.rmtree, directory, ignore_errors=True)
    _prepare(stored, kernel, hardware, directory)
    path = None
    if kernel.share == VIRTIOFS:
        extra = (CHECKOUT, kernels_directory(), _interpreter(), Path("/usr"), directory.parent)
        virtiofsd, path = share.start(directory, extra, directory / "virtiofsd.log")
        resources.callback(_kill, virtiofsd)
    port, inner = socket.socketpair()
    resources.callback(port.close)
    defect = None if hardware.accelerator == "tcg" else kvm_defect(stored)
    if hardware.accelerator == "kvm" and defect:
        raise LabError(f"no KVM: {defect}")
    accelerator = "tcg" if defect or hardware.accelerator == "tcg" else "kvm"
    with inner, (directory / "qemu.log").open("wb") as log:
        words = machine_command(
            hardware,
            accelerator,
            kernel=stored.vmlinux,
            directory=directory,
            share=path,
            port=inner.fileno(),
        )
        process = subprocess.Popen(
            [need("setpriv", "util-linux"), "--pdeathsig", "KILL", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[inner.fileno()],
            start_new_session=True,
        )
    resources.callback(_kill, process)
    return Guest(kernel.name, process, port, directory)


def boot(
    stored: StoredKernel,
    kernel: Kernel,
    hardware: Hardware | None = None,
    seconds: float = BOOT_SECONDS,
) -> Guest:
    """Boot a guest and return it when it can run commands.

    It is killed with the thread that calls this, so that nothing is ever left behind.

    Raises:
        LabError: a program is missing, or this is not root where that is needed.
        GuestDied, GuestTimeout: the guest did not come up.
    """
    with contextlib.ExitStack() as resources:
        guest = _start(stored, kernel, hardware or Hardware(), resources)
        guest.wait_ready(seconds)
        guest.own(resources.pop_all())
    return guest


def boot_defect(kernel: Kernel) -> str | None:
    """Return why a kernel cannot be booted here, and what helps, or None; downloads nothing."""
    try:
        for program, package in _PROGRAMS.items():
            need(program, package)
        busybox()
        if kernel.share == VIRTIOFS:
            share.find_virtiofsd()
    except LabError as error:
        return str(error)
    if find(kernel) is None:
        return f"kernel {kernel.name} is not cached: vm-images/run --fetch {kernel.name}"
    return None
