"""Where the demo's root filesystem comes from: the user, mmdebstrap, or this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.demo.hostroot import collect_host
from tests.demo.report import Printer, size_text
from tests.demo.run import DemoError, Processes, ticker

__all__ = ["Source", "get_source"]

MMDEBSTRAP_SECONDS = 900
APT_CONFIG_SECONDS = 30
_APT_KEYS = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until")
# What mmdebstrap unpacks beside the tar, or what is collected here at most, with some room.
DEFAULT_NEED_BYTES = 1_000_000_000
SPARE_BYTES = 50_000_000
# How much larger than its compressed tar a filesystem is taken to be.
COMPRESSION_GUESS = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A root filesystem: a tar or a directory, and about how many bytes are in it."""

    path: Path
    is_tar: bool
    content_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Room for blob and cache, and for a tar to be extracted and compared with."""
        return (3 if self.is_tar else 2) * self.content_bytes + SPARE_BYTES


def _require_space(directory: Path, needed: int) -> str:
    """Return how much room there is; raise `DemoError` when it is too little."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DemoError(
            f"not enough room in {directory.parent}: about {size_text(needed)} are needed,"
            f" {size_text(free)} are free (DEMO_DIR=path chooses another directory)"
        )
    return f"the demo needs about {size_text(needed)} there, {size_text(free)} are free"


def _given(path: Path) -> Source:
    if path.is_dir():
        size = 0
        for directory, _, files in os.walk(path):
            for name in files:
                with contextlib.suppress(OSError):
                    size += os.lstat(os.path.join(directory, name)).st_size
        return Source(path, False, size)
    if not path.is_file():
        raise DemoError(f"DEMO_SOURCE={path}: no such file or directory")
    with path.open("rb") as file:
        packed = file.read(262)[257:] != b"ustar"
    size = path.stat().st_size
    return Source(path, True, size * COMPRESSION_GUESS if packed else size)


def _os_release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _cache_directory() -> Path | None:
    """Return where downloads are kept, None when there is no such place."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        directory = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "nydus-erofs"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return directory if os.access(directory, os.W_OK) else None


def _apt_options(work: Path, processes: Processes) -> list[str]:
    """Take over the proxies of this machine, by a file: they may hold passwords."""
    if shutil.which("apt-config") is None:
        return []
    settings = processes.run(["apt-config", "dump"], timeout=APT_CONFIG_SECONDS).stdout
    lines = [line for line in settings.splitlines() if line.startswith(_APT_KEYS)]
    if not lines:
        return []
    file = work / "apt.conf"
    file.touch(0o600)
    file.write_text("\n".join(lines) + "\n")
    return [f"--aptopt={file}"]


def _mirrors(is_debian: bool) -> list[str]:
    """Return the file that names this machine's Debian mirrors, if it is a Debian."""
    files = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
    found = [str(path) for path in files if path.is_file() and path.stat().st_size]
    return found[:1] if is_debian else []


class _Debian:
    """Gets Debian minbase with python3 and git, once for all runs."""

    def __init__(self, work: Path, processes: Processes, out: Printer) -> None:
        self._work = work
        self._processes = processes
        self._out = out
        release = _os_release()
        self._is_debian = release.get("ID") == "debian"
        suite = release.get("VERSION_CODENAME") if self._is_debian else None
        self.suite = suite or "bookworm"
        self._name = f"debian-{self.suite}-{platform.machine()}.tar"

    def get(self) -> Source | None:
        """Return the tar, or None after saying why there is none."""
        cache = _cache_directory()
        if cache is not None and (cache / self._name).is_file():
            kept = cache / self._name
            size = kept.stat().st_size
            self._out.line(f"{kept}, {size_text(size)}, from an earlier run")
            return Source(kept, True, size)
        if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
            reason = "mmdebstrap is not installed" if os.geteuid() == 0 else "this is not root"
            self._out.line(f"no Debian is downloaded: {reason}")
            return None
        _require_space(self._work, DEFAULT_NEED_BYTES)
        with tempfile.TemporaryDirectory(prefix="part-", dir=cache or self._work) as part:
            tar = Path(part, self._name)
            if not self._download(tar):
                return None
            final = (cache or self._work) / self._name
            tar.rename(final)
        size = final.stat().st_size
        self._out.line(
            f"{size_text(size)}" + (f", kept for the next run: {final}" if cache else "")
        )
        return Source(final, True, size)

    def _download(self, tar: Path) -> bool:
        scratch = self._work / "mmdebstrap"
        scratch.mkdir()
        command = [
            "mmdebstrap", "--variant=minbase", "--include=python3,git",
            *_apt_options(self._work, self._processes),
            self.suite, str(tar), *_mirrors(self._is_debian),
        ]  # fmt: skip
        self._out.command(command)
        self._out.line("this takes a minute")
        done = self._processes.run(
            command, timeout=MMDEBSTRAP_SECONDS, env={**os.environ, "TMPDIR": str(scratch)}
        )
        if done.status == 0:
            self._out.line(f"done in {done.seconds:.0f} s")
            return True
        self._out.line(f"mmdebstrap failed with status {done.status}:")
        errors = [line for line in done.stderr.splitlines() if line.startswith("E: ")]
        for line in (errors or done.last_errors)[-3:]:
            self._out.line(f"  {line}")
        return False


def _host(work: Path, out: Printer) -> Source:
    target = work / "rootfs"
    target.mkdir(mode=0o755)
    out.line("this machine's own python3, git and their libraries are taken instead")
    with ticker() as tick:
        tick()
        collector, missing = collect_host(target)
    if len(missing) == 2:
        raise DemoError("neither python3 nor git is here, DEMO_SOURCE=path names something else")
    out.line(f"{size_text(collector.content_bytes)} collected in {target}")
    for name in missing:
        out.line(f"{name} is not installed here and left out")
    if collector.left_out:
        out.line(
            f"{len(collector.left_out)} files left out (unreadable, or 500 MB were reached),"
            f" the first is {collector.left_out[0]}"
        )
    return Source(target, False, collector.content_bytes)


def get_source(given: Path | None, work: Path, processes: Processes, out: Printer) -> Source:
    """Return the root filesystem to build, and say where it is from.

    Raises `DemoError` when there is none, or no room for the rest of the demo.
    """
    if given is None:
        out.step("Get a root filesystem: Debian with python3 and git")
        source = _Debian(work, processes, out).get()
        if source is None:
            _require_space(work, DEFAULT_NEED_BYTES)
            source = _host(work, out)
    else:
        out.step(f"Take the root filesystem of DEMO_SOURCE: {given}")
        if given.is_dir() and work.resolve().is_relative_to(given.resolve()):
            raise DemoError(f"DEMO_SOURCE={given} contains the work directory {work}")
        source = _given(given)
        out.line(f"a {'tar' if source.is_tar else 'directory'}")
    out.line(f"$W is {work}: {_require_space(work, source.needed_bytes)}")
    return source
