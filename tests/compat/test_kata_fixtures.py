"""Mount lists and options recorded from the real snapshotter: read, and written as they should be.

K1 and K2 of spec vm-runtimes 7.3 on fixtures/snapshotter-nydusd; where the recorded snapshotter
is wrong (section 3.2 to 3.4), both its list and the right one are read, the right one is written.
"""

import json

import pytest

from kata import KataVirtualVolume, NydusExtraOptions, Profile, VolumeType, parse_verity
from kata.cli import main
from kata.guestpull import guest_pull_volume
from kata.mounts import Disk, Mount, Snapshot, disk_volumes, nydus_mounts
from kata.option import EXTRA_OPTION
from kata.rootfs import is_nydus_type, read_rootfs
from tests.fixtures_path import FIXTURES, needs_fixtures

pytestmark = needs_fixtures

RECORDED = FIXTURES / "snapshotter-nydusd"
ROOT = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus"
FOLDERS = sorted(path.parent.name for path in RECORDED.glob("kata-*/mounts.json"))
FILLED = [name for name in FOLDERS if (RECORDED / name / "mounts.json").stat().st_size > 3]
CALLS = ("Prepare", "Mounts of the active snapshot", "View", "Mounts of the view")
LABELS = "containerd.io/snapshot/"


def recorded(folder):
    """Return the mounts of a folder by the call that answered them."""
    entries = json.loads((RECORDED / folder / "mounts.json").read_text())
    return {
        entry["call"]: Mount(entry["type"], entry["source"], tuple(entry["options"]))
        for entry in entries
    }


def options_of(folder):
    """Return pairs of an option and its JSON text."""
    blocks = (RECORDED / folder / "raw-options.txt").read_text().split("\n\n")
    return [tuple(block.split("\n")) for block in blocks if block]


ALL_OPTIONS = [
    (folder, *pair[:2])
    for folder in FOLDERS
    for pair in (options_of(folder) if (RECORDED / folder / "raw-options.txt").exists() else ())
]


@pytest.mark.parametrize(("folder", "option", "text"), ALL_OPTIONS)
@pytest.mark.parametrize("profile", Profile)
def test_k1_recorded_options_come_back_byte_for_byte(folder, option, text, profile):
    kind = NydusExtraOptions if option.startswith(EXTRA_OPTION) else KataVirtualVolume
    value = kind.decode(option, profile)
    assert value.encode() == option
    assert value.as_json() == json.loads(text)


def test_there_are_recorded_options_of_both_kinds():
    assert len(ALL_OPTIONS) > 40
    assert len({option.partition("=")[0] for _, option, _ in ALL_OPTIONS}) == 2


@pytest.mark.parametrize("folder", FILLED)
def test_all_recorded_mounts_are_read(folder):
    for call, mount in recorded(folder).items():
        rootfs = read_rootfs([mount], Profile.LENIENT)
        assert rootfs.lower
        assert bool(rootfs.upper) == (call in CALLS[:2])
        assert rootfs.options == ()
        carried = rootfs.extra is not None or bool(rootfs.volumes)
        assert carried == is_nydus_type(mount.type, Profile.LENIENT)
        assert not any(volume.is_stray for volume in rootfs.volumes)
        # What Kata's Rust runtime knows, but for a helper with a path.
        strict = mount.type == "fuse.nydus-overlayfs"
        assert is_nydus_type(mount.type) == strict
        assert read_rootfs([mount]) == rootfs


EXTRA_FOLDERS = [
    "kata-daemon-mode-none", "kata-fusedev-overlayfs-helper", "kata-overlayfs-helper-path",
    "kata-shared-overlayfs-helper",
]  # fmt: skip


def snapshot_of(mount, active):
    """Return the snapshot of a recorded mount: its id is in the name of its `fs`."""
    rootfs = read_rootfs([mount], Profile.LENIENT)
    path = rootfs.upper if active else rootfs.lower[-1]
    return Snapshot(ROOT, path.split("/")[-2], active=active), rootfs


@pytest.mark.parametrize("folder", EXTRA_FOLDERS)
def test_mounts_with_an_extraoption_are_written_as_recorded(folder):
    mounts = recorded(folder)
    for call, active in (("Prepare", True), ("View", False)):
        snapshot, rootfs = snapshot_of(mounts[call], active)
        helper = mounts[call].type.removeprefix("fuse.")
        (written,) = nydus_mounts(snapshot, rootfs.lower[0], extra=rootfs.extra, helper=helper)
        assert written == mounts[call]
    assert mounts["Mounts of the active snapshot"] == mounts["Prepare"]


