"""The command line of `nydus-overlayfs`: one line on standard error, and an exit status."""

import os
import sys

from overlayfs_helper.errors import EXIT_INTERRUPTED, EXIT_SYSTEM, EXIT_USAGE, HelperError, shown
from overlayfs_helper.options import USAGE, parse_arguments, parse_options

__all__ = ["main"]


def installed_version() -> str:
    """Return the version of the installed package, or "unknown"."""
    # Imported here: it takes longer than the mount, and nobody waits for it.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nydus-erofs")
    except PackageNotFoundError:
        return "unknown"


def _write(fd: int, text: str) -> None:
    """Write a line without a buffer, to a descriptor that may be closed."""
    try:
        os.write(fd, f"{text}\n".encode("ascii", "backslashreplace"))
    except OSError:
        return


def _say(text: str) -> None:
    _write(2, f"nydus-overlayfs: {text}")


def _run(words: list[bytes]) -> None:
    call = parse_arguments(words)
    flags, options = parse_options(call.options)
    if call.verbose:
        _say(f"overlay on {shown(call.target)}, flags {flags:#x}, {shown(b','.join(options))}")
    if call.fake:
        return
    # Imported here: ctypes is not needed to refuse a call.
    from overlayfs_helper.mounting import enter_namespace, mount_overlay

    if call.namespace is not None:
        if not call.target.startswith(b"/"):
            raise HelperError("a directory in another namespace has to be absolute", EXIT_USAGE)
        enter_namespace(call.namespace)
    try:
        mount_overlay(call.target, flags, options)
    except HelperError as error:
        raise HelperError(f"cannot mount {shown(call.target)}: {error}", error.status) from error
    except OSError as error:
        text = f"cannot mount {shown(call.target)}: {error.strerror}"
        raise HelperError(text, EXIT_SYSTEM) from error


def main(argv: list[str] | None = None, version: str | None = None) -> int:
    """Mount what the arguments say and return the exit status of mount(8).

    Args:
        argv: without the program's name; the process's own when left out.
        version: what `--version` says, when the package is not installed as one.
    """
    words = sys.argv[1:] if argv is None else argv
    if words in (["--help"], ["-h"]):
        _write(1, USAGE)
        return 0
    if words in (["--version"], ["-V"]):
        _write(1, f"nydus-overlayfs version {version or installed_version()}")
        return 0
    try:
        _run([os.fsencode(word) for word in words])
    except HelperError as error:
        _say(str(error))
        return error.status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0
