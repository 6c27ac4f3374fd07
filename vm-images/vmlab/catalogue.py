"""The kernels that the lab knows, by the names that people type."""

from __future__ import annotations

from typing import NamedTuple

from vmlab.errors import LabError

__all__ = ["KERNELS", "Kernel", "find_kernel"]

VIRTIOFS = "virtiofs"
NINE_P = "9p"


class Kernel(NamedTuple):
    """A guest kernel: where Debian has it, and what it needs to reach its root.

    `metapackages` are tried in this order; the first that leads to a version of `series` is taken.
    `boot_modules` are loaded before there is a root, with all that they depend on, as far as they
    are modules; `rebuilt` ones replace Debian's and are loaded as well. `config` names the
    configuration of a kernel that is built from Debian's source.
    """

    name: str
    purpose: str
    series: str
    metapackages: tuple[str, ...]
    share: str
    boot_modules: tuple[str, ...]
    rebuilt: tuple[str, ...] = ()
    config: str = ""


_BOOT = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "overlay")
_CLOUD = (*_BOOT, "virtiofs")
_CLOUD_6_12 = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64")

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "ondemand",
            "6.12 with erofs and cachefiles built for reading on demand",
            "6.12",
            _CLOUD_6_12,
            VIRTIOFS,
            _CLOUD,
            ("cachefiles", "erofs"),
        ),
        Kernel("6.12", "Debian's, cloud flavour", "6.12", _CLOUD_6_12, VIRTIOFS, _CLOUD),
        Kernel(
            "6.12-generic",
            "Debian's, for real hardware as well; works without root",
            "6.12",
            ("linux-image-6.12-amd64", "linux-image-amd64"),
            NINE_P,
            ("crc32c_generic", *_BOOT, "9pnet_virtio", "9p"),
        ),
        Kernel(
            "6.1",
            "Debian 12's, cloud flavour",
            "6.1",
            ("linux-image-cloud-amd64",),
            VIRTIOFS,
            _CLOUD,
        ),
        Kernel(
            "guest",
            "small, all built in, with DM_INIT, as VM runtimes have it",
            "6.12",
            _CLOUD_6_12,
            VIRTIOFS,
            (),
            config="guest",
        ),
    )
}


def find_kernel(name: str) -> Kernel:
    """Return the kernel of that name; `LabError` names the known ones."""
    try:
        return KERNELS[name]
    except KeyError:
        raise LabError(f"no kernel is called {name!r}; known: {', '.join(KERNELS)}") from None
