"""The kernel's NBD client over generic netlink: attach sockets, replace them, detach.

Each call is one message on a socket of its own. Import this where it is used: pyroute2 takes
long to load. Source: Linux `include/uapi/linux/nbd-netlink.h`, `drivers/block/nbd.c`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket, GenericNetlinkSocket

from fscache.nbd.errors import DeviceError

__all__ = ["ClientFlags", "connect", "disconnect", "message", "reconfigure", "require_family"]

_FAMILY = "nbd"
_VERSION = 1


class ClientFlags(IntFlag):
    """What the kernel does by itself (`NBD_CFLAG_*`)."""

    DISCONNECT_ON_CLOSE = 1 << 1


class _Command(IntEnum):
    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3


class message(genlmsg):  # type: ignore[misc]  # noqa: N801 -- pyroute2 has no types; its names
    """A message of the family `nbd`."""

    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "hex"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]  # noqa: N801
        """A list of sockets."""

        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]  # noqa: N801
            """One socket, by its descriptor in the process that sends."""

            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))


class _AsyncSocket(AsyncGenericNetlinkSocket):  # type: ignore[misc]
    # Whoever calls tells it.
    module_err_level = "debug"


class _Socket(GenericNetlinkSocket):  # type: ignore[misc]
    async_class = _AsyncSocket


def _attributes(values: dict[str, object]) -> list[list[object]]:
    return [[f"NBD_ATTR_{name}", value] for name, value in values.items() if value is not None]


def _sockets(descriptors: Sequence[int]) -> dict[str, object]:
    return {
        "attrs": [["NBD_SOCK_ITEM", {"attrs": [["NBD_SOCK_FD", fd]]}] for fd in descriptors],
    }


def _call(command: _Command, values: dict[str, object]) -> list[Any]:
    """Send a message and return the answers; raise `DeviceError`."""
    request = message()
    request["cmd"], request["version"] = int(command), _VERSION
    request["attrs"] = _attributes(values)
    try:
        with _Socket() as channel:
            channel.bind(_FAMILY, message)
            flags = NLM_F_REQUEST | NLM_F_ACK
            return list(channel.nlm_request(request, msg_type=channel.prid, msg_flags=flags))
    except NetlinkError as error:
        code = error.code or errno.EIO
        if code == errno.ENOENT:
            raise DeviceError("the kernel has no NBD (modprobe nbd)", errno.ENODEV) from error
        raise DeviceError(
            f"the kernel's NBD refuses to {command.name.lower()} ({os.strerror(code)})", code
        ) from error
    except OSError as error:
        code = error.errno or errno.EIO
        raise DeviceError(f"no generic netlink ({error.strerror})", code) from error


def require_family() -> None:
    """Raise `DeviceError` unless the kernel has NBD; its module is loaded if need be."""
    try:
        with _Socket() as channel:
            channel.bind(_FAMILY, message)
    except (NetlinkError, OSError) as error:
        raise DeviceError("the kernel has no NBD (modprobe nbd)", errno.ENODEV) from error


def connect(
    index: int | None,
    sockets: Sequence[int],
    *,
    size: int,
    block_size: int,
    flags: int,
    identifier: str,
    timeout: int,
    dead_timeout: int,
) -> int:
    """Attach sockets to a device and return its number.

    Args:
        index: of the device; None for a free one, which is made if there is none.
        sockets: descriptors of connected stream sockets; they stay the caller's.
        size, block_size: of the device, in bytes.
        flags: what a server tells of its export.
        identifier: has to be repeated by `reconfigure` (Linux 5.14).
        timeout: seconds after which a request is sent again over another connection.
        dead_timeout: seconds for which requests wait when there is no connection left.

    Raises:
        DeviceError: `EBUSY` when the device is in use.
    """
    answers = _call(
        _Command.CONNECT,
        {
            "INDEX": index,
            "SIZE_BYTES": size,
            "BLOCK_SIZE_BYTES": block_size,
            "TIMEOUT": timeout,
            "SERVER_FLAGS": flags,
            "SOCKETS": _sockets(sockets),
            "DEAD_CONN_TIMEOUT": dead_timeout,
            "BACKEND_IDENTIFIER": identifier,
        },
    )
    for answer in answers:
        found = answer.get_attr("NBD_ATTR_INDEX")
        if isinstance(found, int):
            return found
    raise DeviceError("the kernel's NBD does not tell which device it took")


def reconfigure(
    index: int,
    *,
    identifier: str,
    sockets: Sequence[int] = (),
    client_flags: ClientFlags | None = None,
) -> None:
    """Put sockets in the place of dead ones, as many as there are, or set what the kernel does.

    Raises:
        DeviceError: `EINVAL` when the device is not attached, or with another identifier.
    """
    values: dict[str, object] = {"INDEX": index, "BACKEND_IDENTIFIER": identifier}
    if sockets:
        values["SOCKETS"] = _sockets(sockets)
    if client_flags is not None:
        values["CLIENT_FLAGS"] = int(client_flags)
    _call(_Command.RECONFIGURE, values)


def disconnect(index: int) -> None:
    """Detach a device; raise `DeviceError`."""
    _call(_Command.DISCONNECT, {"INDEX": index})
