"""What the HTTP API of a singleton daemon answers (spec tools 7.1, last paragraph, and 7.2)."""

from __future__ import annotations

from http import HTTPStatus
from typing import NoReturn

from fscache.api.message import DONE, Answer, Refusal, Request, Router, text
from fscache.api.routes_daemon import events, info, set_level
from fscache.backend.table import ConfigError
from fscache.blobentry import EntryError, parse_blob_entry
from fscache.lifecycle import State
from fscache.singleton import SingletonDaemon

__all__ = ["singleton_answer"]


def _unsupported() -> NoReturn:
    raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "DaemonAbnormal(Unsupported)")


def _no_mounts(daemon: SingletonDaemon, request: Request) -> Answer:
    request.need("mountpoint")
    _unsupported()


def _no_requests(daemon: SingletonDaemon, request: Request) -> Answer:
    _unsupported()


def _no_counter(daemon: SingletonDaemon, request: Request) -> Answer:
    raise Refusal(HTTPStatus.NOT_FOUND, "Metrics(Stats(NoCounter))")


def _unexpected(daemon: SingletonDaemon, request: Request) -> NoReturn:
    event = request.path.rpartition("/")[2].capitalize()
    raise Refusal(HTTPStatus.BAD_REQUEST, f'DaemonAbnormal(UnexpectedEvent("{event}"))')


def _exit(daemon: SingletonDaemon, request: Request) -> Answer:
    daemon.request_stop()
    return DONE


def _start(daemon: SingletonDaemon, request: Request) -> Answer:
    if daemon.state is not State.READY:
        _unexpected(daemon, request)
    daemon.start_taken_over()
    return DONE


def _take_over(daemon: SingletonDaemon, request: Request) -> Answer:
    if daemon.state is not State.INIT:
        _unexpected(daemon, request)
    daemon.take_over()
    return DONE


def _send_state(daemon: SingletonDaemon, request: Request) -> Answer:
    if daemon.options.supervisor is not None and not daemon.send_state():
        _unsupported()
    # As the original: there is nobody to send it to.
    return DONE


def _get_config(daemon: SingletonDaemon, request: Request) -> Answer:
    return Answer(HTTPStatus.OK, {})


def _put_blob(daemon: SingletonDaemon, request: Request) -> Answer:
    values = request.json()
    text(values, "type")
    try:
        entry = parse_blob_entry(values)
    except EntryError:
        raise
    except ConfigError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"BadRequest ({error})") from error
    daemon.add(entry)
    return DONE


def _get_blobs(daemon: SingletonDaemon, request: Request) -> Answer:
    domain_id, blob_id = _object(request)
    if domain_id is None:
        raise Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
    return Answer(HTTPStatus.OK, daemon.blobs.as_list(domain_id, blob_id or ""))


def _delete_blobs(daemon: SingletonDaemon, request: Request) -> Answer:
    domain_id, blob_id = _object(request)
    if domain_id is None and blob_id is None:
        raise Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
    if domain_id is not None:
        daemon.remove(domain_id, blob_id or "")
    elif not daemon.cull(blob_id or ""):
        # There is no cache of the kernel here.
        _unsupported()
    return DONE


def _object(request: Request) -> tuple[str | None, str | None]:
    return request.query.get("domain_id"), request.query.get("blob_id")


_METRICS = ("", "/files", "/pattern", "/backend", "/blobcache")
_ROUTER = Router[SingletonDaemon](
    {
        ("GET", "/api/v1/daemon"): lambda daemon, _: info(daemon, None),
        ("PUT", "/api/v1/daemon"): set_level,
        ("GET", "/api/v2/daemon"): lambda daemon, _: info(daemon, None),
        ("PUT", "/api/v2/daemon"): set_level,
        ("GET", "/api/v1/daemon/events"): events,
        ("GET", "/api/v1/daemon/backend"): _no_mounts,
        ("PUT", "/api/v1/daemon/start"): _start,
        ("PUT", "/api/v1/daemon/exit"): _exit,
        ("PUT", "/api/v1/daemon/fuse/sendfd"): _send_state,
        ("PUT", "/api/v1/daemon/fuse/takeover"): _take_over,
        ("POST", "/api/v1/mount"): _no_mounts,
        ("PUT", "/api/v1/mount"): _no_mounts,
        ("DELETE", "/api/v1/mount"): _no_mounts,
        ("GET", "/api/v1/config"): _get_config,
        ("PUT", "/api/v1/config"): _no_requests,
        ("GET", "/api/v1/metrics/inflight"): _no_requests,
        ("GET", "/api/v2/blobs"): _get_blobs,
        ("PUT", "/api/v2/blobs"): _put_blob,
        ("DELETE", "/api/v2/blobs"): _delete_blobs,
        **{("GET", f"/api/v1/metrics{name}"): _no_counter for name in _METRICS},
    }
)


def singleton_answer(daemon: SingletonDaemon, request: Request) -> Answer:
    """Answer a request; errors become statuses, nothing is raised but what is a bug."""
    return _ROUTER.answer(daemon, request)
