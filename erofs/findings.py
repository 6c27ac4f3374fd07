"""What checks yield: findings, and the collector that turns errors into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from erofs.errors import NydusError, UnsupportedFeature

__all__ = ["ERROR", "WARNING", "Collector", "Finding"]

ERROR = "error"
WARNING = "warning"


class Finding(NamedTuple):
    """One thing that is wrong, and where: `path` in the image, `offset` in bytes of the file.

    An error makes some reader refuse or misread the image; a warning does not.
    """

    severity: str
    what: str
    path: bytes | None = None
    offset: int | None = None

    def __str__(self) -> str:
        places = []
        if self.path is not None:
            places.append(repr(self.path)[2:-1])
        if self.offset is not None:
            places.append(f"offset {self.offset:#x}")
        return ": ".join([self.severity, *([", ".join(places)] if places else []), self.what])


class Collector:
    """Gathers findings, and turns errors that were raised on the way into them."""

    def __init__(self, unsupported: str = ERROR) -> None:
        self._found: list[Finding] = []
        self._unsupported = unsupported

    def error(self, what: str, path: bytes | None = None, offset: int | None = None) -> None:
        """Note something that a reader refuses or misreads."""
        self._found.append(Finding(ERROR, what, path, offset))

    def warn(self, what: str, path: bytes | None = None, offset: int | None = None) -> None:
        """Note something odd that readers put up with."""
        self._found.append(Finding(WARNING, what, path, offset))

    @contextmanager
    def guard(self, path: bytes | None = None) -> Iterator[None]:
        """Turn a `NydusError` of the block into a finding."""
        try:
            yield
        except NydusError as error:
            self.take(error, path)

    def take(self, error: NydusError, path: bytes | None = None) -> None:
        """Turn an error into a finding; for what is done so often that a guard takes long."""
        severity = self._unsupported if isinstance(error, UnsupportedFeature) else ERROR
        offset = error.where.get("offset")
        chunk = error.where.get("chunk")
        what = error.reason if chunk is None else f"chunk {chunk}: {error.reason}"
        self._found.append(
            Finding(severity, what, path, offset if isinstance(offset, int) else None)
        )

    def drain(self) -> list[Finding]:
        """Return and forget what was found."""
        found, self._found = self._found, []
        return found