@pytest.mark.parametrize("folder", FILLED)
def test_a_recorded_view_loses_its_image_and_ours_does_not(folder):
    """`Mounts` of a view is a plain overlay of empty directories; `View` was right."""
    mounts = recorded(folder)
    if folder.startswith("kata-proxy"):
        return
    wrong = read_rootfs([mounts["Mounts of the view"]], Profile.LENIENT)
    assert (wrong.type, wrong.extra, wrong.volumes) == ("overlay", None, ())
    right = read_rootfs([mounts["View"]], Profile.LENIENT)
    assert wrong.lower != right.lower
    snapshot, _ = snapshot_of(mounts["View"], active=False)
    words = {"extra": right.extra, "volumes": right.volumes}
    once = nydus_mounts(snapshot, right.lower[0], **words)
    assert nydus_mounts(snapshot, right.lower[0], **words) == once
    assert read_rootfs(once, Profile.LENIENT).lower == right.lower


DISK_FOLDERS = [name for name in FILLED if "tarfs" in name and name != "kata-tarfs-no-export"]


def disks(folder):
    """Return the disks of a folder, the topmost first, from what labels and cache say."""
    info = json.loads((RECORDED / folder / "top-snapshot-info.json").read_text())["Labels"]
    whole = "image" in folder
    # Without verity the label is empty, and an empty label is not stored.
    label = info.get(f"{LABELS}nydus-{'image' if whole else 'layer'}-block")
    rootfs = read_rootfs([recorded(folder)["Prepare"]])
    found = []
    for number, volume in enumerate(rootfs.volumes):
        verity = volume.dm_verity
        if number == 0 and label:
            # The label is the only lasting record; it says what the JSON does not.
            assert parse_verity(label).table("/dev/x") == verity.table("/dev/x")
        found.append(Disk(volume.source, verity))
    return whole, found


@pytest.mark.parametrize("folder", DISK_FOLDERS)
def test_mounts_with_disks_are_written_without_the_stray_one(folder):
    mounts = recorded(folder)
    whole, found = disks(folder)
    volumes = disk_volumes(found, whole_image=whole)
    snapshot, rootfs = snapshot_of(mounts["Prepare"], active=True)
    assert nydus_mounts(snapshot, rootfs.lower[0], volumes=volumes) == (mounts["Prepare"],)
    assert mounts["Mounts of the active snapshot"] == mounts["Prepare"]
    view, rootfs = snapshot_of(mounts["View"], active=False)
    (written,) = nydus_mounts(view, rootfs.lower[0], volumes=volumes)
    stray = [option for option in mounts["View"].options if option not in written.options]
    assert [KataVirtualVolume.decode(option).is_stray for option in stray] == [True] * (not whole)
    assert [o for o in mounts["View"].options if o not in stray] == list(written.options)
    assert written.type == mounts["View"].type
    # Readers leave the stray one out by themselves.
    assert rootfs.volumes == volumes


def test_a_guest_pull_is_written_with_all_it_knows():
    """The recorded `Mounts` forgets what `Prepare` has said."""
    mounts = recorded("kata-proxy-kata-volume")
    layer = "sha256:53915366c55848e8bf46408ea2f67cd29da1db84564a8203c1c5cb0593a8592f"
    volume = guest_pull_volume(
        {f"{LABELS}nydus-proxy-mode": "true", f"{LABELS}cri.layer-digest": layer}
    )
    snapshot, rootfs = snapshot_of(mounts["Prepare"], active=True)
    assert nydus_mounts(snapshot, rootfs.lower[0], volumes=[volume]) == (mounts["Prepare"],)
    assert not rootfs.volumes[0].is_placeholder
    for call in ("Mounts of the active snapshot", "Mounts of the view"):
        (forgetful,) = read_rootfs([mounts[call]], Profile.LENIENT).volumes
        assert forgetful.volume_type is VolumeType.IMAGE_GUEST_PULL
        assert forgetful.is_placeholder


@pytest.mark.parametrize("folder", FILLED)
def test_command_line_shows_and_checks_what_was_recorded(folder, capsys):
    path = RECORDED / folder / "mounts.json"
    count = sum(len(entry.get("decoded", ())) for entry in json.loads(path.read_text()))
    status = main(["volume", "show", str(path)])
    out = capsys.readouterr().out
    if not count:
        assert status == 1
        return
    assert len(json.loads(out)) == count
    assert main(["volume", "check", "--profile", "lenient", str(path)]) == 0
    assert capsys.readouterr().out == f"{count} right\n"
