"""Convinces a registry: answers its challenges, and keeps the token it gets (tools 5.1).

One fetch of a token serves all threads. A token is renewed ahead of its end by the request that
comes first then; all others go on with the old one.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from fscache.backend.base import AuthError, BackendError, Unavailable
from fscache.backend.challenge import Challenge, Token, choose_challenge, parse_token
from fscache.backend.sender import Sender, host_of, split_address
from fscache.backend.settings import Credentials

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["Authorizer"]

logger = logging.getLogger(__name__)

CLIENT_ID = "nydus-registry-client"
ANSWER_LIMIT = 1 << 20
FIRST_BACKOFF = 5.0
MAX_BACKOFF = 600.0


class Authorizer:
    """The Authorization header for one repository; safe for many threads.

    Args:
        sender: asks the token service.
        repo: for a challenge that names no scope.
        credentials: None for anonymous access.
        registry_token: a bearer token that is used as it is; nothing is asked for then.
        headers: added to requests to the token service.
        actions: for a challenge that names no scope.
        more_scopes: asked for beside that of the challenge.
    """

    def __init__(
        self,
        sender: Sender,
        repo: str,
        credentials: Credentials | None,
        registry_token: str = "",
        headers: Mapping[str, str] | None = None,
        *,
        actions: str = "pull",
        more_scopes: Sequence[str] = (),
    ) -> None:
        self._sender = sender
        self._scope = f"repository:{repo}:{actions}"
        self._more_scopes = tuple(more_scopes)
        self._credentials = credentials
        self._fixed = f"Bearer {registry_token}" if registry_token else None
        self._headers = headers or {}
        self._lock = threading.Lock()
        self._token: Token | None = None
        self._challenge: Challenge | None = None
        self._flight: Future[Token] | None = None
        self._backoff = 0.0
        self._quiet_until = 0.0

    def set_credentials(self, credentials: Credentials | None) -> None:
        """Use other credentials from now on; what the old ones brought is dropped.

        So is a token that was given with the configuration: nobody renews it.
        """
        with self._lock:
            self._credentials = credentials
            if credentials is not None:
                self._fixed = None
            self._token = self._challenge = self._flight = None
            self._backoff = self._quiet_until = 0.0

    def current(self, deadline: float) -> str | None:
        """Return the header for a request, None before the first challenge.

        Raises:
            BackendError: the token has ended and there is no new one.
        """
        if self._fixed is not None:
            return self._fixed
        now = time.monotonic()
        with self._lock:
            token, challenge = self._token, self._challenge
            renewing = self._flight is not None or now < self._quiet_until
        if token is None:
            return None
        if now < token.renew_at or challenge is None:
            return token.authorization
        if now >= token.expires_at:
            return self._obtain(challenge, token.authorization, deadline)[0].authorization
        if renewing:
            return token.authorization
        try:
            return self._obtain(challenge, token.authorization, deadline)[0].authorization
        except BackendError as error:
            self._back_off()
            logger.warning("token is not renewed ahead of its end: %s", error)
            return token.authorization

    def refused(self, used: str | None, answer: Answer, deadline: float) -> tuple[str, bool] | None:
        """Return another header after a 401, and whether it is a new one.

        Args:
            used: the header that was refused.
            answer: the 401 with its challenge.
            deadline: of `time.monotonic`.

        Returns:
            None when there is nothing else to try.

        Raises:
            BackendError: a token could not be had.
        """
        if self._fixed is not None:
            return None
        challenge = choose_challenge(answer.headers.get_all("WWW-Authenticate") or [])
        if challenge is None:
            return None
        if challenge.scheme == "basic":
            return self._basic(used)
        realm = challenge.parameters["realm"]
        split_address(realm, "realm of the registry")
        if self._credentials and answer.url.startswith("https:") and realm.startswith("http:"):
            raise AuthError("registry asks for a password without TLS, though it has TLS itself")
        token, new = self._obtain(challenge, used, deadline)
        return token.authorization, new

    def _basic(self, used: str | None) -> tuple[str, bool] | None:
        with self._lock:
            if self._credentials is None or self._credentials.identity_token:
                return None
            if self._credentials.basic == used:
                return None
            self._token = Token(self._credentials.basic)
            return self._token.authorization, True

    def _back_off(self) -> None:
        with self._lock:
            self._backoff = min(max(self._backoff * 2, FIRST_BACKOFF), MAX_BACKOFF)
            self._quiet_until = time.monotonic() + self._backoff

    def _obtain(
        self, challenge: Challenge, used: str | None, deadline: float
    ) -> tuple[Token, bool]:
        """Return another token than `used`, and whether this call fetched it.

        Joins a fetch that is under way.
        """
        with self._lock:
            if self._token is not None and self._token.authorization != used:
                return self._token, False
            flight = self._flight
            mine = flight is None
            if flight is None:
                flight = self._flight = Future()
            credentials = self._credentials
        if not mine:
            return _join(flight, deadline), False
        try:
            token = self._fetch(challenge, credentials, deadline)
        except BaseException as error:
            self._land(flight)
            flight.set_exception(error)
            raise
        self._land(flight, token, challenge)
        flight.set_result(token)
        return token, True

    def _land(
        self, flight: Future[Token], token: Token | None = None, challenge: Challenge | None = None
    ) -> None:
        with self._lock:
            if self._flight is not flight:
                return  # the credentials were replaced meanwhile
            self._flight = None
            if token is not None:
                self._token, self._challenge = token, challenge
                if token.identity_token and self._credentials and self._credentials.identity_token:
                    self._credentials = self._credentials._replace(
                        identity_token=token.identity_token
                    )
                self._backoff = self._quiet_until = 0.0

    def _fetch(
        self, challenge: Challenge, credentials: Credentials | None, deadline: float
    ) -> Token:
        """Ask the token service: by POST form, then by GET; raise `BackendError`."""
        realm = challenge.parameters["realm"]
        scopes = (challenge.parameters.get("scope", self._scope), *self._more_scopes)
        query = {
            "service": challenge.parameters.get("service", ""),
            "scope": " ".join(scopes),
            "client_id": CLIENT_ID,
        }
        if not query["service"]:
            del query["service"]
        headers = dict(self._headers)
        if credentials is not None and credentials.identity_token:
            # OAuth2: it is no password, so nothing else could be asked.
            form = {
                **query,
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
            }
            return self._ask("POST", realm, headers, deadline, urlencode(form).encode())
        if credentials is not None:
            form = {
                **query,
                "grant_type": "password",
                "username": credentials.username,
                "password": credentials.password,
            }
            try:
                return self._ask("POST", realm, headers, deadline, urlencode(form).encode())
            except AuthError as error:
                logger.debug("token service gives nothing by POST (%s), trying GET", error)
            headers["Authorization"] = credentials.basic
        joint = "&" if "?" in realm else "?"
        # Several are one word in a form, and a parameter each in an address.
        pairs = [("scope", scopes[0]) if pair[0] == "scope" else pair for pair in query.items()]
        pairs += [("scope", scope) for scope in self._more_scopes]
        return self._ask("GET", f"{realm}{joint}{urlencode(pairs)}", headers, deadline)

    def _ask(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        deadline: float,
        body: bytes | None = None,
    ) -> Token:
        if body is not None:
            headers = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
        begin = time.monotonic()
        with self._sender.send(method, url, headers, deadline, body) as answer:
            if answer.status != 200:
                raise _service_error(answer)
            text = answer.read_all(ANSWER_LIMIT, deadline)
        chance = random.random()  # noqa: S311 - spreads renewals
        return parse_token(text, begin, chance)


def _service_error(answer: Answer) -> BackendError:
    what = f"token service {host_of(answer.url)} gives no token"
    got = f"status {answer.status}"
    # 501 is the answer of a service that knows no POST.
    if answer.status in (408, 429) or (answer.status >= 500 and answer.status != 501):
        return Unavailable(what, temporary=True, retry_after=answer.retry_after(), got=got)
    return AuthError(what, got=got)


def _join(flight: Future[Token], deadline: float) -> Token:
    """Return the token that another thread fetches; raise `BackendError`."""
    try:
        error = flight.exception(max(0.0, deadline - time.monotonic()))
    except TimeoutError as late:
        raise Unavailable("no token in time", temporary=True) from late
    if isinstance(error, BackendError):
        raise error.again() from error
    if error is not None:
        raise Unavailable("fetching a token was broken off", temporary=True) from error
    return flight.result()
