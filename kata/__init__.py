"""What snapshotters and Kata Containers tell each other: options, volumes, mount lists, disks.

Nothing here mounts or starts anything. Stands on `erofs` alone, but for bundles (`kata.bundle`),
which are built. Source: spec vm-runtimes 2 and 3.
"""

from kata.errors import OptionError
from kata.extraoption import NydusExtraOptions
from kata.profile import Profile
from kata.verity import DmVerity, parse_verity
from kata.volume import KataVirtualVolume, Metadata, NydusImage, VolumeType

__all__ = [
    "DmVerity",
    "KataVirtualVolume",
    "Metadata",
    "NydusExtraOptions",
    "NydusImage",
    "OptionError",
    "Profile",
    "VolumeType",
    "parse_verity",
]
