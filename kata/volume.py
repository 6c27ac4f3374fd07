"""`io.katacontainers.volume`: the virtual volumes of Kata Containers.

Source: spec vm-runtimes 2.2 and 2.3 (kata-types `mount.rs`, nydus-snapshotter `pkg/label`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from kata.errors import OptionError
from kata.option import VOLUME_OPTION, Fields, decode_option, encode_option
from kata.path import check_path
from kata.profile import Profile
from kata.verity import DmVerity

__all__ = [
    "PLACEHOLDER",
    "KataVirtualVolume",
    "Metadata",
    "NydusImage",
    "VolumeType",
]

# The snapshotter's source where it knows no reference; kata-types refuses an empty one.
PLACEHOLDER = "dummy-image-reference"
_EVERYBODY = (Profile.PRODUCER, Profile.STRICT, Profile.LENIENT)


class VolumeType(Enum):
    """What a volume is for; the values are those of the JSON."""

    DIRECT_BLOCK = "direct_block"
    IMAGE_RAW_BLOCK = "image_raw_block"
    LAYER_RAW_BLOCK = "layer_raw_block"
    IMAGE_NYDUS_BLOCK = "image_nydus_block"
    LAYER_NYDUS_BLOCK = "layer_nydus_block"
    IMAGE_NYDUS_FS = "image_nydus_fs"
    LAYER_NYDUS_FS = "layer_nydus_fs"
    IMAGE_GUEST_PULL = "image_guest_pull"


_BLOCK_ONLY, _ANY_RAFS = ("rafsv6",), ("rafsv5", "rafsv6")
# The types with a `nydus_image`, and the filesystems that kata-types takes for them.
_NYDUS_FS_TYPES = {
    VolumeType.IMAGE_NYDUS_BLOCK: _BLOCK_ONLY,
    VolumeType.LAYER_NYDUS_BLOCK: _BLOCK_ONLY,
    VolumeType.IMAGE_NYDUS_FS: _ANY_RAFS,
    VolumeType.LAYER_NYDUS_FS: _ANY_RAFS,
}


@dataclass(frozen=True, slots=True)
class Metadata:
    """`direct_volume` and `image_pull`: an object with texts by name.

    `values` is None where the object has no metadata: kata-types leaves an empty map out,
    Kata's Go code refuses it then. Ours always writes it.
    """

    values: dict[str, str] | None = field(default_factory=dict)

    @classmethod
    def from_fields(cls, fields: Fields | None) -> Metadata | None:
        """Decode the object, if it is there."""
        return None if fields is None else cls(fields.mapping("metadata"))

    def as_json(self) -> dict[str, object]:
        """Return the JSON object, its keys sorted as Go sorts them."""
        return {"metadata": dict(sorted((self.values or {}).items()))}


@dataclass(frozen=True, slots=True)
class NydusImage:
    """`nydus_image`: nydusd's configuration, which may hold credentials, and a directory."""

    config: str = field(default="", repr=False)
    snapshot_dir: str = ""

    @classmethod
    def from_fields(cls, fields: Fields | None) -> NydusImage | None:
        """Decode the object, if it is there."""
        if fields is None:
            return None
        return cls(fields.text("config", ""), fields.text("snapshot_dir", ""))

    def as_json(self) -> dict[str, object]:
        """Return the JSON object; Go writes both keys always."""
        return {"config": self.config, "snapshot_dir": self.snapshot_dir}


