"""The kernel's cache as a process serves it: names, the channel, and the removal of idle files."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fscache.cachefiles import culler
from fscache.cachefiles.channel import Begin, Channel
from fscache.cachefiles.device import Device
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.machine import KernelObject
from fscache.cachefiles.names import VOLUME_PREFIX, cached_file, check_name, scope_of
from fscache.cachefiles.slots import Filling, Slot
from fscache.cachefiles.sources import Source

__all__ = ["KernelCache"]

logger = logging.getLogger(__name__)

_CULLER = Path(culler.__file__)
_CULL_SECONDS = 30.0


class KernelCache:
    """Names that the kernel may ask for, and the channel by which it does.

    Args:
        device: bound in on-demand mode to `directory`; owned.
        directory: of the cache.
        threads: how many fill files at once.
    """

    def __init__(self, device: Device, directory: Path, threads: int) -> None:
        self.directory = directory
        self._slots: dict[tuple[str, str], Slot] = {}
        self._lock = threading.Lock()
        self._channel = Channel(device, self._opened, threads)
        self._device = device

    def start(self) -> None:
        """Begin to answer the kernel."""
        self._channel.start()

    # Names

    def add(self, scope: str, name: str, source: Source, digest: bytes = b"") -> None:
        """Serve a name, or give a further source for one that is served.

        Args:
            scope: the domain, or the fsid of a mount without one.
            name: fsid or blob id.
            source: gives the bytes until `remove`.
            digest: of a bootstrap.

        Raises:
            CachefilesError: the name is served with other bytes, perhaps for a mount that still
                has users.
        """
        with self._lock:
            slot = self._slots.get((scope, name))
            if slot is None:
                slot = Slot(scope, name, source.size, digest)
            elif (slot.size, slot.digest) != (source.size, digest):
                raise CachefilesError(
                    "name is in use for another content: unmount what has it, or take another one",
                    errno.EEXIST, blob=f"{scope}/{name}",
                )  # fmt: skip
            slot.add(source)
            self._slots[scope, name] = slot

    def put_last(self, scope: str, name: str, source: Source) -> None:
        """Prefer other sources of a name, if there are any."""
        self._slots[scope, name].put_last(source)

    def is_alone(self, scope: str, name: str) -> bool:
        """Whether a name has one source only."""
        return self._slots[scope, name].count == 1

    def is_open(self, scope: str, name: str) -> bool:
        """Whether the kernel has a file of that name open."""
        return self._slots[scope, name].is_open

    def remove(self, scope: str, name: str, source: Source) -> None:
        """Take a source away, which has not to be the only one of an open file."""
        with self._lock:
            slot = self._slots[scope, name]
            slot.remove(source)
            if not slot.count:
                del self._slots[scope, name]

    def _opened(self, target: KernelObject, begin: Begin) -> Filling:
        scope = scope_of(target.volume)
        name = target.cookie.decode("ascii", "backslashreplace")
        with self._lock:
            slot = self._slots.get((scope, name)) if scope is not None else None
            if slot is None:
                raise CachefilesError(
                    "not registered", errno.ENOENT, blob=f"{scope or target.volume!r}/{name}"
                )
            return slot.open(target, begin)

    # Idle files

    def cull(self, scope: str, name: str) -> bool:
        """Remove an idle file from the kernel's cache; return whether there is none any more.

        False for one that is in use. Raises `CachefilesError` for anything else.
        """
        (code,) = self._cull([cached_file(self.directory, scope, name)])
        if code not in (0, errno.EBUSY):
            raise CachefilesError("cannot be removed from the kernel's cache", code, blob=name)
        return not code

    def cull_everywhere(self, name: str) -> None:
        """Remove an idle file from every volume.

        Raises:
            CachefilesError: no name of a file; or it is in use somewhere, or cannot be removed:
                idle ones are gone.
        """
        check_name("blob_id", name)
        prefix = "I" + VOLUME_PREFIX.decode()
        scopes = [
            path.name.removeprefix(prefix) for path in (self.directory / "cache").glob(f"{prefix}*")
        ]
        files = [cached_file(self.directory, scope, name) for scope in sorted(scopes)]
        found = [path for path in files if path.exists()]
        failed = {path: code for path, code in zip(found, self._cull(found), strict=True) if code}
        for path, code in failed.items():
            what = "is in use" if code == errno.EBUSY else "cannot be removed"
            raise CachefilesError(f"{what}: {len(failed)} of {len(found)} stay", code, path=path)

    def _cull(self, files: Sequence[Path]) -> list[int]:
        """Return for each file 0 once it is gone, or the reason why it is not."""
        pairs = [(str(path.parent), path.name) for path in files if path.exists()]
        answers: list[int] = []
        if pairs:
            fd = self._device.fileno()
            words = [sys.executable, "-I", "-S", str(_CULLER), str(fd), json.dumps(pairs)]
            try:
                done = subprocess.run(
                    words, pass_fds=[fd], stdin=subprocess.DEVNULL, capture_output=True,
                    timeout=_CULL_SECONDS, check=True,
                )  # fmt: skip
                answers = json.loads(done.stdout)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                raise CachefilesError(f"no helper process to remove files ({error})") from error
        codes = dict(zip(pairs, answers, strict=True))
        found = [codes.get((str(path.parent), path.name), 0) for path in files]
        # Gone meanwhile is as good.
        return [0 if code == errno.ENOENT else code for code in found]

    # Life

    @property
    def device(self) -> Device:
        """The device, for a holder to copy."""
        return self._device

    @property
    def trouble(self) -> str:
        """What is wrong with the channel, empty when nothing is."""
        return self._channel.trouble

    @property
    def waiting(self) -> int:
        """How many reads of the kernel wait for their answers."""
        return self._channel.waiting

    @property
    def open_files(self) -> int:
        """How many files the kernel has open."""
        return self._channel.open_files

    def close(self, seconds: float, *, leave: bool = False) -> None:
        """Stop to answer, as `Channel.close`."""
        self._channel.close(seconds, leave=leave)
