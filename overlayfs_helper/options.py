"""The helper's arguments and mount options: bytes in, values out, no system calls.

Source: spec vm-runtimes 1.2 to 1.5; flag numbers: Linux `include/uapi/linux/mount.h`.
"""

from overlayfs_helper.errors import EXIT_USAGE, HelperError, shown

__all__ = ["MS_BIND", "MS_REMOUNT", "Call", "parse_arguments", "parse_options", "split_escaped"]

USAGE = "usage: nydus-overlayfs overlay DIR [-sfnv] [-t TYPE] [-N NAMESPACE] -o OPTIONS"

# What a VM runtime reads: never shown, never decoded, never given to the kernel.
_RUNTIME_OPTIONS = (b"extraoption=", b"io.katacontainers.volume=")

# A list of 300 layers takes 50 KiB; a single argument cannot exceed 128 KiB.
MAX_OPTIONS_BYTES = 1 << 20

MS_RDONLY = 0x1
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000

# The word that sets a flag, the word that clears it, and the flag. Later words win.
_FLAG_WORDS = (
    (b"ro", b"rw", MS_RDONLY),
    (b"nosuid", b"suid", 0x2),
    (b"nodev", b"dev", 0x4),
    (b"noexec", b"exec", 0x8),
    (b"sync", b"async", 0x10),
    (b"remount", None, MS_REMOUNT),
    (b"mand", b"nomand", 0x40),
    (b"dirsync", None, 0x80),
    (b"nosymfollow", b"symfollow", 0x100),
    (b"noatime", b"atime", 0x400),
    (b"nodiratime", b"diratime", 0x800),
    (b"bind", None, MS_BIND),
    (b"rbind", None, MS_BIND | MS_REC),
    (b"relatime", b"norelatime", 0x200000),
    (b"strictatime", b"nostrictatime", 0x1000000),
    (b"lazytime", b"nolazytime", 0x2000000),
)
_SET = {word: flag for word, _, flag in _FLAG_WORDS}
_CLEAR = {word: flag for _, word, flag in _FLAG_WORDS if word is not None}

# Words for mount(8) and init systems, which the kernel does not know.
_USERSPACE = frozenset(
    (b"defaults", b"auto", b"noauto", b"user", b"nouser", b"users", b"owner", b"group",
     b"_netdev", b"nofail", b"comment")
)  # fmt: skip
# Work for somebody who should have done it before: going on would give another mount.
_FOREIGN = {
    b"uidmap": "containerd maps ids only for other types of mounts",
    b"gidmap": "containerd maps ids only for other types of mounts",
    b"loop": "an overlay has no loop device",
}


class Call:
    """What the command line asks for; `options` is all `-o` values, joined."""

    def __init__(self) -> None:
        self.target = b""
        self.options = b""
        self.fake = False
        self.verbose = False
        self.namespace: bytes | None = None


def _usage(text: str) -> HelperError:
    return HelperError(f"{text}; {USAGE}", EXIT_USAGE)


def parse_arguments(words: list[bytes]) -> Call:
    """Decode what mount.fuse, mount(8) or a user passes, without the program's name.

    Raises:
        HelperError: not `overlay DIR`, an unknown switch, or no options.
    """
    call = Call()
    places: list[bytes] = []
    values: dict[bytes, list[bytes]] = {b"-o": [], b"-t": [], b"-N": []}
    rest = iter(words)
    for word in rest:
        if word[:2] in values:
            value = word[2:] or next(rest, None)
            if value is None:
                raise _usage(f"{shown(word)} needs a value")
            values[word[:2]].append(value)
        elif word[:1] == b"-" and word[1:] and not word[1:].strip(b"sfnv"):
            call.fake |= b"f" in word
            call.verbose |= b"v" in word
        elif word[:1] == b"-":
            raise _usage(f"unknown switch {shown(word)}")
        else:
            places.append(word)
    if len(places) != 2:
        raise _usage(f"expected a source and a directory, got {len(places)} arguments")
    if places[0] != b"overlay":
        raise _usage(f"the source has to be overlay, got {shown(places[0])}")
    call.target = places[1]
    if not call.target:
        raise _usage("the directory is empty")
    if values[b"-N"]:
        call.namespace = values[b"-N"][-1]
    call.options = b",".join(values[b"-o"])
    if not call.options.strip(b","):
        raise _usage("there are no options")
    return call


def split_escaped(text: bytes, separator: bytes) -> list[bytes]:
    """Split at separators that no backslash escapes; backslashes stay."""
    pieces: list[bytes] = []
    joined: list[bytes] = []
    for part in text.split(separator):
        joined.append(part)
        if (len(part) - len(part.rstrip(b"\\"))) % 2 == 0:
            pieces.append(separator.join(joined))
            joined = []
    # A backslash at the very end escapes nothing.
    if joined:
        pieces.append(separator.join(joined))
    return pieces


def parse_options(text: bytes) -> tuple[int, list[bytes]]:
    """Return mount flags, and the options for the kernel's overlay in their order.

    Raises:
        HelperError: nothing that names a layer is left, or an option that others had to
            carry out. No option of a VM runtime is shown.
    """
    if len(text) > MAX_OPTIONS_BYTES:
        raise HelperError(
            f"{len(text)} bytes of options, at most {MAX_OPTIONS_BYTES} are taken", EXIT_USAGE
        )
    flags = 0
    data: list[bytes] = []
    for piece in split_escaped(text, b","):
        if piece.startswith(_RUNTIME_OPTIONS):
            continue
        key = piece.partition(b"=")[0]
        if piece in _SET:
            flags |= _SET[piece]
        elif piece in _CLEAR:
            flags &= ~_CLEAR[piece]
        elif piece.startswith(b"X-containerd."):
            raise HelperError(
                f"{shown(key)}: an option for containerd's mount manager, which did not run",
                EXIT_USAGE,
            )
        elif key in _FOREIGN:
            raise HelperError(f"{shown(key)}: {_FOREIGN[key]}", EXIT_USAGE)
        elif piece and key not in _USERSPACE and not piece.startswith((b"x-", b"X-")):
            data.append(piece)
    layered = any(piece.startswith((b"lowerdir=", b"lowerdir+=")) for piece in data)
    if not layered and not flags & (MS_REMOUNT | MS_BIND):
        raise HelperError("no option names a lower directory", EXIT_USAGE)
    return flags, data
