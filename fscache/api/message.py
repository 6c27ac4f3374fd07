"""Requests and answers of the HTTP API as values, and the way from one to the other.

No sockets here, and no daemon. Statuses and texts follow the recordings of the real daemon
(spec tools section 7).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Generic, TypeVar
from urllib.parse import parse_qsl, urlsplit

from erofs.errors import NydusError
from erofs.values import EMPTY, Value
from fscache.backend.table import is_plain

__all__ = ["DONE", "Answer", "Refusal", "Request", "Router", "text"]

_D = TypeVar("_D")


class Answer(Value):
    """Status and body: a JSON value, or bytes of another type; no body for None."""

    status: HTTPStatus
    body: object = None
    content_type: str = "application/json"


class Refusal(Exception):
    """An answer that is not what was asked for, with its status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.answer = Answer(status, {"code": "UNDEFINED", "message": message})


class Request(Value):
    """One request; `path` without the query."""

    method: str
    path: str
    query: Mapping[str, str] = EMPTY
    body: bytes = b""

    @classmethod
    def parse(cls, method: str, target: str, body: bytes) -> Request:
        """Take a request target apart; absolute addresses are accepted.

        Raises `ValueError` for one that is none.
        """
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return cls(method, parts.path, query, body)

    def need(self, name: str) -> str:
        """Return a query parameter, or refuse with 400."""
        value = self.query.get(name)
        if value is None:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"QueryString(\"'{name}' should be specified in query string\")",
            )
        return value

    def json(self) -> Mapping[str, object]:
        """Return the body as a JSON object, or refuse with 400."""
        if not self.body:
            raise Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"ParseBody({error})") from error
        if not isinstance(value, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "ParseBody(expected an object)")
        return value


def text(values: Mapping[str, object], key: str, default: str | None = None) -> str:
    """Return a text of a body, or refuse with 400; without a default it has to be there."""
    value = values.get(key, default)
    if value is None and key not in values:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"ParseBody(missing field `{key}`)")
    if not isinstance(value, str):
        raise Refusal(HTTPStatus.BAD_REQUEST, f"ParseBody({key}: expected a string)")
    if not is_plain(value):
        raise Refusal(HTTPStatus.BAD_REQUEST, f"ParseBody({key}: cannot be in a path)")
    return value


DONE = Answer(HTTPStatus.NO_CONTENT)


class Router(Generic[_D]):
    """A table of methods and paths, for one kind of daemon."""

    def __init__(self, routes: Mapping[tuple[str, str], Callable[[_D, Request], Answer]]) -> None:
        self._routes = routes
        self._paths = {path for _, path in routes}

    def answer(self, daemon: _D, request: Request) -> Answer:
        """Answer a request; errors become statuses, nothing is raised but what is a bug."""
        route = self._routes.get((request.method, request.path))
        try:
            if route is not None:
                if request.method == "GET" and request.body:
                    raise Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
                return route(daemon, request)
            if request.path not in self._paths:
                raise Refusal(HTTPStatus.NOT_FOUND, "NoRoute")
            if request.path == "/api/v1/mount":
                request.need("mountpoint")
            raise Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
        except Refusal as refusal:
            return refusal.answer
        except (NydusError, OSError) as error:
            message = {"code": "UNDEFINED", "message": str(error)}
            return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, message)
