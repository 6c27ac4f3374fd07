"""Words of a guest kernel's command line for a root that dm-verity checks.

Source: spec vm-runtimes 6.2; Linux `Documentation/admin-guide/device-mapper/dm-init.rst`.
"""

from __future__ import annotations

from kata.errors import OptionError

__all__ = ["plain_root", "verity_root"]

_DEVICE = "/dev/dm-0"
_FILESYSTEM = "erofs"


def plain_root(device: str) -> str:
    """Return the words for a root that nobody checks."""
    return f"root={device} rootflags=ro rootfstype={_FILESYSTEM}"


def verity_root(table: str, *, wait_for: str = "") -> str:
    """Return the words for a root behind a verity device, which needs `CONFIG_DM_INIT`.

    Args:
        table: of the device mapper, one line (`DmVerity.table`).
        wait_for: device that has to be there first (Linux 6.5), for drivers that find it late.

    Raises:
        OptionError: a table that cannot be quoted.
    """
    if '"' in table or not table.isprintable():
        raise OptionError("a table without quotes and control characters is needed")
    waiting = f" dm-mod.waitfor={wait_for}" if wait_for else ""
    return f'dm-mod.create="dm-verity,,,ro,{table}"{waiting} {plain_root(_DEVICE)}'
