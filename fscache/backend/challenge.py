"""WWW-Authenticate and the answers of token services, as values; no I/O (tools 5.1)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from erofs.values import Value, field
from fscache.backend.base import AuthError

__all__ = ["Challenge", "Token", "choose_challenge", "parse_challenges", "parse_token"]

DEFAULT_LIFE = 600.0
# What a service may claim at most; a token that lives longer is renewed then.
MAX_LIFE = 30 * 24 * 3600.0
RENEW_AHEAD = 20.0
MAX_LEAD = 300.0

_TOKEN_TEXT = re.compile(r"[\x21-\x7e]{1,65536}")
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# A scheme, or a parameter with its value; what a comma separates may be either.
_ITEM = re.compile(
    rf'\s*,?\s*(?:(?P<name>{_WORD})\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>{_WORD}))'
    rf"|(?P<scheme>{_WORD})(?=[\s,]|$))"
)


class Challenge(Value):
    """How a server wants to be convinced: scheme in small letters, parameters."""

    scheme: str
    parameters: dict[str, str]


class Token(Value):
    """A bearer token; times in seconds of the clock of whoever keeps it.

    Args:
        authorization: value of the Authorization header.
        renew_at: when a new one should be asked for.
        expires_at: when it ends.
        identity_token: what the service wants to see next time, empty for the same as before.
    """

    authorization: str = field(repr=False)
    renew_at: float = float("inf")
    expires_at: float = float("inf")
    identity_token: str = field(default="", repr=False)


def parse_challenges(text: str) -> list[Challenge]:
    """Return the challenges of one header line; what cannot be read ends the list."""
    found: list[Challenge] = []
    position = 0
    while match := _ITEM.match(text, position):
        position = match.end()
        if match["scheme"]:
            found.append(Challenge(match["scheme"].lower(), {}))
        elif found:
            quoted = match["quoted"]
            value = match["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            found[-1].parameters[match["name"].lower()] = value
    return found


def choose_challenge(lines: Iterable[str]) -> Challenge | None:
    """Return the challenge to answer: Bearer with a realm, else Basic, else None."""
    challenges = [challenge for line in lines for challenge in parse_challenges(line)]
    for challenge in challenges:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return challenge
    return next((found for found in challenges if found.scheme == "basic"), None)


def parse_token(body: bytes, now: float, chance: float) -> Token:
    """Return the token of a service's answer.

    Args:
        body: the answer.
        now: when it was asked for.
        chance: 0 to 1, spreads renewals of many clients.

    Raises:
        AuthError: no token in it; the body is not quoted.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise AuthError("answer of the token service is not JSON") from error
    if not isinstance(values, dict):
        raise AuthError("answer of the token service is not an object")
    text = values.get("token") or values.get("access_token")
    if not isinstance(text, str) or not _TOKEN_TEXT.fullmatch(text):
        raise AuthError("answer of the token service has no token")
    life = values.get("expires_in")
    if isinstance(life, bool) or not isinstance(life, (int, float)) or not life > 0:
        life = DEFAULT_LIFE
    life = float(min(life, MAX_LIFE))
    # A token of a few seconds keeps most of its life.
    ahead = min(RENEW_AHEAD, life / 4) + chance * min(life / 10, MAX_LEAD)
    identity = values.get("refresh_token")
    if not isinstance(identity, str) or not _TOKEN_TEXT.fullmatch(identity):
        identity = ""
    return Token(f"Bearer {text}", now + life - ahead, now + life, identity)
