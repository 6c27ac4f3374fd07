"""`nydusify commit` (spec tools 15.7): what a container has changed becomes an image."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.convert.commit import (
    UPPER,
    CommitBase,
    PackedLayer,
    pack_layer,
    publish_commit,
)
from builder.convert.upperdir import mounted_layer, upper_layer
from builder.nydusify.containerd import Container, Containerd
from builder.nydusify.convert import work_directory
from builder.nydusify.flags import Command, Flag, UsageError, Values, missing_flags
from builder.nydusify.places import FILE, LAYOUT, Places
from builder.oci.config import ImageConfig
from builder.oci.errors import ImageError
from builder.proof.checking import load_image
from erofs.errors import NydusError

__all__ = ["COMMAND", "run"]

logger = logging.getLogger(__name__)

COMMAND = Command(
    "commit",
    "Create and push a new nydus image from a container's changes that use a nydus image",
    (
        Flag("work-dir", "Working directory for commit workflow", "./tmp"),
        Flag("nydus-image", "Accepted and not used: the builder is built in", "nydus-image"),
        Flag("containerd-address", 'Containerd address, optionally with "unix://" prefix',
             "/run/containerd/containerd.sock", env="CONTAINERD_ADDR"),
        Flag("namespace", 'Container namespace, default with "default" namespace', "default",
             ("n",)),
        Flag("container", "Target container ID (supports short ID, full ID)"),
        Flag("upper", "Commit this upper directory of an overlay, without containerd", env=""),
        Flag("source", "Nydus image reference below --upper", env=""),
        Flag("target", "Target nydus image reference"),
        Flag("source-insecure", "Skip verifying server certs for HTTPS source registry", False),
        Flag("target-insecure", "Skip verifying server certs for HTTPS target registry", False),
        Flag("plain-http", "Enable plain http", False),
        Flag("maximum-times", "The maximum times allowed to be committed", 400),
        Flag("with-path", "The external directory (for example mountpoint) in container that need"
             " to be committed, or with ! in front one that is not", (), ("with-mount-path",)),
    ),
)  # fmt: skip
_PROCESSES = Path("/proc")


@dataclass(frozen=True, slots=True)
class _Paths:
    """In-image paths: mounts that are committed, too, and what is left out."""

    mounts: tuple[str, ...]
    excluded: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> _Paths:
        """Read the words of `--with-path`; raise `UsageError`."""
        mounts: list[str] = []
        excluded: list[str] = []
        for word in (one.strip() for words_ in words for one in words_.split(",")):
            path = word.lstrip("!").rstrip("/")
            if not path.startswith("/") or ".." in path.split("/"):
                raise UsageError(f"--with-path should be an absolute path: {word!r}")
            (excluded if word.startswith("!") else mounts).append(path)
        return cls(tuple(mounts), tuple(excluded))

    @property
    def excluded_bytes(self) -> frozenset[bytes]:
        """What is left out, as images have it."""
        return frozenset(map(os.fsencode, self.excluded))


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Commit; return the exit status."""
    _check_words(values)
    paths = _Paths.parse(values.texts("with-path"))
    if paths.mounts and values.text("upper"):
        raise UsageError("--with-path needs a container, whose mounts it means")
    with ExitStack() as stack:
        work = stack.enter_context(work_directory(values, "nydusify-commiter-"))
        if values.text("upper"):
            _Commit(values, environment, work, paths).run_directory(Path(values.text("upper")))
            return 0
        with _explained("failed to resolve container ID: failed to walk containers"):
            containerd = Containerd(values.text("containerd-address"), values.text("namespace"))
        stack.callback(containerd.close)
        with _explained("failed to resolve container ID"):
            name = containerd.resolve(values.text("container"))
        with _explained("inspect container"):
            container = containerd.inspect(name)
        _Commit(values, environment, work, paths).run_container(containerd, container)
    return 0


