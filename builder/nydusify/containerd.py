"""containerd, as far as a commit needs it: what a container is, and pausing it.

Over its gRPC socket, since that is the API that containerd promises to keep; what `ctr` takes and
prints it does not. Source: containerd/api/services/{containers,images,snapshots,tasks}/v1.
"""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from builder.nydusify.protowire import Fields, pack_texts, parse_message
from erofs.errors import NydusError

__all__ = ["Container", "Containerd", "ContainerdError"]

logger = logging.getLogger(__name__)

_SERVICES = "/containerd.services."
_FULL_ID = 64
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECONDS = 30.0
_RESUMES = 3
# A container with a large specification; what gRPC would take by itself is the same.
_ANSWER_MAX = 16 << 20
_UPPER = "upperdir="


class ContainerdError(NydusError):
    """containerd cannot be asked, or has no good answer; `is_missing` for what is not there."""

    def __init__(self, what: str, *, is_missing: bool = False) -> None:
        super().__init__(what)
        self.is_missing = is_missing


class _Status(IntEnum):
    """States of a task."""

    NONE = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


@dataclass(frozen=True, slots=True)
class Container:
    """A container.

    Args:
        name: its id.
        image: the reference that it was made from.
        digest: what that stood for, empty when containerd does not have the image any more.
        parent: name of the snapshot below it.
        upper: directory of what it has written.
        pid: of its first process, 0 when it is not running.
        is_paused: whether somebody has paused it already.
    """

    name: str
    image: str
    digest: str
    parent: str
    upper: Path
    pid: int
    is_paused: bool


class Containerd:
    """A connection to containerd.

    Args:
        address: path of its socket, also with `unix://` in front.
        namespace: whose containers.

    Raises:
        ContainerdError: nobody listens there.
    """

    def __init__(self, address: str, namespace: str) -> None:
        import grpc

        self._errors: type[Exception] = grpc.RpcError
        self._missing = grpc.StatusCode.NOT_FOUND
        self._metadata = (("containerd-namespace", namespace),)
        self._namespace = namespace
        path = address.removeprefix("unix://")
        _probe(path)
        options = (
            # Go's server refuses what would be made of the path.
            ("grpc.default_authority", "localhost"),
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", _ANSWER_MAX),
        )
        self._channel: Any = grpc.insecure_channel(f"unix:{path}", options=options)

    def close(self) -> None:
        """Drop the connection."""
        self._channel.close()

    def _call(self, method: str, *texts: tuple[int, str]) -> Fields:
        """Call a method with a message of texts; raise `ContainerdError`."""
        call = self._channel.unary_unary(_SERVICES + method)
        try:
            data = call(pack_texts(texts), timeout=_SECONDS, metadata=self._metadata)
        except self._errors as error:
            failure: Any = error
            raise ContainerdError(
                failure.details(), is_missing=failure.code() == self._missing
            ) from error
        return parse_message(data)

    def resolve(self, text: str) -> str:
        """Return the id of the one container whose id begins so; raise `ContainerdError`."""
        if len(text) == _FULL_ID:
            return text
        logger.info("resolving container ID prefix %s to full ID", text)
        if not _ID.fullmatch(text):
            raise ContainerdError(f"no container found with ID : {text}")
        # In the language of filters a backslash is for the quotes.
        pattern = text.replace(".", "[.]")
        answer = self._call("containers.v1.Containers/List", (1, f'id~="^{pattern}"'))
        found = [parse_message(one).text(1) for one in answer.all(1)]
        if text in found:
            found = [text]
        if not found:
            raise ContainerdError(f"no container found with ID : {text}")
        if len(found) > 1:
            raise ContainerdError(
                f"ambiguous container ID  '{text}' matches multiple containers, please provide"
                " a more specific ID"
            )
        logger.info("resolved container ID to full ID: %s", found[0])
        return found[0]

    def inspect(self, name: str) -> Container:
        """Return what a container is; raise `ContainerdError`."""
        container = self._call("containers.v1.Containers/Get", (1, name)).message(1)
        image, snapshot = container.text(3), ((1, container.text(6)), (2, container.text(7)))
        if not image:
            raise ContainerdError(f"container {name} was not made from an image")
        found = self._optional("images.v1.Images/Get", (1, image))
        mounts = self._call("snapshots.v1.Snapshots/Mounts", *snapshot).all(1)
        parent = self._call("snapshots.v1.Snapshots/Stat", *snapshot).message(1).text(2)
        process = self._optional("tasks.v1.Tasks/Get", (1, name)).message(1)
        status = process.number(4)
        is_alive = status in (_Status.CREATED, _Status.RUNNING, _Status.PAUSED, _Status.PAUSING)
        return Container(
            name,
            image,
            found.message(1).message(3).text(2),
            parent,
            _upper_directory([parse_message(one) for one in mounts], name),
            process.number(3) if is_alive else 0,
            status in (_Status.PAUSED, _Status.PAUSING),
        )

    def _optional(self, method: str, *texts: tuple[int, str]) -> Fields:
        """Call a method; what is not there is empty. Raise `ContainerdError`."""
        try:
            return self._call(method, *texts)
        except ContainerdError as error:
            if not error.is_missing:
                raise
            return Fields({})

    @contextmanager
    def paused(self, container: Container) -> Iterator[None]:
        """Have a container paused within the block, and running again however that is left.

        One that is not running, or is paused already, stays as it is.

        Raises:
            ContainerdError: it cannot be paused, or not be resumed.
        """
        if not container.pid or container.is_paused:
            logger.info("container %s does not run, and is not paused for this", container.name)
            yield
            return
        logger.info("pausing container: %s", container.name)
        try:
            self._call("tasks.v1.Tasks/Pause", (1, container.name))
            yield
        except BaseException:
            # It may be paused even when that was not said any more.
            with _undisturbed():
                self._resume(container)
            raise
        with _undisturbed():
            failure = self._resume(container)
        if failure is not None:
            raise failure

    def _resume(self, container: Container) -> ContainerdError | None:
        """Let a container go on; what keeps it from that is logged and returned."""
        logger.info("unpausing container: %s", container.name)
        failure = None
        for _ in range(_RESUMES):
            try:
                self._call("tasks.v1.Tasks/Resume", (1, container.name))
                return None
            except ContainerdError as error:
                failure = error
            if not self._is_paused(container.name):
                return None
        logger.error(
            "container %s is still paused: ctr -n %s task resume %s", container.name,
            self._namespace, container.name,
        )  # fmt: skip
        return failure

    def _is_paused(self, name: str) -> bool:
        """Tell whether a container is paused, as far as containerd says so."""
        try:
            status = self._optional("tasks.v1.Tasks/Get", (1, name)).message(1).number(4)
        except ContainerdError:
            return True
        return status in (_Status.PAUSED, _Status.PAUSING)


def _probe(path: str) -> None:
    """Say in the real tool's words when nobody listens; gRPC would try for a while."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            raise ContainerdError(
                'connection error: desc = "transport: Error while dialing: dial'
                f' unix://{path}: {error.strerror or error}"'
            ) from error


def _upper_directory(mounts: Sequence[Fields], name: str) -> Path:
    for mount in mounts:
        for option in mount.all(4):
            text = option.decode("utf-8", "surrogateescape")
            if text.startswith(_UPPER):
                return Path(text.removeprefix(_UPPER))
    raise ContainerdError(f"snapshot of container {name} is no overlay with an upper directory")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal interrupt the block, where that can be said: in the main thread."""
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
        yield
