"""Rebuild single filesystem modules of a Debian kernel with the on-demand options.

The options change only `fs/erofs` and `fs/cachefiles`; the rest of reading on demand is in Debian's
`netfs` (spec ondemand 7.1). Nothing is installed: the header packages are unpacked and their
absolute names replaced.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from vmlab.errors import LabError
from vmlab.processes import install, need, run

__all__ = ["RECIPES", "Recipe", "rebuild"]


class Recipe(NamedTuple):
    """How one module is built: its folder and the options that Debian's configuration lacks."""

    folder: str
    module_option: str
    options: tuple[str, ...]

    def arguments(self) -> list[str]:
        """Return what make is told; the preprocessor hears of it separately from kbuild."""
        return [
            f"{self.module_option}=m",
            *(f"{option}=y" for option in self.options),
            "KCFLAGS=" + " ".join(f"-D{option}=1" for option in self.options),
        ]


RECIPES = {
    "cachefiles": Recipe("fs/cachefiles", "CONFIG_CACHEFILES", ("CONFIG_CACHEFILES_ONDEMAND",)),
    "erofs": Recipe("fs/erofs", "CONFIG_EROFS_FS", ("CONFIG_EROFS_FS_ONDEMAND",)),
}


def _relocate_headers(root: Path, release: str) -> Path:
    """Make unpacked header packages usable where they lie; return the directory to make in."""
    headers = root / "usr/src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    text, found = re.subn(r"^include (/usr/src/)", rf"include {root}\1", makefile.read_text())
    if not found:
        raise LabError(f"{makefile}: expected `include /usr/src/…`, got {text[:100]!r}")
    makefile.write_text(text)
    # With it kbuild adds type information, for which it wants the tool pahole; nobody needs it.
    (headers / "vmlinux").unlink(missing_ok=True)
    return headers


def _tools(headers: Path) -> None:
    """See to it that the compiler is there that Debian has built the kernel with."""
    found = re.search(r"\bgcc-\d+\b", (headers / ".kernelvariables").read_text())
    compiler = found[0] if found else "gcc"
    install(compiler, "make")
    need(compiler, compiler)
    need("make", "make")


def rebuild(root: Path, release: str, modules: tuple[str, ...]) -> dict[str, Path]:
    """Build modules; return the file of each, without debugging information.

    Args:
        root: header, kbuild and source packages of the kernel, unpacked; changed here.
        release: what the kernel calls itself.
        modules: names in `RECIPES`.

    Raises:
        LabError: no compiler, or it failed.
    """
    headers = _relocate_headers(root, release)
    _tools(headers)
    (archive,) = (root / "usr/src").glob("linux-source-*.tar.xz")
    folders = [f"{archive.name.removesuffix('.tar.xz')}/{RECIPES[name].folder}" for name in modules]
    run(["tar", "--extract", f"--file={archive}", f"--directory={root}", *folders])
    built = {}
    for name, folder in zip(modules, folders, strict=True):
        jobs = f"--jobs={os.cpu_count() or 1}"
        place = f"M={root / folder}"
        run(["make", f"--directory={headers}", place, *RECIPES[name].arguments(), jobs, "modules"])
        built[name] = root / folder / f"{name}.ko"
        run(["strip", "--strip-debug", built[name]])
    return built
