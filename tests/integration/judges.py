"""Trees that others make from the same source: GNU tar, the kernel's overlayfs, fsck.erofs."""

import os
import stat
import subprocess
import tarfile
from pathlib import Path

from capabilities import need_tool
from treecompare import read_tree

__all__ = ["check_by_fsck", "expected_layers", "expected_tar", "extracted_by_fsck"]

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


def _untar(tar, top):
    top.mkdir()
    command = [need_tool("tar"), "--numeric-owner", "--same-owner", "-p", "--xattrs"]
    command += ["--xattrs-include=*", "--delay-directory-restore", "-xf", tar, "-C", top]
    # Names are bytes, and a locale would change some of them.
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C"}, stderr=subprocess.PIPE)


def _members(tar):
    """Return the last header of each path."""
    with tarfile.open(tar) as archive:
        members = {os.path.normpath(os.fsencode(member.name)): member for member in archive}
    return {b"" if path == b"." else path: member for path, member in members.items()}


def _header_times(tar):
    """Return the seconds in each entry's own header, whatever PAX records say (3.8)."""
    times = {}
    with tar.open("rb") as raw:
        for path, member in _members(tar).items():
            raw.seek(member.offset_data - tarfile.BLOCKSIZE)
            header = raw.read(tarfile.BLOCKSIZE)
            times[path] = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").mtime
    return times


def _apply_times(top, times):
    """Set the times; what has no header gets those of an implied directory."""
    base = os.fsencode(top)
    for parent, directories, files in os.walk(base, topdown=False):
        for name in [os.path.join(parent, name) for name in directories + files] + [parent]:
            inside, path = name[len(base) + 1 :], Path(os.fsdecode(name))
            implied = inside not in times and path.is_dir() and not path.is_symlink()
            if implied:
                path.chmod(0o755)
            if inside in times or implied:
                seconds = times.get(inside, 0) * 10**9
                os.utime(path, ns=(seconds, seconds), follow_symlinks=False)


def expected_tar(tar: Path, top: Path, *, pax_mtime: bool = False):
    """Let GNU tar extract into `top` and return the tree, with times as the builder takes them."""
    _untar(tar, top)
    if not pax_mtime:
        _apply_times(top, _header_times(tar))
    tree = read_tree(top)
    for path, member in _members(tar).items():
        # Only a file system that somebody else wrote can have other modes than 0777 here.
        if member.issym():
            tree[b"/" + path] = tree[b"/" + path]._replace(mode=stat.S_IFLNK | member.mode)
    return tree


def _convert_whiteouts(top, lowers):
    """Turn OCI deletion marks into those of overlayfs.

    A mark that deletes nothing is left out: overlayfs lists marks of unmerged directories.
    """
    for parent, _, files in os.walk(top):
        for name in files:
            if not name.startswith(_WHITEOUT):
                continue
            Path(parent, name).unlink()
            deleted = Path(parent, name.removeprefix(_WHITEOUT))
            below = [lower / deleted.relative_to(top) for lower in lowers]
            if name == _OPAQUE:
                os.setxattr(parent, "trusted.overlay.opaque", b"y")
            elif deleted.is_dir() and not deleted.is_symlink():
                os.setxattr(deleted, "trusted.overlay.opaque", b"y")
            elif not os.path.lexists(deleted) and any(map(os.path.lexists, below)):
                os.mknod(deleted, 0o020000, 0)


def expected_layers(tars: list[Path], directory: Path):
    """Return the tree of layers, lowest first: extracted by GNU tar, merged by the kernel.

    Whiteouts of the lowest layer have nothing to delete and stay visible (5.4).
    """
    tops = []
    for number, tar in enumerate(tars):
        top = directory / f"extracted{number}"
        _untar(tar, top)
        if number:
            _convert_whiteouts(top, tops)
        _apply_times(top, _header_times(tar))
        tops.append(top)
    merged = directory / "overlay"
    merged.mkdir()
    lower = "lowerdir=" + ":".join(map(str, reversed(tops)))
    subprocess.run(["mount", "-t", "overlay", "-o", f"ro,{lower}", "none", merged], check=True)
    try:
        return read_tree(merged)
    finally:
        subprocess.run(["umount", merged], check=True)


def check_by_fsck(image: Path, devices: list[Path]) -> None:
    """Let fsck.erofs check the image with its data files."""
    command = [need_tool("fsck.erofs"), *(f"--device={device}" for device in devices), image]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert b"<E>" not in done.stderr + done.stdout


def extracted_by_fsck(image: Path, devices: list[Path], top: Path):
    """Let fsck.erofs check the image with its data files and extract it; return the tree.

    Version 1.5 understands the device table and chunks of any size. It does not restore
    xattrs, hard links (each name becomes a file of its own), and the set-id bits of files (it
    changes the owner afterwards).
    """
    command = [need_tool("fsck.erofs"), *(f"--device={device}" for device in devices)]
    done = subprocess.run([*command, f"--extract={top}", image], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert b"<E>" not in done.stderr + done.stdout
    return read_tree(top)
