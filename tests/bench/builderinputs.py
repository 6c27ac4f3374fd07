"""What the builder is measured with: tars and images, made when they are asked for."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from functools import cache
from pathlib import Path

from tests.bench.measure import module, run
from tests.bench.source import Settings, pack_files, write_plan

__all__ = ["Inputs", "image_command"]

_FILE_BYTES = 1024
# Of the files in layers: enough for a chunk each.
_LAYER_FILE_BYTES = 16


def image_command(peer: Path | None = None) -> list[str]:
    """Return how to call `nydus-image`: ours as it is installed, or the peer."""
    if peer is not None:
        return [str(peer)]
    script = Path(sys.executable).with_name("nydus-image")
    return [str(script)] if script.exists() else module("builder.cli")


class Inputs:
    """Makes each input once, in one directory.

    Args:
        tree: the tar of a real tree.
    """

    def __init__(self, settings: Settings, tree: Path, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._log = directory / "inputs.log"
        self.tree = tree
        self.plan = cache(self._plan)
        self.extracted = cache(self._extracted)
        self.gzipped = cache(self._gzipped)
        self.small_files = cache(self._small_files)
        self.layers = cache(self._layers)
        self.merged = cache(self._merged)

    def _plan(self) -> tuple[Path, int, int]:
        """Return what the floor has to do, and the number of files and of bytes."""
        path = self._directory / "plan"
        return path, *write_plan(self.tree, path)

    def _extracted(self) -> tuple[Path | None, str]:
        """Unpack the tree for mkfs.erofs; return the reason when there is nothing to compare."""
        if shutil.which("mkfs.erofs") is None:
            return None, "mkfs.erofs is not installed"
        target = self._directory / "tree"
        try:
            with tarfile.open(self.tree) as tar:
                tar.extractall(target, filter="tar")
        except (OSError, tarfile.TarError) as error:
            return None, f"the tar cannot be unpacked for mkfs.erofs ({error})"
        return target, ""

    def _gzipped(self) -> Path:
        """Compress the tree."""
        target = self._directory / "tree.tar.gz"
        with target.open("wb") as out:
            out.write(run(["gzip", "-6", "-n", "-c", str(self.tree)], self._log).output)
        return target

    def _small_files(self) -> Path:
        target = self._directory / "small.tar"
        pack_files(target, self._settings.files, _FILE_BYTES)
        return target

    def empty_files(self) -> Path:
        """Pack as many files as all layers have, without content."""
        target = self._directory / "empty.tar"
        pack_files(target, self._settings.files * self._settings.layers, 0)
        return target

    def _image(self, tar: Path, name: str) -> tuple[Path, Path]:
        """Build an image; return its bootstrap, and the directory with its blob."""
        directory = self._directory / name
        directory.mkdir()
        bootstrap = directory / "boot"
        run(
            [*image_command(), "create", "--log-level", "warn", "-t", "tar-rafs",
             "-B", str(bootstrap), "-D", str(directory), "-J", str(directory / "report"),
             str(tar)],
            self._log,
        )  # fmt: skip
        return bootstrap, directory

    def tree_image(self) -> tuple[Path, Path]:
        """Build the tree without devices and FIFOs; return bootstrap and directory of the blob.

        The real tool's `unpack` aborts on those.
        """
        target = self._directory / "plain.tar"
        with tarfile.open(self.tree) as tar, tarfile.open(target, "w") as plain:
            for member in tar:
                if member.isreg():
                    plain.addfile(member, tar.extractfile(member))
                elif not member.isdev():
                    plain.addfile(member)
        image = self._image(target, "treeimage")
        target.unlink()
        return image

    def _layers(self) -> list[Path]:
        """Build bootstraps whose files share no name, each called as its blob is."""
        made = []
        target = self._directory / "layers"
        target.mkdir()
        for number in range(self._settings.layers):
            tar = self._directory / "layer.tar"
            pack_files(tar, self._settings.files, _LAYER_FILE_BYTES, f"layer{number}")
            bootstrap, directory = self._image(tar, "layer")
            (blob_id,) = json.loads((directory / "report").read_text())["blobs"]
            made.append(bootstrap.rename(target / blob_id))
            shutil.rmtree(directory)
            tar.unlink()
        return made

    def path_in_layer(self) -> str:
        """Return the path of a file in the middle of the first layer."""
        directory, place = divmod(self._settings.files // 2, 1000)
        return f"/layer0/d{directory:04d}/file-{place:03d}.txt"

    def _merged(self) -> Path:
        """Merge the layers."""
        target = self._directory / "merged"
        words = ["merge", "--log-level", "warn", "--bootstrap", str(target)]
        run([*image_command(), *words, *map(str, self.layers())], self._log)
        return target
