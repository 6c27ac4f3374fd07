"""Words for TCP addresses to listen on."""

from __future__ import annotations

__all__ = ["parse_address"]

LOOPBACK = "127.0.0.1"


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `[HOST:]PORT`, by default on loopback; IPv6 as `[::1]:9100`.

    Raises `ValueError`.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 0xFFFF:
        raise ValueError(f"expected [ADDRESS:]PORT, got {text!r}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"expected an IPv6 address in brackets, got {text!r}")
    return host or LOOPBACK, int(port)
