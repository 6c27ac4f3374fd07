"""Bootstraps as files: by themselves, or inside of the blob that they are for."""

from __future__ import annotations

from pathlib import Path

from erofs import AnyBootstrap, load_tree, open_rafs
from erofs.errors import FormatError, error_context
from erofs.inlined import blob_ids, load_inlined_bootstrap

__all__ = ["blob_ids", "inlined_bootstrap", "load_tree", "open_any_bootstrap"]


def inlined_bootstrap(path: Path) -> bytes | None:
    """Return the bootstrap inside of a blob with inlined metadata, None when it has none.

    Raises:
        CodecError, IntegrityError: it is there, but broken.
        OSError: the file cannot be read.
    """
    try:
        return load_inlined_bootstrap(path)
    except FormatError:
        return None


def open_any_bootstrap(path: Path, *, inlined: bool = False) -> AnyBootstrap:
    """Open a bootstrap file of RAFS v6 or v5, or with `inlined` also a blob that carries one.

    Raises:
        FormatError: neither; the first reason is the one that is told.
        OSError: the file cannot be opened.
    """
    try:
        return open_rafs(path)
    except FormatError:
        data = inlined_bootstrap(path) if inlined else None
        if data is None:
            raise
    with error_context(path=path):
        return open_rafs(data)
