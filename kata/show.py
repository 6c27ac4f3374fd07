"""Find options in text, and show what they hold without what is secret.

Source: spec vm-runtimes 2.1 to 2.3; what is secret: tools 4.4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from kata.errors import OptionError
from kata.extraoption import NydusExtraOptions
from kata.option import EXTRA_OPTION, VOLUME_OPTION
from kata.profile import Profile
from kata.volume import KataVirtualVolume

__all__ = ["decode_any", "describe", "find_options", "masked"]

MAX_TEXT_BYTES = 4 << 20
HIDDEN = "***"
_PREFIXES = (EXTRA_OPTION, VOLUME_OPTION)
_SECRET_NAME = re.compile(
    r"auth|token|secret|pass|key|user|header|credential|cookie", re.IGNORECASE
)
# User and password in front of a host, and what follows a question mark.
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]*@|\?\S*")
_MAX_DEPTH = 64


def find_options(text: str) -> list[str]:
    """Return the options of a text: a mount's `-o`, several lines, or JSON like `ctr` prints.

    Raises:
        OptionError: there is none, or the text is too long.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise OptionError("text with options", expected=f"at most {MAX_TEXT_BYTES} bytes")
    # Neither quotes of JSON nor commas of an option list occur in base64.
    words = re.split(r"[\s,\"'\[\]{}]+", text)
    options = [word for word in words if word.startswith(_PREFIXES)]
    if not options:
        raise OptionError(f"neither {EXTRA_OPTION}… nor {VOLUME_OPTION}… in the text")
    return options


def decode_any(option: str, profile: Profile) -> NydusExtraOptions | KataVirtualVolume:
    """Decode and check an option of either kind; raise `OptionError`."""
    if option.startswith(EXTRA_OPTION):
        return NydusExtraOptions.decode(option, profile)
    return KataVirtualVolume.decode(option, profile)


def masked(value: object, name: str = "", depth: int = 0) -> object:
    """Return a copy of decoded JSON with stars for texts under names of secrets.

    JSON inside of a text is decoded; what is not JSON there is hidden.
    """
    if depth > _MAX_DEPTH:
        return HIDDEN
    secret = bool(_SECRET_NAME.search(name))
    if isinstance(value, dict):
        # Below a name of a secret everything is one.
        return {
            str(key): masked(item, f"{name} {key}" if secret else str(key), depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [masked(item, name, depth + 1) for item in value]
    if not isinstance(value, str) or not value:
        return HIDDEN if secret and value else value
    if name == "config":
        return _masked_config(value, depth)
    if secret:
        return HIDDEN
    key, equals, rest = value.partition("=")
    if equals and rest and _SECRET_NAME.search(key):
        return f"{key}={HIDDEN}"
    return _IN_ADDRESS.sub(HIDDEN, value)


def _masked_config(text: str, depth: int) -> object:
    try:
        return masked(json.loads(text), "", depth + 1)
    except (ValueError, RecursionError):
        return HIDDEN


def describe(options: list[str], profile: Profile, *, reveal: bool) -> Iterator[dict[str, object]]:
    """Give each option as an object of its name and its value; raise `OptionError`."""
    for option in options:
        value: object = decode_any(option, profile).as_json()
        yield {
            "option": option.partition("=")[0],
            "value": value if reveal else masked(value),
        }
