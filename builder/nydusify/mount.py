"""`nydusify mount` (spec tools 15.3): from a reference to a tree, until a signal comes."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from builder.convert.bootlayer import extract_bootstrap
from builder.nydusify.flags import Command, Flag, Values
from builder.nydusify.mounting import Mounted, start_daemon, stop_daemon
from builder.nydusify.places import Places
from builder.nydusify.stores import store_values
from builder.oci.errors import ImageError
from builder.proof.checking import load_image

__all__ = ["COMMAND", "run"]

logger = logging.getLogger(__name__)

COMMAND = Command(
    "mount",
    "Mount the nydus image as a filesystem",
    (
        Flag("target", "Target (Nydus) image reference", required=True),
        Flag("target-insecure", "Skip verifying server certs for HTTPS target registry", False),
        Flag("backend-type", "Type of storage backend: oss, s3, localfs"),
        Flag("backend-config", "Json configuration string for storage backend"),
        Flag("backend-config-file", "Json configuration file for storage backend"),
        Flag("prefetch", "Fetch everything", False),
        Flag("mount-path", "The image mount path", "./image-fs"),
        Flag("platform", "Which image of an index to mount", env=""),
        Flag("plain-http", "Enable plain http", False),
        Flag("work-dir", "Working directory; what is made in it is removed afterwards", "./tmp"),
        Flag("nydusd", "Path to the nydusd binary; ours if not given"),
    ),
    ("view",),
)
_ENDING = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.5


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Mount, wait for a signal or the daemon's end, unmount; return the exit status."""
    top = Path(values.text("work-dir"))
    top.mkdir(parents=True, exist_ok=True)
    backend = store_values(values, "backend")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mount-", dir=top)))
        places = Places(environment, stack, plain_http=values.flag("plain-http"))
        source = places.source(values.text("target"), values.flag("target-insecure"))
        image = load_image(source, values.text("platform"), nydus=True)
        layer = image.manifest.bootstrap
        if layer is None:
            raise ImageError(f"{source.name} is no Nydus image")
        bootstrap = work / "nydus_bootstrap"
        extract_bootstrap(source.pieces(layer), layer, bootstrap)
        mountpoint = Path(values.text("mount-path"))
        mounted = Mounted(source, bootstrap, mountpoint, backend, values.flag("prefetch"))
        ending = threading.Event()
        for number in _ENDING:
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: ending.set()))
        daemon = start_daemon(mounted, values.text("nydusd"), environment, work)
        stack.callback(stop_daemon, daemon)
        logger.info("Please send signal SIGINT/SIGTERM to umount the file system")
        while daemon.poll() is None and not ending.wait(_POLL_SECONDS):
            pass
        if ending.is_set():
            logger.info("Received Signal: unmounting")
            return 0
        if daemon.poll() not in (None, 0):
            raise ImageError("daemon ended by itself", got=f"exit {daemon.returncode}")
    return 0
