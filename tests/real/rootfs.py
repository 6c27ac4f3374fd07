"""Layers of a small image whose content is known: this machine's shell, and files to read."""

from __future__ import annotations

import hashlib
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.demo.hostroot import Collector

__all__ = ["BIG", "PIECE", "Layers", "make_layers"]

BIG = "/data/big"
BIG_SIZE = 128 << 20
PIECE = 512 << 10
_PROGRAMS = ("sh", "cat", "dd", "ls", "sha256sum", "sleep", "touch", "true")


@dataclass
class Layers:
    """Tars, lowest first; `sums` are the SHA-256 of what is in the files of the image."""

    tars: list[Path] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    big: bytes = b""

    def pieces(self) -> list[str]:
        """Return the sums of the big file's pieces."""
        starts = range(0, len(self.big), PIECE)
        return [hashlib.sha256(self.big[start : start + PIECE]).hexdigest() for start in starts]


def _programs(top: Path) -> None:
    collector = Collector(top)
    found = [Path(path) for name in _PROGRAMS if (path := shutil.which(name, path="/bin:/usr/bin"))]
    collector.add_programs(found)
    for directory in ("proc", "sys", "run", "data"):
        (top / directory).mkdir()


def make_layers(work: Path) -> Layers:
    """Write three layers: programs and data; a changed and a new file; only a deletion."""
    layers = Layers()
    numbers = random.Random(6)
    layers.big = numbers.randbytes(BIG_SIZE)

    def base(top: Path) -> None:
        _programs(top)
        (top / "data/big").write_bytes(layers.big)
        (top / "data/gone").write_text("not to be seen")
        (top / "etc/hostname").write_text("before\n")
        for number in range(40):
            (top / f"data/small{number}").write_bytes(numbers.randbytes(number * 700))

    def upper(top: Path) -> None:
        (top / "etc").mkdir()
        (top / "data").mkdir()
        (top / "etc/hostname").write_text("replaced\n")
        (top / "data/added").write_bytes(numbers.randbytes(3 << 20))

    def deletion(top: Path) -> None:
        (top / "data").mkdir()
        (top / "data/.wh.gone").touch()

    for name, fill in {"base": base, "upper": upper, "deletion": deletion}.items():
        _add_layer(layers, work, name, fill)
    del layers.sums["/data/gone"], layers.sums["/data/.wh.gone"]
    return layers


def _add_layer(layers: Layers, work: Path, name: str, fill: Callable[[Path], None]) -> None:
    top = work / name
    top.mkdir()
    fill(top)
    for path in sorted(top.rglob("*")):
        if path.is_file() and not path.is_symlink():
            inside = f"/{path.relative_to(top)}"
            layers.sums[inside] = hashlib.sha256(path.read_bytes()).hexdigest()
    tar = work / f"{name}.tar"
    with tarfile.open(tar, "w") as file:
        for path in sorted(top.iterdir()):
            file.add(path, path.name)
    shutil.rmtree(top)
    layers.tars.append(tar)
