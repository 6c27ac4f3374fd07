"""`nydusify check` (spec tools 15.2)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from builder.nydusify.flags import Command, Flag, Values
from builder.nydusify.mounting import Mounted, mounted_image
from builder.nydusify.places import Places
from builder.nydusify.stores import blob_reader, store_values
from builder.oci.errors import ImageError
from builder.oci.place import Source
from builder.progress import progress_during
from builder.proof.checking import (
    CheckedImage,
    check_bootstrap,
    check_configs,
    check_manifest,
    check_tree,
    load_image,
    read_mounted,
)
from builder.proof.entry import Entry
from builder.proof.target import TargetTree
from erofs.errors import NydusError

__all__ = ["COMMAND", "run"]

logger = logging.getLogger(__name__)

COMMAND = Command(
    "check",
    "Verify nydus image format and content",
    (
        Flag("source", "Source image reference"),
        Flag("target", "Target (Nydus) image reference", required=True),
        Flag("source-insecure", "Skip verifying server certs for HTTPS source registry", False),
        Flag("target-insecure", "Skip verifying server certs for HTTPS target registry", False),
        Flag("source-backend-type", "Type of storage backend"),
        Flag("source-backend-config", "Json configuration string for storage backend"),
        Flag("source-backend-config-file", "Json configuration file for storage backend"),
        Flag("target-backend-type", "Type of storage backend: oss, s3, localfs"),
        Flag("target-backend-config", "Json configuration string for storage backend"),
        Flag("target-backend-config-file", "Json configuration file for storage backend"),
        Flag("multi-platform", "Accepted: an index is looked into anyway", False),
        Flag("platform", "Which image of an index to check", env=""),
        Flag("mount", "Read the target through a mount instead of by our own reader", False),
        Flag("plain-http", "Enable plain http", False),
        Flag("work-dir", "Working directory for image check", "./output"),
        Flag("nydus-image", "Accepted and not used: the reader is built in", "nydus-image"),
        Flag("nydusd", "Path to the nydusd binary for --mount; ours if not given"),
    ),
)


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Check; return the exit status."""
    work = Path(values.text("work-dir"))
    with ExitStack() as stack:
        places = Places(environment, stack, plain_http=values.flag("plain-http"))
        platform = values.text("platform")
        target = load_image(_source(places, values, "target"), platform, nydus=True)
        source = None
        if values.text("source"):
            source = load_image(_source(places, values, "source"), platform, nydus=False)
        for image, name in ((source, "source"), (target, "target")):
            if image is not None:
                logger.info("dumping manifest image=%s type=%s", image.source.name, image.kind)
                image.dump(work / name)
        _check(values, environment, source, target, work / "target", stack)
    logger.info("verified image")
    return 0


def _source(places: Places, values: Values, name: str) -> Source:
    return places.source(values.text(name), values.flag(f"{name}-insecure"))


def _check(
    values: Values,
    environment: Mapping[str, str],
    source: CheckedImage | None,
    target: CheckedImage,
    work: Path,
    stack: ExitStack,
) -> None:
    with _rule("manifest"):
        for image in (source, target):
            if image is not None:
                logger.info("checking manifest image=%s type=%s", image.source.name, image.kind)
                check_manifest(image)
        if source is not None:
            check_configs(source, target)
    if not target.is_nydus:
        logger.warning("target is a plain OCI image: nothing but its manifest was checked")
        return
    bootstrap = work / "nydus_bootstrap" / "image" / "image.boot"
    bootstrap.parent.mkdir(parents=True, exist_ok=True)
    with _rule("bootstrap"):
        logger.info("checking bootstrap image=%s type=nydus", target.source.name)
        check_bootstrap(target, bootstrap, print)
    if source is None:
        return
    if source.is_nydus:
        raise ImageError("source is a Nydus image; its tree is not compared")
    blobs = blob_reader(values, "target-backend", stack) or target.source

    backend = store_values(values, "target-backend")

    def mounted(tree: TargetTree) -> Entry:
        image = Mounted(target.source, bootstrap, work / "mnt", backend)
        with mounted_image(image, values.text("nydusd"), environment, work / "nydusd") as top:
            return read_mounted(top, tree.chunk_bytes, tree.digester)

    with _rule("filesystem"):
        logger.info("comparing filesystem")
        check_tree(
            source, bootstrap, blobs, mounted if values.flag("mount") else None,
            progress_during(stack, "reading"),
        )  # fmt: skip


@contextmanager
def _rule(name: str) -> Iterator[None]:
    """Put the rule's name before what goes wrong in the block."""
    try:
        yield
    except NydusError as error:
        raise ImageError(f"validate {name} failed: {error}") from error
