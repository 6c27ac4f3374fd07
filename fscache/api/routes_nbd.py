"""What the HTTP API of `nydusd nbd` answers: the daemon itself, nothing of mounts."""

from __future__ import annotations

from fscache.api.message import DONE, Answer, Request, Router
from fscache.api.routes_daemon import events, info, set_level
from fscache.nbd.daemon import NbdDaemon

__all__ = ["nbd_answer"]


def _exit(daemon: NbdDaemon, request: Request) -> Answer:
    daemon.request_stop()
    return DONE


_ROUTER = Router[NbdDaemon](
    {
        ("GET", "/api/v1/daemon"): lambda daemon, _: info(daemon, None),
        ("PUT", "/api/v1/daemon"): set_level,
        ("GET", "/api/v2/daemon"): lambda daemon, _: info(daemon, None),
        ("PUT", "/api/v2/daemon"): set_level,
        ("GET", "/api/v1/daemon/events"): events,
        ("PUT", "/api/v1/daemon/exit"): _exit,
    }
)


def nbd_answer(daemon: NbdDaemon, request: Request) -> Answer:
    """Answer a request; errors become statuses, nothing is raised but what is a bug."""
    return _ROUTER.answer(daemon, request)
