"""What this kernel, privilege and file system allow, found out by trying.

Every finding is a fact with a one-line reason; what to do about it is the caller's. All
traces are in a temporary directory below the work directory and in mounts that are
attached nowhere, so they go away with the process at the latest.
Source: spec ondemand 0 and 5.14 item 2.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from erofs.errors import NydusError
from fscache import kernel
from fscache.channel import ChannelError, ReadRequest, Reply
from fscache.channel.fanotify import FanotifyChannel, open_group
from fscache.mounts.mount import create_mount
from fscache.mounts.mountinfo import mounts
from fscache.probe_image import BLOB_SIZE, FILE_NAME, build_probe_image
from fscache.store import ServeDirectory

__all__ = ["Finding", "ProbeError", "end_behind", "filesystem_type", "lazy_supported", "probe"]

logger = logging.getLogger(__name__)

_PAGE = 4096
_HOLE_OFFSET = 64 * _PAGE
_TIMEOUT_SECONDS = 10.0
_BLOB_ID = "probe"
_WORKS = {
    "erofs": "the kernel has erofs",
    "privilege": "CAP_SYS_ADMIN",
    "file-backed": "EROFS mounts from files",
    "fanotify": "fanotify pre-content marks",
}


class ProbeError(NydusError):
    """Something is missing; the text is the reason."""


class Finding(NamedTuple):
    """One capability: `detail` says what works, or what is missing."""

    name: str
    ok: bool
    detail: str


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that holds `path`."""
    target = os.fsencode(os.path.realpath(path))
    best, kind = b"", "unknown"
    for line in mounts():
        mountpoint = line.mountpoint
        inside = target == mountpoint or target.startswith(mountpoint.rstrip(b"/") + b"/")
        # `>=`: of two mounts on one place the later one is on top.
        if inside and len(mountpoint) >= len(best):
            best, kind = mountpoint, line.kind
    return "overlayfs" if kind == "overlay" else kind


@contextmanager
def _workspace(work_dir: Path) -> Iterator[Path]:
    # Loaded here: most starts know what an earlier one has found.
    import tempfile

    with tempfile.TemporaryDirectory(prefix="probe-", dir=work_dir) as name:
        directory = Path(name)
        (directory / "image").write_bytes(build_probe_image())
        with (directory / "data").open("wb") as data:
            data.truncate(BLOB_SIZE)
        yield directory


def _try_erofs(_: Path) -> str:
    try:
        os.close(kernel.fsopen("erofs"))
    except OSError as error:
        # Without privilege the kernel does not look; it may be there all the same.
        known = Path("/proc/filesystems").read_text().split()
        if error.errno != errno.EPERM or "erofs" not in known:
            raise ProbeError(f"the kernel has no erofs (CONFIG_EROFS_FS): {error}") from error
    return _WORKS["erofs"]


def _try_privilege(_: Path) -> str:
    try:
        os.close(open_group())
    except ChannelError as error:
        if error.errno == errno.EPERM:
            raise ProbeError("root (CAP_SYS_ADMIN) is needed") from error
    return _WORKS["privilege"]


def _try_file_backed(work_dir: Path) -> str:
    with _workspace(work_dir) as directory:
        os.close(create_mount(directory / "image", [directory / "data"]))
    return _WORKS["file-backed"]


def _try_mark(work_dir: Path) -> str:
    with _workspace(work_dir) as directory, ExitStack() as stack:
        group = open_group()
        stack.callback(os.close, group)
        path = directory / "data"
        try:
            kernel.fanotify_mark(group, kernel.FAN_MARK_ADD, kernel.FAN_PRE_ACCESS, path)
        except OSError as error:
            kind = filesystem_type(work_dir)
            if error.errno == errno.EOPNOTSUPP:
                raise ProbeError(
                    f"the cache directory is on {kind}, which takes no pre-content marks:"
                    " use ext4, xfs or btrfs",
                    path=work_dir,
                ) from error
            if error.errno == errno.EINVAL:
                raise ProbeError(
                    "Linux 6.14 with fanotify pre-content events (FAN_PRE_ACCESS) is needed,"
                    f" this is {os.uname().release}"
                ) from error
            raise
    return _WORKS["fanotify"]


