"""Debian's packages through apt: which version there is, fetch, unpack; nothing is installed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from vmlab.errors import LabError
from vmlab.processes import need, run

__all__ = ["KernelPackage", "download", "find_kernel_package", "show_depends", "unpack"]

_IMAGE = "linux-image-"
_CONTROL_FIELD = re.compile(r"^([A-Za-z-]+): (.*)$", re.MULTILINE)


class KernelPackage(NamedTuple):
    """A package with a kernel: `release` is what `uname -r` says in it."""

    name: str
    version: str

    @property
    def release(self) -> str:
        """The kernel's own name of its version."""
        return self.name.removeprefix(_IMAGE)


def _show(package: str) -> list[dict[str, str]]:
    """Return the control fields of every version of a package that the mirrors have."""
    text = run([need("apt-cache", "apt"), "show", package])
    return [dict(_CONTROL_FIELD.findall(part)) for part in text.split("\n\n") if part.strip()]


def _resolve(metapackages: tuple[str, ...], series: str) -> KernelPackage | None:
    wanted = re.compile(rf"({_IMAGE}{re.escape(series)}\.[^ ,]+)(?: \(= ([^)]+)\))?")
    for metapackage in metapackages:
        try:
            versions = _show(metapackage)
        except LabError:  # no version of it, in this release of Debian
            continue
        for fields in versions:
            found = wanted.search(fields.get("Depends", ""))
            if found:
                return KernelPackage(found[1], found[2] or fields["Version"])
    return None


def find_kernel_package(metapackages: tuple[str, ...], series: str) -> KernelPackage:
    """Return the package that the first fitting metapackage leads to, the newest one first.

    Raises:
        LabError: apt knows none, also after `apt-get update` where this is root.
    """
    found = _resolve(metapackages, series)
    if found is None and os.geteuid() == 0:
        run([need("apt-get", "apt"), "update"])
        found = _resolve(metapackages, series)
    if found is None:
        raise LabError(
            f"apt knows no Linux {series} as {' or '.join(metapackages)};"
            " run apt-get update, or add bookworm-backports to its sources"
        )
    return found


def show_depends(package: str, version: str) -> list[str]:
    """Return the names that a version of a package depends on."""
    for fields in _show(package):
        if fields["Version"] == version:
            return [word.split()[0] for word in fields.get("Depends", "").split(",") if word]
    raise LabError(f"apt does not know {package} {version}")


def download(packages: list[str], directory: Path) -> list[Path]:
    """Fetch packages, each `name` or `name=version`, into a directory; return the files."""
    words = [need("apt-get", "apt"), "download", "--quiet", *packages]
    try:
        run(words, cwd=directory)
    except LabError:
        # The mirrors have dropped a version that the lists still have.
        if os.geteuid() != 0:
            raise
        run([words[0], "update"])
        run(words, cwd=directory)
    return sorted(directory.glob("*.deb"))


def unpack(packages: list[Path], directory: Path) -> None:
    """Put the files of packages into a directory, as if it were the root."""
    for package in packages:
        run([need("dpkg-deb", "dpkg"), "--extract", package, directory])
