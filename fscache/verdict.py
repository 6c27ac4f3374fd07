"""What `--transport auto` has found: kept until the next boot, so that few starts have to try.

One small file for each file system and program version, in the directory of the holders. The best
way stays the best one until the kernel is another; of a lesser one it is asked again some minutes
later, since somebody may have loaded a module.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from fscache.cache.cachefile import CacheError, read_whole, replace
from fscache.holder.link import run_directory
from fscache.transport import Transport, candidates

__all__ = ["forget_verdict", "known_verdict", "remember_verdict"]

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROGRAM = Path(__file__).with_name("probe.py")
_LESSER_SECONDS = 600.0
_LONGEST = 1000


def _place(work_dir: Path) -> Path:
    """Return the file for the file system of a cache directory, which exists."""
    kernel, program = os.uname(), _PROGRAM.stat()
    words = (
        _BOOT_ID.read_text().strip(), kernel.release, kernel.version, work_dir.stat().st_dev,
        os.geteuid(), str(_PROGRAM), program.st_mtime_ns,
    )  # fmt: skip
    name = hashlib.sha256(repr(words).encode()).hexdigest()[:16]
    return run_directory() / f"transport-{name}"


def known_verdict(work_dir: Path) -> Transport | None:
    """Return what an earlier start found for a cache directory's file system, while it holds."""
    try:
        content = read_whole(_place(work_dir), _LONGEST)
        if content is None:
            return None
        value = json.loads(content)
        transport, when = Transport(value["transport"]), float(value["when"])
    except (OSError, CacheError, ValueError, OverflowError, TypeError, KeyError):
        # Of another version, or nobody's business: what it says can be found out again.
        return None
    ways = candidates(Transport.AUTO)
    if transport not in ways:
        return None
    fresh = 0 <= time.time() - when < _LESSER_SECONDS
    return transport if transport == ways[0] or fresh else None


def remember_verdict(work_dir: Path, transport: Transport) -> None:
    """Keep what was found by trying; a directory that cannot be written to is no error."""
    content = json.dumps({"transport": transport, "when": time.time()}).encode()
    try:
        place = _place(work_dir)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.parent.stat().st_uid == os.geteuid():
            replace(place, content)
    except OSError as error:
        logger.debug("the verdict on transports is not kept: %s", error)


def forget_verdict(work_dir: Path) -> None:
    """Have the next start try again."""
    try:
        _place(work_dir).unlink(missing_ok=True)
    except OSError as error:
        logger.debug("the verdict on transports stays: %s", error)
