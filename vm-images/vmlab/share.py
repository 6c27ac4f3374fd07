"""This machine's root for a guest over virtio-fs: read-only, without its pseudo filesystems.

`python -m vmlab.share` makes a mount namespace of its own, in which the root is bound read-only,
and becomes virtiofsd there: Debian 12's cannot be told to refuse writes. Only single mounts are
bound: a copy of all would hold those mounts that other programs want to be rid of.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vmlab.errors import LabError
from vmlab.processes import need

__all__ = ["find_virtiofsd", "main", "start"]

_CLONE_NEWNS = 0x00020000
_MS_RDONLY = 0x1
_MS_REMOUNT = 0x20
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_PR_SET_PDEATHSIG = 1


def find_virtiofsd() -> str:
    """Return the path of virtiofsd; `LabError`: it is not installed, or this is not root."""
    path = need("virtiofsd", "qemu-system-common, or virtiofsd from Debian 13 on")
    if os.geteuid() != 0:
        raise LabError("sharing the root by virtiofsd needs root; kernel 6.12-generic does not")
    return path


def start(
    directory: Path, extra: Sequence[Path], log: Path
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start virtiofsd for the root, and return it with its socket; it ends with its only client.

    Args:
        directory: the caller's, empty; gets the socket and a mount point.
        extra: paths that have to be there although they may lie on other filesystems.
        log: what it says goes there.

    Raises:
        LabError: it is not installed, or this is not root.
    """
    virtiofsd = find_virtiofsd()
    path = directory / "share.sock"
    target = directory / "root"
    target.mkdir()
    root_device = Path("/").stat().st_dev
    apart = [os.fspath(each) for each in extra if each.stat().st_dev != root_device]
    with socket.socket(socket.AF_UNIX) as listener, log.open("wb") as output:
        try:
            listener.bind(os.fspath(path))
        except OSError as error:  # it may have 107 bytes
            raise LabError(f"{path}: {error.args[-1]}; set TMPDIR to a shorter path") from error
        listener.listen(1)
        words = [sys.executable, "-m", "vmlab.share", virtiofsd, str(listener.fileno())]
        process = subprocess.Popen(
            [*words, os.fspath(target), *apart],
            env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).resolve().parents[1])},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    return process, path


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _bind_read_only(libc: ctypes.CDLL, source: str, target: str) -> None:
    words = (source.encode(), target.encode(), None)
    _check(libc.mount(*words, _MS_BIND, None), f"bind {source}")
    _check(libc.mount(*words, _MS_BIND | _MS_REMOUNT | _MS_RDONLY, None), f"read-only {source}")


def main(virtiofsd: str, fd: str, target: str, *extra: str) -> None:
    """Become virtiofsd, serving a socket that was inherited; never return."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "prctl")
    _check(libc.unshare(_CLONE_NEWNS), "unshare")
    _check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "private mounts")
    _bind_read_only(libc, "/", target)
    for path in extra:
        _bind_read_only(libc, path, target + path)
    options = f"source={target},cache=always,log_level=err"
    os.execv(virtiofsd, [virtiofsd, f"--fd={fd}", "-o", options])


if __name__ == "__main__":
    main(*sys.argv[1:])
