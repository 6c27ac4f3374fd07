"""The initramfs of a guest, made for each boot: busybox, the modules that lead to the root, `init`.

The archive is a cpio of the kind "newc" (Linux Documentation/driver-api/early-userspace/
buffer-format.rst), uncompressed.
"""

from __future__ import annotations

import lzma
import shlex
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vmlab.errors import LabError
from vmlab.processes import need

__all__ = ["Entry", "build_initramfs", "busybox", "load_order", "pack"]

_DIRECTORIES = ("bin", "dev", "host", "memory", "modules", "proc", "root", "sys")
_TRAILER = "TRAILER!!!"
_ELF_INTERPRETER = b"ld-linux"


class Entry(NamedTuple):
    """A file, directory (no data) or device of the archive."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def pack(entries: Iterable[Entry]) -> bytes:
    """Return the archive of some entries, with its trailer."""
    archive = bytearray()
    for number, entry in enumerate((*entries, Entry(_TRAILER, 0)), start=1):
        name = entry.name.encode() + b"\0"
        fields = (
            number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0,
        )  # fmt: skip
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _module_name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def load_order(modules_dep: str, wanted: Sequence[str]) -> list[str]:
    """Return files of `modules.dep`, those that others need first; built-in ones have none."""
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in modules_dep.splitlines():
        file, _, rest = line.partition(":")
        needs[_module_name(file)] = (file, rest.split())
    order: dict[str, None] = {}
    for name in wanted:
        file, depends = needs.get(name.replace("-", "_"), ("", []))
        # depmod lists what is needed last first.
        order.update(dict.fromkeys((*reversed(depends), file)))
    order.pop("", None)
    return list(order)


def _module(tree: Path, file: str) -> bytes:
    data = (tree / file).read_bytes()
    return lzma.decompress(data) if file.endswith(".xz") else data


def busybox() -> bytes:
    """Return a busybox that needs no libraries; `LabError`: there is none."""
    path = need("busybox", "busybox-static")
    data = Path(path).read_bytes()
    if _ELF_INTERPRETER in data[:4096]:
        raise LabError(f"{path} needs libraries (Debian: apt-get install busybox-static)")
    return data


def build_initramfs(tree: Path, modules: Sequence[str], settings: Mapping[str, str]) -> bytes:
    """Return the initramfs for a kernel.

    Args:
        tree: directory of the kernel's modules, with `modules.dep`.
        modules: what to load first, in this order, with all they depend on.
        settings: variables of the script `init`.
    """
    files = load_order((tree / "modules.dep").read_text(), modules)
    names = [_module_name(file) for file in files]
    script = {"modules": " ".join(names), **settings}
    lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in script.items())
    program = stat.S_IFREG | 0o755
    return pack(
        (
            *(Entry(name, stat.S_IFDIR | 0o755) for name in _DIRECTORIES),
            Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            Entry("bin/busybox", program, busybox()),
            Entry("init", program, Path(__file__).with_name("init").read_bytes()),
            Entry("settings", stat.S_IFREG | 0o644, lines.encode()),
            *(
                Entry(f"modules/{name}", stat.S_IFREG | 0o644, _module(tree, file))
                for name, file in zip(names, files, strict=True)
            ),
        )
    )
