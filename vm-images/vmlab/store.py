"""The cache of guest kernels, outside of the checkout: a directory for each, whole or not at all.

`~/.cache/nydus-erofs/kernels/NAME_VERSION_RECIPE/` has `vmlinux`, `modules/` (what goes to
`/lib/modules/RELEASE`), Debian's `config`, and `kernel.json`, which is the record of what it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vmlab.catalogue import Kernel
from vmlab.debian import KernelPackage, download, find_kernel_package, show_depends, unpack
from vmlab.processes import need, run
from vmlab.rebuild import RECIPES, rebuild
from vmlab.source import build_kernel, fragment
from vmlab.vmlinux import unpack_kernel

__all__ = ["Say", "StoredKernel", "fetch", "find", "kernels_directory", "size_bytes"]

Say = Callable[[str], None]
# To be raised when entries get another form.
_FORMAT = 1
_RECORD = "kernel.json"
_MAKING = ".making-"


class StoredKernel(NamedTuple):
    """A kernel that is ready to boot."""

    directory: Path
    release: str
    version: str

    @property
    def vmlinux(self) -> Path:
        """The kernel as an ELF file."""
        return self.directory / "vmlinux"

    @property
    def modules(self) -> Path:
        """What the guest has as `/lib/modules/RELEASE`."""
        return self.directory / "modules"


def kernels_directory() -> Path:
    """Return where all kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    top = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return top / "nydus-erofs" / "kernels"


def _recipe(kernel: Kernel) -> str:
    parts: list[object] = [_FORMAT, kernel.rebuilt, [RECIPES[name] for name in kernel.rebuilt]]
    if kernel.config:
        parts.append(fragment(kernel.config))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def _entry(kernel: Kernel, version: str) -> Path:
    safe = re.sub(r"[^A-Za-z0-9.+~-]", "-", version)
    return kernels_directory() / f"{kernel.name}_{safe}_{_recipe(kernel)}"


def _read(directory: Path) -> StoredKernel:
    record = json.loads((directory / _RECORD).read_text())
    return StoredKernel(directory, record["release"], record["version"])


def find(kernel: Kernel) -> StoredKernel | None:
    """Return the kernel that was fetched last, without asking any mirror; None: there is none."""
    entries = list(kernels_directory().glob(f"{kernel.name}_*_{_recipe(kernel)}/{_RECORD}"))
    if not entries:
        return None
    return _read(max(entries, key=lambda record: record.stat().st_mtime).parent)


@contextlib.contextmanager
def _alone(say: Say) -> Iterator[None]:
    """Keep other processes from preparing kernels at the same time."""
    directory = kernels_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that prepares kernels")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(kernel: Kernel, say: Say) -> StoredKernel:
    """Return the newest version of a kernel that Debian has, prepared unless it is cached.

    `say` is told of each step.

    Raises:
        LabError: no such package, no network, a tool is missing, or a build failed.
    """
    package = find_kernel_package(kernel.metapackages, kernel.series)
    final = _entry(kernel, package.version)
    with _alone(say):
        for left in final.parent.glob(f"{_MAKING}*"):  # by a process that was killed
            shutil.rmtree(left)
        if not (final / _RECORD).exists():
            with tempfile.TemporaryDirectory(prefix=_MAKING, dir=final.parent) as temporary:
                entry = _prepare(kernel, package, Path(temporary), say)
                entry.rename(final)
        (final / _RECORD).touch()  # `find` takes what was fetched last
    return _read(final)


def _packages(kernel: Kernel, package: KernelPackage) -> list[str]:
    if kernel.config:
        return [f"linux-source-{kernel.series}={package.version}"]
    names = [f"{package.name}={package.version}"]
    if kernel.rebuilt:
        headers = f"linux-headers-{package.release}"
        names.append(f"{headers}={package.version}")
        depends = show_depends(headers, package.version)
        names += [
            name for name in depends if re.match(r"linux-(headers-.*-common|kbuild-.*)$", name)
        ]
        names.append(f"linux-source-{kernel.series}={package.version}")
    return names


def _module_tree(root: Path, release: str) -> Path:
    """Return the modules' directory, where `depmod --basedir` looks, too."""
    tree = root / "lib/modules" / release
    if not tree.is_dir():  # from Debian 13 on
        tree.parent.mkdir(parents=True, exist_ok=True)
        (root / "usr/lib/modules" / release).rename(tree)
    return tree


def _replace_modules(tree: Path, built: dict[str, Path]) -> None:
    for name, file in built.items():
        for old in tree.rglob(f"{name}.ko*"):
            file_there = old.with_name(f"{name}.ko")
            old.unlink()
            shutil.copy(file, file_there)


def _prepare(kernel: Kernel, package: KernelPackage, directory: Path, say: Say) -> Path:
    """Make a kernel's directory below a temporary one, and return it."""
    root, entry, packages = (directory / name for name in ("root", "entry", "packages"))
    for made in (root, entry, packages):
        made.mkdir()
    release = package.release
    say(f"downloading Linux {release} from Debian")
    files = download(_packages(kernel, package), packages)
    say(f"unpacking {len(files)} packages")
    unpack(files, root)
    if kernel.config:
        release = _build(kernel, root, entry, say)
    else:
        _take(kernel, release, root, entry, say)
    record = {
        "kernel": kernel.name,
        "release": release,
        "version": package.version,
        "packages": [file.name for file in files],
    }
    (entry / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    os.sync()
    return entry


def _build(kernel: Kernel, root: Path, entry: Path, say: Say) -> str:
    """Build a kernel of its own, which has no modules; return its release."""
    say("building the kernel, which takes minutes")
    built = build_kernel(root, kernel.config)
    built.vmlinux.rename(entry / "vmlinux")
    built.config.rename(entry / "config")
    (entry / "modules").mkdir()
    for name in ("modules.dep", "modules.devname"):
        (entry / "modules" / name).touch()
    return built.release


def _take(kernel: Kernel, release: str, root: Path, entry: Path, say: Say) -> None:
    """Take Debian's kernel, with its modules and those that are built anew."""
    tree = _module_tree(root, release)
    if kernel.rebuilt:
        say(f"building {' and '.join(kernel.rebuilt)}")
        _replace_modules(tree, rebuild(root, release, kernel.rebuilt))
    say("unpacking the kernel")
    run([need("depmod", "kmod"), "--basedir", root, release])
    unpack_kernel(root / f"boot/vmlinuz-{release}", entry / "vmlinux")
    (root / f"boot/config-{release}").rename(entry / "config")
    tree.rename(entry / "modules")


def size_bytes(directory: Path) -> int:
    """Return how much a cached kernel takes."""
    return sum(file.lstat().st_size for file in directory.rglob("*") if not file.is_dir())