@dataclass(frozen=True, slots=True)
class KataVirtualVolume:
    """One virtual volume; an image or a layer that Kata attaches in its own way.

    Args:
        volume_type: decides how the rest is read.
        source: path of a device, disk or bootstrap; reference of an image for guest pull.
        fs_type: filesystem inside.
        options: mount options.
        direct_volume, image_pull: names and texts for the type of the same name.
        nydus_image: for the Nydus types.
        dm_verity: for disks.
    """

    volume_type: VolumeType
    source: str = ""
    fs_type: str = ""
    options: tuple[str, ...] = ()
    direct_volume: Metadata | None = None
    image_pull: Metadata | None = None
    nydus_image: NydusImage | None = None
    dm_verity: DmVerity | None = None

    @classmethod
    def from_fields(cls, fields: Fields) -> KataVirtualVolume:
        """Decode the JSON object without checking any profile; raise `OptionError`."""
        name = fields.text("volume_type")
        try:
            volume_type = VolumeType(name)
        except ValueError as error:
            raise OptionError("volume_type is unknown", got=ascii(name[:64])) from error
        verity = fields.child("dm_verity")
        return cls(
            volume_type=volume_type,
            source=fields.text("source", ""),
            fs_type=fields.text("fs_type", ""),
            options=fields.texts("options"),
            direct_volume=Metadata.from_fields(fields.child("direct_volume")),
            image_pull=Metadata.from_fields(fields.child("image_pull")),
            nydus_image=NydusImage.from_fields(fields.child("nydus_image")),
            dm_verity=None if verity is None else DmVerity.from_fields(verity),
        )

    @classmethod
    def decode(cls, option: str, profile: Profile = Profile.STRICT) -> KataVirtualVolume:
        """Decode and check a mount option, given with or without its prefix.

        Raises:
            OptionError: what is wrong, without showing values that may be secret.
        """
        volume = cls.from_fields(Fields(decode_option(VOLUME_OPTION, option)))
        volume.check(profile)
        return volume

    def as_json(self) -> dict[str, object]:
        """Return the JSON object with the keys in the order in which Go writes them."""
        value: dict[str, object] = {"volume_type": self.volume_type.value}
        if self.source:
            value["source"] = self.source
        if self.fs_type:
            value["fs_type"] = self.fs_type
        if self.options:
            value["options"] = list(self.options)
        parts = (
            ("direct_volume", self.direct_volume),
            ("image_pull", self.image_pull),
            ("nydus_image", self.nydus_image),
            ("dm_verity", self.dm_verity),
        )
        for key, part in parts:
            if part is not None:
                value[key] = part.as_json()
        return value

    def encode(self, profiles: Collection[Profile] = _EVERYBODY) -> str:
        """Return the mount option, which all readers have to accept.

        Args:
            profiles: whose rules are checked before.

        Raises:
            OptionError: a rule is broken.
        """
        for profile in profiles:
            self.check(profile)
        return encode_option(VOLUME_OPTION, self.as_json())

    @property
    def is_placeholder(self) -> bool:
        """Whether this is a guest pull that says nothing about its image.

        The recorded snapshotter answers so to `Mounts`, whatever `Prepare` has said.
        """
        if self.volume_type is not VolumeType.IMAGE_GUEST_PULL:
            return False
        return self.source == PLACEHOLDER and not (self.image_pull and self.image_pull.values)

    @property
    def is_stray(self) -> bool:
        """Whether this is the disk of no layer, which the recorded snapshotter puts first in views.

        Its name is `.layer.disk` where a blob id belongs in front.
        """
        layer = self.volume_type is VolumeType.LAYER_RAW_BLOCK
        return layer and self.source.rpartition("/")[2] == ".layer.disk"

    def check(self, profile: Profile = Profile.STRICT) -> None:
        """Raise `OptionError` at the first broken rule of a profile (spec vm-runtimes 2.3)."""
        if self.dm_verity is not None:
            self.dm_verity.check(profile)
        if self.source and self.volume_type is not VolumeType.IMAGE_GUEST_PULL:
            check_path(self.source, "source")
        if self.nydus_image is not None and self.nydus_image.snapshot_dir:
            check_path(self.nydus_image.snapshot_dir, "nydus_image.snapshot_dir")
        if profile is Profile.STRICT:
            self._check_strict()
        elif profile is Profile.PRODUCER:
            self._check_producer()
        else:
            self._check_lenient()

    def _check_strict(self) -> None:
        self._need(bool(self.source), "source is empty")
        if self.volume_type is VolumeType.IMAGE_GUEST_PULL:
            return
        self._need(bool(self.fs_type), "fs_type is empty")
        expected = _NYDUS_FS_TYPES.get(self.volume_type)
        if expected is None:
            return
        if self.fs_type not in expected:
            got = ascii(self.fs_type[:32])
            raise OptionError("fs_type", expected=" or ".join(expected), got=got)
        image = self.nydus_image or NydusImage()
        self._need(bool(image.config), "nydus_image.config is empty")
        self._need(bool(image.snapshot_dir), "nydus_image.snapshot_dir is empty")

    def _check_producer(self) -> None:
        if self.volume_type is VolumeType.IMAGE_GUEST_PULL:
            self._need_metadata(self.image_pull, "image_pull")
            return
        self._need(bool(self.source), "source is empty")
        if self.volume_type is VolumeType.DIRECT_BLOCK:
            self._need_metadata(self.direct_volume, "direct_volume")
        elif self.volume_type in _NYDUS_FS_TYPES:
            self._need_image()

    def _check_lenient(self) -> None:
        if self.direct_volume is not None:
            self._need_metadata(self.direct_volume, "direct_volume")
        if self.image_pull is not None:
            self._need_metadata(self.image_pull, "image_pull")
        if self.nydus_image is not None:
            self._need_image()

    def _need_metadata(self, part: Metadata | None, name: str) -> None:
        self._need(part is not None and part.values is not None, f"{name}.metadata is missing")

    def _need_image(self) -> None:
        image = self.nydus_image or NydusImage()
        self._need(
            bool(image.config or image.snapshot_dir),
            "nydus_image has neither config nor snapshot_dir",
        )

    def _need(self, there: bool, what: str) -> None:
        if not there:
            raise OptionError(f"{self.volume_type.value}: {what}")
