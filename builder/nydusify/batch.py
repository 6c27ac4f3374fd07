"""Many images: a list, bounded parallelism, a report that a later run goes on by."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from builder.nydusify.flags import UsageError, Values
from builder.oci.errors import ImageError
from builder.oci.names import parse_reference
from erofs.errors import NydusError

__all__ = ["Line", "convert_list", "parse_list"]

logger = logging.getLogger(__name__)

_LOCAL = "local"


class Line(NamedTuple):
    """One conversion of a list."""

    source: str
    target: str


def parse_list(text: str, suffix: str) -> list[Line]:
    """Return the conversions of a list: `SOURCE [TARGET]` in each line, `#` begins a comment.

    Args:
        text: the list.
        suffix: makes the target of a line that has none.

    Raises:
        UsageError: a line with more words, or without a target.
        ImageError: a reference that is none.
    """
    lines = []
    for number, row in enumerate(text.splitlines(), 1):
        words = row.partition("#")[0].split()
        if not words:
            continue
        if len(words) == 1 and suffix:
            reference = parse_reference(words[0])
            words.append(str(reference.with_tag(f"{reference.tag or 'latest'}{suffix}")))
        if len(words) != 2:
            raise UsageError(f"--source-file: line {number} is not SOURCE TARGET")
        lines.append(Line(*words))
    return list(dict.fromkeys(lines))


class _Report:
    """Outcomes as lines of JSON; each is on the disk before the next conversion counts."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()

    def done(self) -> set[Line]:
        """Return what an earlier run has converted; a line cut short by a crash is left out."""
        if self._path is None or not self._path.exists():
            return set()
        found = set()
        for row in self._path.read_text("utf-8", "replace").splitlines():
            try:
                value = json.loads(row)
                if value["status"] == "done":
                    found.add(Line(value["source"], value["target"]))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: a line is not understood", self._path)
        return found

    def add(self, line: Line, outcome: Mapping[str, Any]) -> None:
        """Append an outcome and bring it to the disk; raise `OSError`."""
        if self._path is None:
            return
        row = json.dumps({**line._asdict(), **outcome}, ensure_ascii=False)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(row + "\n")
            file.flush()
            os.fsync(file.fileno())


def convert_line(
    values: Values, environment: Mapping[str, str] | None, line: Line
) -> dict[str, Any]:
    """Convert one image, here or on another machine, and return the outcome.

    Args:
        values: of the command line.
        environment: None for that of the machine which carries it out.
        line: what to convert.
    """
    from builder.nydusify.convert import convert_one

    start = time.monotonic()
    try:
        result = convert_one(
            values, os.environ if environment is None else environment, line.source, line.target
        )
    except (NydusError, OSError) as error:
        return {"status": "failed", "error": str(error), "seconds": time.monotonic() - start}
    return {
        "status": "done",
        "digest": result.descriptor.digest,
        "layers": result.layers,
        "cached": result.cached,
        "seconds": round(time.monotonic() - start, 3),
    }


def _executor(values: Values, stack: ExitStack) -> Executor:
    """Return what carries conversions out: threads, or the machines of a Dask cluster."""
    cluster = values.text("cluster")
    if not cluster:
        return stack.enter_context(ThreadPoolExecutor(max(1, values.number("jobs")), "image"))
    try:
        from distributed import Client
    except ImportError as error:
        raise ImageError("--cluster needs the extra: pip install 'nydus-erofs[cluster]'") from error
    address = None if cluster == _LOCAL else cluster
    client = stack.enter_context(Client(address))
    executor: Executor = client.get_executor(pure=False)
    return executor


def _note(report: _Report, line: Line, future: Future[dict[str, Any]]) -> None:
    """Write an outcome down as soon as it is there."""
    if not future.cancelled() and future.exception() is None:
        report.add(line, future.result())
        logger.info("%s: %s", line.source, future.result()["status"])


def convert_list(values: Values, environment: Mapping[str, str]) -> int:
    """Convert all images of the list that are not done; return 1 when one of them fails."""
    path = Path(values.text("source-file"))
    try:
        lines = parse_list(path.read_text("utf-8"), values.text("target-suffix"))
    except UnicodeDecodeError as error:
        raise ImageError("list of images is not UTF-8", path=path) from error
    report = _Report(Path(values.text("report")) if values.text("report") else None)
    known = report.done()
    left = [line for line in lines if line not in known]
    logger.info("%d images to convert, %d are done", len(left), len(lines) - len(left))
    # Machines of a cluster have environments, and so credentials, of their own.
    sent = None if values.text("cluster") else environment
    failed = 0
    with ExitStack() as stack:
        executor = _executor(values, stack)
        futures = [executor.submit(convert_line, values, sent, line) for line in left]
        for line, future in zip(left, futures, strict=True):
            future.add_done_callback(partial(_note, report, line))
        for line, future in zip(left, futures, strict=True):
            outcome = future.result()
            if outcome["status"] == "failed":
                failed += 1
                logger.error("%s failed: %s", line.source, outcome["error"])
    if failed:
        raise ImageError(f"{failed} of {len(lines)} images failed")
    return 0
