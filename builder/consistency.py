"""What images must have in common to be parts of one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from builder.errors import BuildError
from erofs import AnyBootstrap, Bootstrap
from erofs.rafs import SuperFlags

__all__ = ["Profile", "profile_of", "require_profile"]


class Profile(NamedTuple):
    """Properties that an image has only once; `chunk_size` in bytes."""

    chunk_size: int
    explicit_owners: bool
    is_tarfs: bool = False
    version: int = 6


_NAMES = ("chunk_size", "explicit_uidgid", "tarfs mode", "RAFS version")


def profile_of(image: AnyBootstrap) -> Profile:
    """Return the properties of an image."""
    return Profile(
        image.chunk_size,
        bool(image.flags & SuperFlags.EXPLICIT_UID_GID),
        image.is_tarfs,
        image.version,
    )


def require_profile(
    expected: Profile, image: AnyBootstrap, path: Path, kind: type[BuildError] = BuildError
) -> Bootstrap:
    """Return the image, which has the properties that are expected.

    Raises:
        BuildError: it has others, or is RAFS v5; of the class `kind` for the first.
    """
    found = profile_of(image)
    # The version first: with another one nothing else can be compared.
    for number in (3, 0, 1, 2):
        if expected[number] != found[number]:
            raise kind(
                f"Inconsistent configuration of {_NAMES[number]}",
                path=path,
                expected=expected[number],
                got=found[number],
            )
    if not isinstance(image, Bootstrap):
        raise BuildError("RAFS v5 is not written: `unpack` it and `create` v6", path=path)
    return image