def _check_words(values: Values) -> None:
    """Refuse words that are missing or exclude each other; raise `UsageError`."""
    upper, source = values.text("upper"), values.text("source")
    if upper and values.text("container"):
        raise UsageError("--upper conflicts with --container")
    if source and not upper:
        raise UsageError("--source goes with --upper: a container knows its image")
    needed = ("upper", "source", "target") if upper else ("container", "target")
    missing_flags([name for name in needed if not values.text(name)])
    target = values.text("target")
    if "@" in target and not target.startswith((FILE, LAYOUT)):
        raise UsageError(f"parse target image name: unsupported digested image reference: {target}")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Put in front of an error what was tried."""
    try:
        yield
    except NydusError as error:
        raise ImageError(f"{what}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Commit:
    values: Values
    environment: Mapping[str, str]
    work: Path
    paths: _Paths

    def run_directory(self, upper: Path) -> None:
        """Commit an upper directory that nobody is expected to write to; raise `NydusError`."""

        def pack(base: CommitBase) -> tuple[PackedLayer, list[PackedLayer]]:
            return self._pack_upper(base, upper, None), []

        self._run(self.values.text("source"), lambda config: None, pack)

    def run_container(self, containerd: Containerd, container: Container) -> None:
        """Commit a container, which is paused meanwhile; raise `NydusError`."""
        if self.paths.mounts and not container.pid:
            raise ImageError(f"container {container.name} is not running: it has no mounts")

        def pack(base: CommitBase) -> tuple[PackedLayer, list[PackedLayer]]:
            with containerd.paused(container), ExitStack() as stack:
                view = None
                if container.pid:
                    view = _open_directory(_PROCESSES / str(container.pid) / "root", stack)
                upper = self._pack_upper(base, container.upper, view)
                if view is None:
                    return upper, []
                numbered = enumerate(self.paths.mounts)
                return upper, [self._pack_mount(base, view, *one) for one in numbered]

        name = container.image
        if container.digest and "@" not in name:
            name = f"{name}@{container.digest}"
        self._run(name, lambda config: _check_base(container, config), pack)

    def _run(
        self,
        source_name: str,
        check: Callable[[ImageConfig], None],
        pack: Callable[[CommitBase], tuple[PackedLayer, list[PackedLayer]]],
    ) -> None:
        values = self.values
        with ExitStack() as stack:
            places = Places(self.environment, stack, plain_http=values.flag("plain-http"))
            source = places.source(source_name, values.flag("source-insecure"))
            target = places.target(
                values.text("target"), values.flag("target-insecure"), source=source
            )
            logger.info("pulling base bootstrap")
            start = time.monotonic()
            with _explained("pull base bootstrap"):
                image = load_image(source, nydus=True)
                base = CommitBase.load(source, image.manifest, image.config, self.work)
            logger.info("pulled base bootstrap, elapsed: %.6fs", time.monotonic() - start)
            maximum = values.number("maximum-times")
            if base.times >= maximum:
                raise ImageError(f"reached maximum committed times {maximum}")
            check(image.config)
            base.copy_blobs(target)
            upper, mounts = pack(base)
            descriptor = publish_commit(base, target, upper, mounts, self.work)
            logger.info("pushed committed image %s", descriptor.digest)

    def _pack_upper(self, base: CommitBase, upper: Path, view: int | None) -> PackedLayer:
        with ExitStack() as stack:
            descriptor = _open_directory(upper, stack)
            logger.info("committing upper")
            pieces = upper_layer(descriptor, self.paths.excluded_bytes, view)
            start = time.monotonic()
            layer = pack_layer(base, UPPER, pieces, self.work / "blob-upper")
        size, seconds = layer.path.stat().st_size, time.monotonic() - start
        logger.info("committed upper, size: %d B, elapsed: %.6fs", size, seconds)
        return layer

    def _pack_mount(self, base: CommitBase, view: int, number: int, path: str) -> PackedLayer:
        logger.info("committing mount: %s", path)
        start = time.monotonic()
        pieces = mounted_layer(view, os.fsencode(path), self.paths.excluded_bytes)
        layer = pack_layer(base, f"mount {path}", pieces, self.work / f"blob-mount-{number}")
        size, seconds = layer.path.stat().st_size, time.monotonic() - start
        logger.info("committed mount: %s, size: %d B, elapsed %.6fs", path, size, seconds)
        return layer


def _open_directory(path: Path, stack: ExitStack) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _check_base(container: Container, config: ImageConfig) -> None:
    """Raise `ImageError` unless the container runs from this image, and not from an older one.

    Snapshots are called by the chain of the uncompressed layers (OCI image specification, ChainID).
    """
    if not container.parent.startswith("sha256:"):
        return
    chain = ""
    for digest in config.diff_ids:
        text = f"{chain} {digest}".encode()
        chain = f"sha256:{hashlib.sha256(text).hexdigest()}" if chain else digest
    if chain != container.parent:
        raise ImageError(
            f"container {container.name} does not run from {container.image} as it is now",
            expected=container.parent, got=chain,
        )  # fmt: skip
