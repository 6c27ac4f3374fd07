"""What this machine lets the tests do, found out by trying; used through `requires`."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fscache.channel.fuse import require_fuse
from fscache.mounts.loop import LoopDevice, LoopError
from fscache.probe import lazy_supported, probe
from fscache.sharing import LazyUnsupported

CI = os.environ.get("CI") == "true"


@functools.cache
def _findings():
    with tempfile.TemporaryDirectory() as directory:
        return probe(Path(directory))


def _root():
    return None if os.geteuid() == 0 else "not root"


def _erofs_mount():
    finding = next(finding for finding in _findings() if finding.name == "file-backed")
    return None if finding.ok else finding.detail


def _fanotify():
    finding = lazy_supported(_findings())
    return None if finding.ok else finding.detail


def _loop():
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4096)
        try:
            LoopDevice.attach(Path(file.name)).close()
        except LoopError as error:
            return str(error)
    return None


def _overlay():
    script = (
        'mount -t tmpfs tmpfs "$0" && cd "$0" && mkdir lower upper work target &&'
        " mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work target"
    )
    with tempfile.TemporaryDirectory() as directory:
        words = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, directory]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


def _fuse():
    try:
        require_fuse()
    except LazyUnsupported as error:
        return str(error)
    return None if shutil.which("fusermount3") else "fusermount3 is not installed"


_PROBES = {
    "root": _root, "erofs_mount": _erofs_mount, "fanotify": _fanotify, "loop": _loop,
    "overlay": _overlay, "fuse": _fuse,
}  # fmt: skip


@functools.cache
def missing(capability):
    """Return why a capability of kernel or privilege is not there, or None."""
    return _PROBES[capability]()


def requires(*capabilities):
    """Skip a test or module, with the reason, where the machine cannot do it."""
    reasons = [f"{name}: {reason}" for name in capabilities if (reason := missing(name))]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "all there")


def need_tool(name):
    """Return the path of a program; without it skip, or fail under CI=true."""
    path = shutil.which(name)
    if path is None:
        (pytest.fail if CI else pytest.skip)(f"{name} is not installed")
    return path
