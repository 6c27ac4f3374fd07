"""Bootstraps as files: by themselves, or inside of the blob that they are for."""

from __future__ import annotations

from pathlib import Path

from builder.errors import BuildError
from erofs import AnyBootstrap, load_tree, open_rafs
from erofs.errors import FormatError, error_context
from erofs.inlined import blob_ids, load_inlined_bootstrap

__all__ = ["blob_ids", "inlined_bootstrap", "load_tree", "open_any_bootstrap", "open_source_image"]


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


def open_source_image(
    path: Path, refusal: str = "cannot be opened", *, inlined: bool = True
) -> AnyBootstrap:
    """Open a bootstrap that others are made from, as `open_any_bootstrap` does.

    Raises:
        BuildError: the file cannot be opened; begins with `refusal`.
        FormatError: it is no bootstrap.
    """
    try:
        return open_any_bootstrap(path, inlined=inlined)
    except OSError as error:
        raise BuildError(f"{refusal} ({error.strerror})", path=path) from error
