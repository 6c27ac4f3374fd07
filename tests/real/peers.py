"""Build the clients of tests/peers into a cache outside of the checkout.

`python -m tests.real.peers` does it and prints where they are, or why they are not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["PeersError", "build_peers", "peers_directory"]

MODULE = Path(__file__).resolve().parents[1] / "peers"
# Modules are loaded the first time, and containerd is large.
BUILD_SECONDS = 1800
_CONTAINERD = "github.com/containerd/containerd/v2/cmd"
_SNAPSHOTTER = "github.com/containerd/nydus-snapshotter/cmd"
_BUILDKIT = "github.com/moby/buildkit/cmd"
_PACKAGES = (
    f"{_CONTAINERD}/containerd",
    f"{_CONTAINERD}/containerd-shim-runc-v2",
    f"{_CONTAINERD}/ctr",
    f"{_SNAPSHOTTER}/containerd-nydus-grpc",
    f"{_BUILDKIT}/buildkitd",
    f"{_BUILDKIT}/buildctl",
    "./helpersnapshotter",
    "./hookplugin",
)
_BUILD = (
    "build", "-trimpath", "-ldflags=-s -w", "-tags=no_cri,no_btrfs,no_devmapper,no_zfs,nydus",
)  # fmt: skip


class PeersError(Exception):
    """Why there are no clients."""


def peers_directory() -> Path:
    """Return where the programs of all versions are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    top = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return top / "nydus-erofs" / "peers"


def _final() -> Path:
    sums = hashlib.sha256(" ".join((*_BUILD, *_PACKAGES)).encode())
    for name in ("go.mod", "go.sum", "helpersnapshotter/main.go", "hookplugin/main.go"):
        sums.update((MODULE / name).read_bytes())
    return peers_directory() / sums.hexdigest()[:32]


def _build(target: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise PeersError("Go is not installed")
    try:
        done = subprocess.run(
            [go, *_BUILD, "-o", f"{target}/", *_PACKAGES],
            cwd=MODULE,
            env={**os.environ, "CGO_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PeersError(f"go build took longer than {BUILD_SECONDS} s") from error
    if done.returncode:
        raise PeersError("go build: " + " / ".join(done.stderr.strip().splitlines()[-3:]))


def build_peers() -> Path:
    """Return the directory with the programs, which is made once for each go.sum.

    Raises:
        PeersError: there is no Go, or it could not build them (too old, no module proxy).
    """
    final = _final()
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=final.parent) as part:
        made = Path(part, "bin")
        made.mkdir()
        _build(made)
        try:
            made.rename(final)
        except OSError:
            # Somebody else was first.
            if not final.is_dir():
                raise
    return final


def main() -> int:
    """Build; the tests say the same as a failure or as the reason of a skip."""
    try:
        print(f"clients: {build_peers()}")
    except PeersError as error:
        print(f"no clients to test with: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
