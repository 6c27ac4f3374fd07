"""Whether KVM truly works here, found out by booting a kernel until it misses its root.

A device that can be opened says little: nested or emulated ones lose instructions or registers. One
of a processor without virtualization must be emulated by this machine's own hypervisor: one booted
a kernel, and minutes later none any more. So it is not even tried.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from vmlab.qemu import KERNEL_ARGUMENTS, base_command
from vmlab.store import StoredKernel, kernels_directory

__all__ = ["kvm_defect"]

_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = {"vmx", "svm"}
_SECONDS = 15
_REACHED = b"Unable to mount root fs"


@functools.cache
def kvm_defect(stored: StoredKernel) -> str | None:
    """Return why guests have to do without KVM on this machine, or None.

    That a kernel has booted with it is remembered until this machine is booted again.
    """
    if not _FLAGS & _processor_flags():
        return "this processor has no virtualization (vmx, svm)"
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{_DEVICE}: {error.strerror}"
    proof = kernels_directory() / ".kvm"
    wanted = f"{_BOOT_ID.read_text().strip()} {stored.directory.name}\n"
    if proof.exists() and proof.read_text() == wanted:
        return None
    defect = _boot_defect(stored.vmlinux)
    if defect is None:
        proof.write_text(wanted)
    return defect


def _processor_flags() -> set[str]:
    for line in _CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


def _boot_defect(vmlinux: Path) -> str | None:
    with tempfile.TemporaryDirectory(prefix="vmlab-kvm-") as directory:
        console = Path(directory) / "console"
        words = [
            *base_command("kvm"), "-m", "512M", "-kernel", os.fspath(vmlinux),
            "-append", " ".join(KERNEL_ARGUMENTS), "-serial", f"file:{console}",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                words,
                cwd=directory,  # where an aborted QEMU leaves its core
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"a kernel did not boot with it in {_SECONDS} s"
        if console.exists() and _REACHED in console.read_bytes():
            return None
        last = (done.stderr.strip().splitlines() or [f"QEMU's status {done.returncode}"])[-1]
        return f"a kernel did not boot with it: {last}"
