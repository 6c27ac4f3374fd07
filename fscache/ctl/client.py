"""Asks one nydusd over the unix socket of its API (tools section 7); standard library only.

Here are connection, limits and decoding, and every failure as one sentence. What is asked
belongs to `fscache.ctl.command`, what an answer means to `fscache.ctl.text`.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
from typing import NoReturn
from urllib.parse import quote

from erofs.errors import NydusError, error_context
from fscache.ctl.text import AnswerError, request_failed_text

__all__ = ["BODY_LIMIT", "ApiClient", "CtlError"]

TIMEOUT_SECONDS = 120.0
BODY_LIMIT = 51_200
ANSWER_LIMIT = 16 << 20
NESTING_LIMIT = 128
SHOWN_BYTES = 200


class CtlError(NydusError):
    """The daemon cannot be asked, or did not answer with success."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("number out of range")
    return number


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(NESTING_LIMIT):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _decode(body: bytes) -> object:
    """Return the JSON value of a body; raise `ValueError` for anything else."""
    try:
        value: object = json.loads(body.decode(), parse_float=_finite, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _is_too_deep(value):
        raise ValueError("nested too deeply")
    return value


def _exchange(
    connection: _Connection, method: str, target: str, body: bytes | None
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one request and close the connection; raise `CtlError` for a failure of transport."""
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        answer = response.read(ANSWER_LIMIT + 1)
    except FileNotFoundError as error:
        raise CtlError("there is no such API socket; does the daemon run?") from error
    except ConnectionRefusedError as error:
        raise CtlError("no daemon listens on this API socket (connection refused)") from error
    except TimeoutError as error:
        raise CtlError(f"the daemon gave no answer for {connection.timeout:g} seconds") from error
    except (ConnectionResetError, BrokenPipeError) as error:
        raise CtlError("the daemon closed the connection without an answer") from error
    except http.client.HTTPException as error:
        raise CtlError(f"not an HTTP answer ({type(error).__name__})") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise CtlError(f"the API socket cannot be used ({reason})") from error
    finally:
        connection.close()
    if len(answer) > ANSWER_LIMIT:
        raise CtlError(f"the daemon's answer has more than {ANSWER_LIMIT} bytes")
    if response.length:
        raise CtlError("the daemon's answer broke off")
    return response, answer


class ApiClient:
    """Asks the daemon behind one API socket, over a new connection each time.

    Args:
        path: the unix socket.
        timeout: seconds to wait for the next bytes of an answer.
    """

    def __init__(self, path: str, timeout: float = TIMEOUT_SECONDS) -> None:
        self._path = path
        self._timeout = timeout

    def request(
        self,
        method: str,
        target: str,
        query: dict[str, str] | None = None,
        body: dict[str, str] | None = None,
    ) -> object:
        """Return the JSON value of the answer, None when it has no body.

        Raises:
            CtlError: the daemon cannot be reached or refuses.
            AnswerError: the answer is not JSON.
        """
        if query:
            # The original sends names as they are, and "&", "#" or a blank go astray.
            pairs = (f"{key}={quote(value, '/', errors='surrogateescape')}"
                     for key, value in query.items())  # fmt: skip
            target += "?" + "&".join(pairs)
        sent = None if body is None else _encode(body)
        with error_context(path=self._path):
            connection = _Connection(self._path, self._timeout)
            response, answer = _exchange(connection, method, target, sent)
        if not 200 <= response.status < 300:
            raise _failure(response.status, answer)
        if not answer:
            if method == "GET":
                raise AnswerError("the daemon's answer is empty", path=self._path)
            return None
        try:
            return _decode(answer)
        except ValueError as error:
            raise AnswerError("the daemon's answer is not JSON", path=self._path) from error


def _encode(body: dict[str, str]) -> bytes:
    try:
        sent = json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CtlError("arguments of a request have to be UTF-8") from error
    if len(sent) > BODY_LIMIT:
        raise CtlError("the request is too large", expected=f"<= {BODY_LIMIT} bytes", got=len(sent))
    return sent


def _failure(status: int, body: bytes) -> CtlError:
    try:
        return CtlError(request_failed_text(_decode(body)))
    except ValueError:
        shown = f", {ascii(body[:SHOWN_BYTES])[1:]}" if body else ""
        return CtlError(f"Request failed. HTTP status {status}{shown}")
