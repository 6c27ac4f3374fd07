"""Make a root filesystem out of programs of this machine: they, their libraries, and python3, git.

Every file gets the place that it has here, so that the programs run after a chroot.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["LIMIT_BYTES", "Collector", "collect_host"]

LIMIT_BYTES = 500_000_000
TIMEOUT_SECONDS = 60
_LINKS = 40
_SETTINGS = ("passwd", "group", "nsswitch.conf", "os-release", "debian_version", "ld.so.cache")
# Packages of the user, tests, and what only a build needs.
_LEFT_OUT = re.compile(
    r"site-packages|dist-packages|tests?|idlelib|ensurepip|turtledemo|config-.*|.*\.a"
)
_STDLIB = "import json, sysconfig as s; print(json.dumps([s.get_path(k) for k in %r]))"


def _output(command: Sequence[str]) -> str:
    """Return what a command prints, nothing when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _libraries(files: Sequence[Path]) -> set[Path]:
    """Return the libraries and the loader that the files need."""
    found: set[Path] = set()
    for start in range(0, len(files), 100):
        text = _output(["ldd", *map(str, files[start : start + 100])])
        found.update(Path(name) for name in re.findall(r"(/\S+) \(0x[0-9a-f]+\)", text))
    return found


def _is_elf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


class Collector:
    """Copies files below `target`, links on the way as links, until `limit` bytes are there.

    Attributes:
        content_bytes: what was copied.
        left_out: paths that were not, because of the limit or of permissions.
    """

    def __init__(self, target: Path, limit: int = LIMIT_BYTES) -> None:
        self._target = target
        self._limit = limit
        self._inodes: dict[tuple[int, int], Path] = {}
        self.content_bytes = 0
        self.left_out: list[Path] = []
        for name, mode in (("etc", 0o755), ("dev", 0o755), ("tmp", 0o1777)):
            (target / name).mkdir()
            (target / name).chmod(mode)
        # Where this is not permitted, `tests.demo.inside` puts this machine's own /dev there.
        with contextlib.suppress(PermissionError):
            os.mknod(target / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            (target / "dev/null").chmod(0o666)

    def add(self, path: Path) -> Path | None:
        """Copy a file or make a directory at the same place; return its place without links."""
        here, rest, links = Path("/"), list(path.parts[1:]), 0
        while rest:
            name = rest.pop(0)
            if name == "..":
                here = here.parent
                continue
            here /= name
            status = here.lstat()
            inside = self._inside(here)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _LINKS:
                    return None
                text = here.readlink()
                if not inside.is_symlink():
                    inside.symlink_to(text)
                rest[:0] = [part for part in text.parts if part != "/"]
                here = Path("/") if text.is_absolute() else here.parent
            elif stat.S_ISDIR(status.st_mode):
                inside.mkdir(exist_ok=True)
                # Writable for its owner, so that it can be removed again.
                inside.chmod(stat.S_IMODE(status.st_mode) | stat.S_IRWXU)
            elif stat.S_ISREG(status.st_mode):
                self._copy(here, status)
        return here

    def _inside(self, path: Path) -> Path:
        return self._target / path.relative_to("/")

    def _copy(self, path: Path, status: os.stat_result) -> None:
        inside = self._inside(path)
        if inside.exists():
            return
        first = self._inodes.get((status.st_dev, status.st_ino))
        if first is not None:
            inside.hardlink_to(first)
            return
        if self.content_bytes + status.st_size > self._limit or not os.access(path, os.R_OK):
            self.left_out.append(path)
            return
        shutil.copy2(path, inside)
        self._inodes[status.st_dev, status.st_ino] = inside
        self.content_bytes += status.st_size

    def add_programs(self, programs: Iterable[Path]) -> None:
        """Copy programs and shared objects with all libraries that they need."""
        files = list(programs)
        for path in (*files, *sorted(_libraries(files))):
            self.add(path)

    def add_directory(self, top: Path) -> list[Path]:
        """Copy a directory without what nobody runs; return the ELF files in it."""
        binaries = []
        for directory, folders, files in os.walk(top):
            folders[:] = sorted(name for name in folders if not _LEFT_OUT.fullmatch(name))
            self.add(Path(directory))
            for name in sorted(files):
                path = Path(directory, name)
                if not path.exists() or _LEFT_OUT.fullmatch(name):
                    continue
                self.add(path)
                if _is_elf(path):
                    binaries.append(path)
        return binaries


def _add_python(collector: Collector, target: Path) -> bool:
    candidates = [Path("/usr/bin/python3"), Path("/usr/local/bin/python3"), Path(sys.executable)]
    program = next((path for path in candidates if _is_elf(path)), None)
    if program is None:
        return False
    text = _output([str(program), "-I", "-S", "-c", _STDLIB % (("stdlib", "platstdlib"),)])
    binaries = [program]
    for place in sorted(set(json.loads(text or "[]"))):
        binaries += collector.add_directory(Path(place))
    collector.add_programs(binaries)
    usual = target / "usr/bin/python3"
    if not usual.is_symlink() and not usual.exists():
        usual.parent.mkdir(parents=True, exist_ok=True)
        usual.symlink_to(program.resolve())
    return True


def _add_git(collector: Collector) -> bool:
    name = shutil.which("git")
    if name is None:
        return False
    binaries = [Path(name)]
    helpers = _output([name, "--exec-path"]).strip()
    if helpers:
        binaries += collector.add_directory(Path(helpers))
    collector.add_programs(binaries)
    return True


def collect_host(target: Path) -> tuple[Collector, list[str]]:
    """Collect this machine's python3, git and sh below an empty directory.

    Returns the collector and the names of the programs that this machine lacks.
    """
    collector = Collector(target)
    missing = [] if _add_python(collector, target) else ["python3"]
    if not _add_git(collector):
        missing.append("git")
    collector.add_programs([Path("/bin/sh")])
    for name in _SETTINGS:
        path = Path("/etc", name)
        if path.exists() and os.access(path, os.R_OK):
            collector.add(path)
    return collector, missing
