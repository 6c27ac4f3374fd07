"""Bootstraps as files that can be mounted, also those that came inside of a blob, or as RAFS v5.

An inlined or translated bootstrap is written into the cache directory as
`<its sha256>.image.boot`: beside the data, outside of the marked directory. Daemons share the
file, and it stays like the other files of the cache: who mounts it has it open, so it may be
removed at any time.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from erofs import BadMagic, FormatError, UnsupportedFeature, error_context, open_bootstrap
from erofs.inlined import load_inlined_bootstrap
from erofs.view import View
from fscache.cache.cachefile import CacheError, read_whole, replace
from fscache.cache.plan import PlanError

__all__ = ["BOOT_SUFFIX", "mountable_bootstrap", "mounted_path"]

logger = logging.getLogger(__name__)

BOOT_SUFFIX = ".image.boot"
_MAGIC_BYTES = 8


def _converted(path: Path) -> bytes | None:
    """Return a bootstrap that can be mounted, None when the file itself can be.

    Raises:
        NydusError: the file is neither a bootstrap nor a blob with one, or it is broken.
    """
    try:
        with open_bootstrap(path):
            return None
    except OSError as error:
        raise PlanError(f"bootstrap cannot be opened ({error.strerror})", path=path) from error
    except FormatError as plain:
        if isinstance(plain, BadMagic) and _is_v5(path):
            return _translated(path)
        try:
            data = load_inlined_bootstrap(path)
        except OSError as error:
            raise PlanError(f"blob cannot be read ({error.strerror})", path=path) from error
        except FormatError:
            # What is wrong with it as a bootstrap tells more.
            raise plain from None
    with open_bootstrap(data):
        return data


def _is_v5(path: Path) -> bool:
    # Loaded here, as what follows: most images are RAFS v6.
    from erofs.v5.layout import is_v5

    try:
        with path.open("rb") as file:
            return is_v5(View(file.read(_MAGIC_BYTES)))
    except OSError as error:
        raise PlanError(f"bootstrap cannot be read ({error.strerror})", path=path) from error


def _translated(path: Path) -> bytes:
    from erofs import BootstrapV5, open_rafs, translate

    with error_context(path=path), open_rafs(path) as image:
        if not isinstance(image, BootstrapV5):
            raise PlanError("bootstrap changes while it is read")
        translation = translate(image)
        for blob in translation.blobs:
            if not blob.is_stable:
                # Another image would put the same blob's chunks elsewhere in the data file.
                raise UnsupportedFeature(
                    "RAFS v5 image that does not tell the places of chunks in their blob",
                    blob=blob.entry.id,
                )
        return translation.bootstrap


def _place(data: bytes, work_dir: Path) -> Path:
    return work_dir.absolute() / f"{hashlib.sha256(data).hexdigest()}{BOOT_SUFFIX}"


def mounted_path(path: Path, work_dir: Path) -> Path:
    """Return what `mountable_bootstrap` would; nothing is written. Raises `NydusError`."""
    data = _converted(path)
    return path if data is None else _place(data, work_dir)


def mountable_bootstrap(path: Path, work_dir: Path) -> Path:
    """Return the file to mount: `path` itself, or one with what was made of it.

    Raises:
        NydusError: neither a bootstrap nor a blob with one, or it is broken.
        CacheError: the cache directory cannot hold it.
    """
    data = _converted(path)
    if data is None:
        return path
    place = _place(data, work_dir)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if _content(place, len(data)) != data:
            replace(place, data)
            logger.info("bootstrap of %s is mounted from %s", path, place)
    except OSError as error:
        raise CacheError.of("cannot keep the bootstrap of a blob", error, path=place) from error
    return place


def _content(path: Path, length: int) -> bytes | None:
    try:
        return read_whole(path, length)
    except OSError as error:
        logger.warning("%s is replaced (%s)", path, error.strerror)
        return None
