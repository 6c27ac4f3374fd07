"""What the HTTP API answers about a daemon of any kind."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from http import HTTPStatus
from typing import Protocol

from erofs.console import LOG_LEVELS
from erofs.version import GIT_COMMIT, VERSION
from fscache.api.message import DONE, Answer, Refusal, Request, text
from fscache.events import ErrorRing
from fscache.lifecycle import State

__all__ = ["AnyDaemon", "events", "info", "set_level"]


class _Names(Protocol):
    @property
    def id(self) -> str | None: ...

    @property
    def supervisor(self) -> str | None: ...


class AnyDaemon(Protocol):
    """What all daemons can tell of themselves."""

    events: ErrorRing

    @property
    def options(self) -> _Names:
        """What it began with."""

    @property
    def state(self) -> State:
        """Where it is in its life."""


def info(daemon: AnyDaemon, collection: Mapping[str, object] | None) -> Answer:
    """Return version and state, with a table of mounts."""
    return Answer(
        HTTPStatus.OK,
        {
            "version": {
                "package_ver": VERSION,
                "git_commit": GIT_COMMIT,
                "build_time": "unknown",
                "profile": "release",
                "rustc": f"python {sys.version.split()[0]}",
            },
            "id": daemon.options.id,
            "supervisor": daemon.options.supervisor,
            "state": daemon.state.value,
            "backend_collection": collection,
        },
    )


def set_level(daemon: AnyDaemon, request: Request) -> Answer:
    """Set the log level of the process."""
    level = text(request.json(), "log_level")
    if level not in LOG_LEVELS:
        raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "Configure(ResponsePayloadType)")
    logging.getLogger().setLevel(LOG_LEVELS[level])
    return DONE


def events(daemon: AnyDaemon, request: Request) -> Answer:
    """Return the last errors."""
    return Answer(HTTPStatus.OK, daemon.events.as_dict())
