"""A recorded access pattern as a list of files to prefetch, one path a line (tools 2.2, 3.2)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fscache.ctl.client import CtlError
from fscache.ctl.text import AnswerError, text

__all__ = ["prefetch_list", "write_list"]


def _cannot_be_listed(path: bytes) -> bool:
    """Tell whether readers of lists would take the path for another: they strip blanks."""
    # What Unicode calls blank, too: some readers work on text.
    shown = path.decode("utf-8", "surrogateescape")
    return "\n" in shown or shown != shown.strip()


def prefetch_list(answer: object) -> tuple[list[bytes], list[bytes]]:
    """Return the paths by first access, and those that a list of lines cannot hold.

    Args:
        answer: of `GET /api/v1/metrics/pattern?paths=true`.

    Raises:
        AnswerError: something else, or without paths.
    """
    if not isinstance(answer, list):
        raise AnswerError("the answer is not a list of files")
    listed: list[bytes] = []
    left_out: list[bytes] = []
    for item in answer:
        try:
            path = text(item, "path").encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise AnswerError("the answer has a path that is none") from error
        (left_out if _cannot_be_listed(path) else listed).append(path)
    return listed, left_out


def write_list(path: Path, paths: list[bytes]) -> None:
    """Write a list whole or not at all; raise `CtlError`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            try:
                file.write(b"".join(line + b"\n" for line in paths))
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise CtlError(f"the list cannot be written ({error.strerror})", path=path) from error
