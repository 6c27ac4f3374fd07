"""`extraoption`: how a snapshotter tells Kata to start nydusd for an image.

Source: spec vm-runtimes 2.1 (kata-types `mount.rs`, kata-containers `src/runtime`).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from erofs.layout import SUPERBLOCK_MAGIC, SUPERBLOCK_OFFSET
from kata.errors import OptionError
from kata.option import EXTRA_OPTION, Fields, decode_json, decode_option, encode_option
from kata.path import check_path
from kata.profile import Profile
from kata.volume import KataVirtualVolume, NydusImage, VolumeType

__all__ = ["NydusExtraOptions", "detect_fs_version"]

FS_VERSIONS = ("v5", "v6")
_EVERYBODY = (Profile.STRICT, Profile.LENIENT)
_V5_MAGIC = struct.pack("<II", 0x52414653, 0x500)
# The superblock and the extended one of RAFS have to be there.
_V6_BYTES = SUPERBLOCK_OFFSET + 128 + 256


def detect_fs_version(bootstrap: Path) -> str:
    """Return `v5` or `v6` for a bootstrap.

    Raises:
        OptionError: neither, or the file cannot be read.
    """
    try:
        with bootstrap.open("rb") as file:
            head = file.read(_V6_BYTES)
    except OSError as error:
        raise OptionError(f"cannot be read: {error.strerror}", path=bootstrap) from error
    if head.startswith(_V5_MAGIC):
        return "v5"
    magic = SUPERBLOCK_MAGIC.to_bytes(4, "little")
    if len(head) == _V6_BYTES and head[SUPERBLOCK_OFFSET:].startswith(magic):
        return "v6"
    raise OptionError("neither RAFS v5 nor v6", path=bootstrap)


@dataclass(frozen=True, slots=True)
class NydusExtraOptions:
    """What nydusd needs for one image.

    Args:
        source: path of the bootstrap on the host.
        config: nydusd's configuration as JSON text; may hold credentials.
        snapshot_dir: directory of the active snapshot, with `fs` and `work`.
        fs_version: `v5` or `v6`; Kata's Go runtime does not look at it.
    """

    source: str
    config: str = field(repr=False)
    snapshot_dir: str
    fs_version: str = "v6"

    @classmethod
    def decode(cls, option: str, profile: Profile = Profile.STRICT) -> NydusExtraOptions:
        """Decode and check a mount option, given with or without its prefix.

        Raises:
            OptionError: what is wrong, without showing the configuration.
        """
        fields = Fields(decode_option(EXTRA_OPTION, option), "extraoption")
        default = "" if profile is Profile.LENIENT else None
        options = cls(
            source=fields.text("source", default),
            config=fields.text("config", default),
            snapshot_dir=fields.text("snapshotdir", default),
            fs_version=fields.text("fs_version", default),
        )
        options.check(profile)
        return options

    @classmethod
    def find(
        cls, options: Iterable[str], profile: Profile = Profile.STRICT
    ) -> NydusExtraOptions | None:
        """Return what a mount's options hold; None when there is nothing.

        Kata's Go runtime takes the last one, its Rust runtime refuses a second one.
        """
        found = [option for option in options if option.startswith(EXTRA_OPTION)]
        if len(found) > 1 and profile is not Profile.LENIENT:
            raise OptionError("extraoption", expected="one", got=len(found))
        return cls.decode(found[-1], profile) if found else None

    def check(self, profile: Profile = Profile.STRICT) -> None:
        """Raise `OptionError` at the first broken rule."""
        check_path(self.source, "extraoption.source")
        check_path(self.snapshot_dir, "extraoption.snapshotdir")
        if not self.config:
            raise OptionError("extraoption.config is empty")
        if profile is not Profile.LENIENT and self.fs_version not in FS_VERSIONS:
            expected = " or ".join(FS_VERSIONS)
            got = ascii(self.fs_version[:32])
            raise OptionError("extraoption.fs_version", expected=expected, got=got)
        if profile is Profile.PRODUCER:
            decode_json(self.config.encode(errors="replace"), "extraoption.config")

    def as_json(self) -> dict[str, object]:
        """Return the JSON object with the keys in the order in which Go writes them."""
        return {
            "source": self.source,
            "config": self.config,
            "snapshotdir": self.snapshot_dir,
            "fs_version": self.fs_version,
        }

    def encode(self, profiles: Collection[Profile] = _EVERYBODY) -> str:
        """Return the mount option, which all readers have to accept; raise `OptionError`."""
        for profile in profiles:
            self.check(profile)
        return encode_option(EXTRA_OPTION, self.as_json())

    def as_volume(self) -> KataVirtualVolume:
        """Return the same as a virtual volume, as kata-types converts it."""
        version = self.fs_version.removeprefix("rafs")
        if version not in FS_VERSIONS:
            raise OptionError("extraoption.fs_version", got=ascii(self.fs_version[:32]))
        return KataVirtualVolume(
            VolumeType.IMAGE_NYDUS_FS,
            source=self.source,
            fs_type=f"rafs{version}",
            nydus_image=NydusImage(self.config, self.snapshot_dir),
        )
