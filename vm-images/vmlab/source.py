"""Build a kernel of its own from Debian's source: small, with everything built in.

As VM runtimes have it: their guests' kernels find the root by their command line, without modules
and without an initramfs (spec vm-runtimes 6.2, 6.4).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from vmlab.errors import LabError
from vmlab.processes import install, need, run

__all__ = ["BuiltKernel", "build_kernel", "fragment"]

_BUILD_SECONDS = 7200
# Debian's packages by the program that shows that they are there.
_TOOLS = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc"}
# What the kernel's own tool for stack unwinding is built with.
_LIBRARIES = ("libelf-dev", "libc6-dev")


class BuiltKernel(NamedTuple):
    """What came of it: an ELF file, its configuration, and what `uname -r` says."""

    vmlinux: Path
    config: Path
    release: str


def fragment(name: str) -> str:
    """Return the options of a configuration of that name; what it does not name is off."""
    return Path(__file__).with_name(f"{name}.config").read_text()


def _require_options(config: Path, wanted: str) -> None:
    """Check that the configuration has what was asked for: kbuild drops what it does not know."""
    got = set(config.read_text().splitlines())
    missing = [
        line for line in wanted.splitlines() if line.startswith("CONFIG") and line not in got
    ]
    if missing:
        raise LabError(f"the kernel does not take {', '.join(missing)}")


def build_kernel(root: Path, name: str) -> BuiltKernel:
    """Build a kernel.

    Args:
        root: the unpacked source package; built in here.
        name: of the configuration, see `fragment`.

    Raises:
        LabError: no compiler, an option that is not there, or it failed.
    """
    install(*_TOOLS.values(), *_LIBRARIES)
    for program, package in _TOOLS.items():
        need(program, package)
    (archive,) = (root / "usr/src").glob("linux-source-*.tar.xz")
    run(["tar", "--extract", f"--file={archive}", f"--directory={root}"])
    tree = root / archive.name.removesuffix(".tar.xz")
    wanted = fragment(name)
    given = root / "given.config"
    given.write_text(wanted)
    make = ["make", f"--directory={tree}", "--silent"]
    run([*make, f"KCONFIG_ALLCONFIG={given}", "allnoconfig"])
    _require_options(tree / ".config", wanted)
    run([*make, f"--jobs={os.cpu_count() or 1}", "vmlinux"], seconds=_BUILD_SECONDS)
    release = run([*make, "kernelrelease"]).strip()
    vmlinux = root / "vmlinux"
    shutil.copy(tree / "vmlinux", vmlinux)
    run(["strip", vmlinux])
    return BuiltKernel(vmlinux, tree / ".config", release)
