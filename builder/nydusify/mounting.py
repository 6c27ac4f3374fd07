"""Images mounted by a daemon of its own for as long as somebody looks at them."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.nydusify.places import docker_config
from builder.oci.errors import ImageError
from builder.oci.layout import BLOBS, LayoutSource
from builder.oci.place import Source
from builder.oci.registry import Repository
from fscache.backend.dockerauth import docker_credentials

__all__ = ["Mounted", "daemon_config", "mounted_image", "start_daemon", "stop_daemon"]

logger = logging.getLogger(__name__)

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.05
_SUN_PATH = 108  # bytes of a socket's path with its NUL (unix(7))


@dataclass(frozen=True, slots=True)
class Mounted:
    """What to mount where; `backend` in nydusd's words, None for the place of the image."""

    source: Source
    bootstrap: Path
    mountpoint: Path
    backend: Mapping[str, object] | None = None
    prefetch: bool = False


def _backend(image: Mounted) -> Mapping[str, object]:
    """Return the daemon's backend; raise `ImageError` for a place that no daemon reads."""
    if image.backend is not None:
        return image.backend
    source = image.source
    if isinstance(source, LayoutSource):
        return {"type": "localfs", "config": {"dir": str(source.directory / BLOBS)}}
    if not isinstance(source, Repository):
        raise ImageError(f"{source.name} cannot be mounted: only registries and layout folders")
    reference = source.reference
    return {
        "type": "registry",
        "config": {
            "scheme": source.scheme,
            "host": reference.api_host,
            "repo": reference.repository,
            "skip_verify": source.insecure,
        },
    }


def daemon_config(image: Mounted, cache: Path) -> dict[str, object]:
    """Return the configuration that a daemon is started with."""
    return {
        "device": {
            "backend": _backend(image),
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
        "digest_validate": False,
        "iostats_files": False,
        "enable_xattr": True,
        "fs_prefetch": {
            "enable": image.prefetch,
            "threads_count": 10,
            "merging_size": 131072,
            "prefetch_all": image.prefetch,
        },
    }


def _environment(image: Mounted, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the daemon's environment: credentials go there, never into files or arguments."""
    found = dict(environment)
    directory = docker_config(environment)
    if isinstance(image.source, Repository) and directory is not None:
        known = docker_credentials(directory, image.source.reference.host)
        # An identity token is no password; our daemon reads Docker's configuration itself.
        if known is not None and not known.identity_token:
            pair = f"{known.username}:{known.password}"
            found["IMAGE_PULL_AUTH"] = base64.b64encode(pair.encode()).decode()
    return found


def _words(image: Mounted, program: str, config: Path, socket: Path) -> Sequence[str]:
    words = [
        "--config", str(config), "--mountpoint", str(image.mountpoint), "--bootstrap",
        str(image.bootstrap), "--log-level", "warn",
    ]  # fmt: skip
    if len(os.fsencode(socket)) < _SUN_PATH:
        words += ["--apisock", str(socket)]
    else:
        logger.warning("path of the API socket would be too long, there is none: %s", socket)
    if program:
        return [program, *words]
    return [sys.executable, "-m", "fscache", "erofs", *words]


def start_daemon(
    image: Mounted, program: str, environment: Mapping[str, str], work: Path
) -> subprocess.Popen[bytes]:
    """Start a daemon and wait until the image is mounted; the caller stops it.

    Args:
        image: what to mount where; the mount point is made.
        program: nydusd, empty for ours.
        environment: with Docker's configuration.
        work: a directory for configuration and cache.

    Raises:
        ImageError: it did not mount the image; its own words are on standard error.
    """
    cache = work / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    image.mountpoint.mkdir(parents=True, exist_ok=True)
    config = work / "config.json"
    # A bucket's keys are in it: nobody else reads it, and it is gone when the image is there.
    config.unlink(missing_ok=True)
    with open(config, "x", opener=_private) as file:
        json.dump(daemon_config(image, cache), file)
    daemon = subprocess.Popen(
        _words(image, program, config, work / "api.sock"),
        env=_environment(image, environment),
        stdin=subprocess.DEVNULL,
    )
    end = time.monotonic() + _START_SECONDS
    try:
        while not os.path.ismount(image.mountpoint):
            status = daemon.poll()
            if status is not None:
                raise ImageError("daemon ended before the image was mounted", got=f"exit {status}")
            if time.monotonic() > end:
                raise ImageError("image is not mounted in time", path=image.mountpoint)
            time.sleep(_POLL_SECONDS)
        config.unlink()
    except BaseException:
        stop_daemon(daemon)
        config.unlink(missing_ok=True)
        raise
    return daemon


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def stop_daemon(daemon: subprocess.Popen[bytes]) -> None:
    """Have a daemon unmount and end.

    The mount disappears at once; a daemon that still serves programs in it ends with the last
    of them and is not waited for.
    """
    daemon.terminate()
    try:
        daemon.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("mount is still used: its daemon %d ends with the last user", daemon.pid)


@contextmanager
def mounted_image(
    image: Mounted, program: str, environment: Mapping[str, str], work: Path
) -> Iterator[Path]:
    """Have an image mounted within the block; raise `ImageError`."""
    daemon = start_daemon(image, program, environment, work)
    try:
        yield image.mountpoint
    finally:
        stop_daemon(daemon)
