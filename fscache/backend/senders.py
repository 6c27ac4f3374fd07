"""The way a backend's configuration asks its requests to go: direct, by a proxy, by mirrors."""

from __future__ import annotations

from fscache.backend.base import BackendError
from fscache.backend.direct import DirectSender
from fscache.backend.sender import Sender
from fscache.backend.settings import NetworkConfig

__all__ = ["open_sender"]


def open_sender(config: NetworkConfig, host: str) -> Sender:
    """Return the sender for a backend; nothing is connected yet, the caller closes it.

    Args:
        config: of the backend.
        host: `host[:port]` that mirrors stand for.

    Raises:
        BackendError: an address that is none, unreadable certificates, proxy and mirrors.
    """
    if config.proxy is not None and config.mirrors:
        raise BackendError("proxy and mirrors cannot be used together")
    direct = DirectSender(config)
    if config.proxy is not None:
        from fscache.backend.proxy import ProxySender

        return ProxySender(config, config.proxy, direct)
    if config.mirrors:
        from fscache.backend.mirrors import MirrorSender

        return MirrorSender(config.mirrors, host, direct, DirectSender)
    return direct