def _content(offset: int, length: int) -> bytes:
    """Return what the self test puts at a place: the number of each page, all over it."""
    pages = range(offset // _PAGE, (offset + length) // _PAGE)
    return b"".join(number.to_bytes(8, "little") * (_PAGE // 8) for number in pages)


class _Filler:
    """Handler of the self test: fills what is asked for through the unmarked name."""

    def __init__(self, writer: int) -> None:
        self.writer = writer
        self.requests: list[ReadRequest] = []

    def __call__(self, request: ReadRequest, reply: Reply) -> None:
        status = os.fstat(self.writer)
        if (request.device, request.inode) != (status.st_dev, status.st_ino):
            raise ProbeError("event of another file")
        end = min(request.offset + request.length, BLOB_SIZE)
        os.pwrite(self.writer, _content(request.offset, end - request.offset), request.offset)
        self.requests.append(request)
        reply.allow()


def _read_hole(file: int, channel: FanotifyChannel) -> bytes:
    """Read a page with a deadline: closing the channel denies a reader that nobody answers."""
    result: list[bytes | OSError] = []

    def read() -> None:
        try:
            result.append(os.pread(file, _PAGE, _HOLE_OFFSET))
        except OSError as error:
            result.append(error)

    reader = threading.Thread(target=read, name="probe-reader", daemon=True)
    reader.start()
    reader.join(_TIMEOUT_SECONDS)
    if reader.is_alive():
        channel.close()
        reader.join(_TIMEOUT_SECONDS)
        raise ProbeError(f"the read of a hole did not end within {_TIMEOUT_SECONDS:.0f} s")
    data = result[0]
    if isinstance(data, OSError):
        raise ProbeError(f"the read of a hole failed: {data}") from data
    return data


def _self_test(work_dir: Path, end: Callable[[ExitStack], None] = ExitStack.close) -> str:
    with ExitStack() as stack:
        directory = stack.enter_context(_workspace(work_dir))
        serve = ServeDirectory.create(directory)
        stack.callback(serve.remove)
        writer = os.open(directory / "data", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, writer)
        filler = _Filler(writer)
        channel = stack.enter_context(FanotifyChannel(serve.directory, filler))
        link = serve.link(_BLOB_ID, directory / "data")
        mount = create_mount(directory / "image", [link])
        stack.callback(os.close, mount)
        file = os.open(FILE_NAME, os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
        stack.callback(os.close, file)
        data = _read_hole(file, channel)
        end(stack.pop_all())
    covering = [
        request
        for request in filler.requests
        if request.offset <= _HOLE_OFFSET
        and request.offset + request.length >= _HOLE_OFFSET + _PAGE
    ]
    if not covering:
        raise ProbeError(
            f"a read of a hole raised no event for its range ({len(filler.requests)} others):"
            " this kernel would give zeros"
        )
    if data != _content(_HOLE_OFFSET, _PAGE):
        raise ProbeError("the data read are not the data that were filled in")
    return "a hole was asked for, filled and read"


def _find(name: str, attempt: Callable[[Path], str], work_dir: Path) -> Finding:
    try:
        return Finding(name, True, attempt(work_dir))
    except (NydusError, OSError) as error:
        return Finding(name, False, str(error))


def end_behind(stack: ExitStack) -> None:
    """Let go of what the self test has made, in a thread: the kernel takes 30 ms to close a group.

    The process does not end before.
    """

    def close() -> None:
        try:
            stack.close()
        except (NydusError, OSError) as error:
            logger.warning("something of the self test stays: %s", error)

    threading.Thread(target=close, name="probe-end").start()


def probe(work_dir: Path, end: Callable[[ExitStack], None] = ExitStack.close) -> list[Finding]:
    """Try what serving from `work_dir` needs; takes some milliseconds, never hangs.

    Args:
        work_dir: a cache directory.
        end: lets go of what the self test has made, `end_behind` or at once.

    The findings are, in order: `erofs`, `privilege`, `file-backed`, `fanotify` and
    `self-test`; the last one counts when the others are there.
    """
    tested = _find("self-test", partial(_self_test, end=end), work_dir)
    if tested.ok:
        # It takes all the others: to try each of them would only cost time.
        return [*(Finding(name, True, detail) for name, detail in _WORKS.items()), tested]
    findings = [
        _find("erofs", _try_erofs, work_dir),
        _find("privilege", _try_privilege, work_dir),
        _find("file-backed", _try_file_backed, work_dir),
        _find("fanotify", _try_mark, work_dir),
    ]
    if not all(finding.ok for finding in findings):
        tested = Finding("self-test", False, "something that it takes is missing")
    return [*findings, tested]


def lazy_supported(findings: Sequence[Finding]) -> Finding:
    """Sum up: whether lazy serving works, and if not, what is missing first."""
    for finding in findings:
        if not finding.ok:
            return Finding("lazy", False, finding.detail)
    return Finding("lazy", True, "file-backed EROFS with fanotify pre-content events")
