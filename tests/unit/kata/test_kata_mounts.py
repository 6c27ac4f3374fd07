"""Mount lists for containerd, and how they are read (spec vm-runtimes 3.3)."""

import pytest

from kata import NydusExtraOptions, OptionError, Profile
from kata.guest import image_mountpoint, overlay_storage
from kata.guestpull import guest_pull_storage, guest_pull_volume, image_reference
from kata.mounts import Disk, Mount, Snapshot, disk_volumes, native_mounts, nydus_mounts
from kata.rootfs import is_nydus_type, read_rootfs
from kata.volume import KataVirtualVolume, VolumeType

ROOT = "/srv/n"
ACTIVE = Snapshot(ROOT, "12")
VIEW = Snapshot(ROOT, "12", active=False)
IMAGE = "/srv/n/snapshots/9/mnt"
EXTRA = NydusExtraOptions("/srv/n/snapshots/9/fs/image/image.boot", "{}", "/srv/n/snapshots/12")
DIRS = ("workdir=/srv/n/snapshots/12/work", "upperdir=/srv/n/snapshots/12/fs")


def overlay(*options):
    return (Mount("overlay", "overlay", options),)


@pytest.mark.parametrize(
    ("snapshot", "parents", "expected"),
    [
        (ACTIVE, [], (Mount("bind", "/srv/n/snapshots/12/fs", ("rw", "rbind")),)),
        (VIEW, [], (Mount("bind", "/srv/n/snapshots/12/fs", ("ro", "rbind")),)),
        (VIEW, ["/p1"], (Mount("bind", "/p1", ("ro", "rbind")),)),
        (ACTIVE, ["/p1"], overlay(*DIRS, "lowerdir=/p1")),
        (ACTIVE, ["/p2", "/p1"], overlay(*DIRS, "lowerdir=/p2:/p1")),
        (VIEW, ["/p2", "/p1"], overlay("lowerdir=/p2:/p1")),
        (
            Snapshot(ROOT, "12", volatile=True, id_maps=("0:100000:65536", "0:100000:65536")),
            ["/p1"],
            overlay(*DIRS, "volatile", "uidmap=0:100000:65536", "gidmap=0:100000:65536",
                    "lowerdir=/p1"),
        ),
        (
            Snapshot(ROOT, "12", id_maps=("0:1:2", "0:1:2")),
            [],
            (Mount("bind", "/srv/n/snapshots/12/fs",
                   ("rw", "rbind", "uidmap=0:1:2", "gidmap=0:1:2")),),
        ),
    ],
)  # fmt: skip
def test_native_mounts(snapshot, parents, expected):
    assert native_mounts(snapshot, parents) == expected


@pytest.mark.parametrize(
    ("snapshot", "above", "expected"),
    [
        (ACTIVE, [], (*DIRS, f"lowerdir={IMAGE}")),
        (Snapshot(ROOT, "12", volatile=True), [], ("volatile", *DIRS, f"lowerdir={IMAGE}")),
        (VIEW, [], (f"lowerdir={IMAGE}:/srv/n/snapshots/12/fs",)),
        (ACTIVE, ["/p11", "/p10"], (*DIRS, f"lowerdir=/p11:/p10:{IMAGE}")),
    ],
)
def test_nydus_mounts(snapshot, above, expected):
    assert nydus_mounts(snapshot, IMAGE, above) == overlay(*expected)
    (mount,) = nydus_mounts(snapshot, IMAGE, above, extra=EXTRA, helper="/opt/nydus-overlayfs-2")
    assert mount.type == "fuse./opt/nydus-overlayfs-2"
    assert mount.options == (*expected, EXTRA.encode())


def test_names_are_escaped_for_overlayfs_and_read_back():
    snapshot = Snapshot("/srv/a,b:c\\d", "1")
    (mount,) = nydus_mounts(snapshot, "/image:,\\", ["/above"])
    assert mount.options == (
        "workdir=/srv/a\\,b:c\\\\d/snapshots/1/work",
        "upperdir=/srv/a\\,b:c\\\\d/snapshots/1/fs",
        "lowerdir=/above:/image\\:\\,\\\\",
    )
    rootfs = read_rootfs([mount])
    assert rootfs.lower == ("/above", "/image:,\\")
    assert (rootfs.upper, rootfs.work) == (snapshot.path("fs"), snapshot.path("work"))


@pytest.mark.parametrize(
    "helper", ["overlayfs", "/opt/../nydus-overlayfs", "a\n", "nydus-overlayfs\n"]
)
def test_a_helper_that_kata_would_not_know(helper):
    with pytest.raises(OptionError):
        nydus_mounts(ACTIVE, IMAGE, extra=EXTRA, helper=helper)


@pytest.mark.parametrize(
    ("root", "name"),
    [("relative", "1"), ("/a/../b", "1"), ("/a", ""), ("/a", ".."), ("/a", "1/2"), ("/a", "1\n")],
)
def test_a_snapshot_somewhere_else(root, name):
    with pytest.raises(OptionError):
        Snapshot(root, name)


def test_paths_of_layers_are_plain():
    for path in ("relative", "/a/../b", "/a\0"):
        with pytest.raises(OptionError):
            nydus_mounts(ACTIVE, path)
        with pytest.raises(OptionError):
            native_mounts(VIEW, [path])


def test_more_options_than_reach_the_helper():
    extra = NydusExtraOptions("/b", "x" * 100_000, "/s")
    with pytest.raises(OptionError, match="expected 130900"):
        nydus_mounts(ACTIVE, IMAGE, extra=extra)


def test_disks():
    disks = [Disk("/c/2.layer.disk"), Disk("/c/1.layer.disk")]
    volumes = disk_volumes(disks, whole_image=False)
    assert [volume.source for volume in volumes] == ["/c/2.layer.disk", "/c/1.layer.disk"]
    assert {volume.volume_type for volume in volumes} == {VolumeType.LAYER_RAW_BLOCK}
    (image,) = disk_volumes([Disk("/c/1.image.disk")], whole_image=True)
    assert image.volume_type is VolumeType.IMAGE_RAW_BLOCK
    with pytest.raises(OptionError):
        disk_volumes(disks, whole_image=True)


@pytest.mark.parametrize(
    ("name", "profiles"),
    [
        ("fuse.nydus-overlayfs", "spl"),
        ("fuse.nydus-overlayfs-xyz", "l"),
        ("fuse./opt/bin/nydus-overlayfs", "l"),
        ("fuse3.nydus-overlayfs", ""),
        ("nydus-overlayfs", ""),
        ("fuse./opt/nydus-overlayfs/x", ""),
        ("overlay", ""),
    ],
)
def test_which_types_kata_recognises(name, profiles):
    for profile in Profile:
        assert is_nydus_type(name, profile) == (profile.value[0] in profiles)


def test_a_list_that_is_no_rootfs():
    mount = overlay("lowerdir=/a")[0]
    for mounts in ([], [mount, mount]):
        with pytest.raises(OptionError, match="expected 1"):
            read_rootfs(mounts)
    with pytest.raises(OptionError, match="mount options"):
        read_rootfs([Mount("overlay", "overlay", ("x" * (10 << 20),))])
    with pytest.raises(OptionError, match="base64"):
        read_rootfs(overlay("lowerdir=/a", "io.katacontainers.volume=AAA"))
    with pytest.raises(OptionError, match="base64"):
        read_rootfs(overlay("lowerdir=/a", "extraoption=AAA"))


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("/a", ("/a",)),
        ("/a:/b", ("/a", "/b")),
        ("/a\\:/b", ("/a:/b",)),
        ("/a\\\\:/b", ("/a\\", "/b")),
        ("/a::/b", ("/a", "/b")),
        ("/a\\", ("/a",)),
        ("\\" * 99_999, ("\\" * 49_999,)),
        (":" * 99_999, ()),
    ],
)
def test_lists_of_layers(value, layers):
    assert read_rootfs(overlay(f"lowerdir={value}")).lower == layers


SANDBOX = {"io.kubernetes.cri.container-type": "sandbox"}
CONTAINER = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.image-name": "docker.io/a:1",
}


@pytest.mark.parametrize(
    ("annotations", "reference"),
    [
        (SANDBOX, "pause"),
        (CONTAINER, "docker.io/a:1"),
        (
            {"io.kubernetes.cri-o.ContainerType": "container",
             "io.kubernetes.cri-o.ImageName": "quay.io/b"},
            "quay.io/b",
        ),
        ({"io.kubernetes.cri-o.ContainerType": "sandbox"}, "pause"),
        ({"io.kubernetes.cri.image-name": "nerdctl/c"}, "nerdctl/c"),
        ({"io.kubernetes.cri-o.ImageName": "d"}, "d"),
    ],
)  # fmt: skip
def test_which_image_the_guest_pulls(annotations, reference):
    assert image_reference(annotations) == reference


@pytest.mark.parametrize("annotations", [{}, {"io.kubernetes.cri.container-type": "container"}])
def test_no_annotation_names_an_image(annotations):
    with pytest.raises(OptionError, match="annotation"):
        image_reference(annotations)


def test_the_request_for_a_guest_pull():
    volume = guest_pull_volume({"a": "1", "io.kubernetes.cri.image-name": "old"})
    storage = guest_pull_storage("c1", volume, CONTAINER)
    assert storage.driver == "image_guest_pull"
    assert storage.source == "docker.io/a:1"
    assert (storage.fstype, storage.options) == ("overlay", ())
    assert storage.mount_point == "/run/kata-containers/c1/rootfs"
    assert storage.driver_options == (
        'image_guest_pull={"metadata":{"a":"1","io.kubernetes.cri.container-type":"container",'
        '"io.kubernetes.cri.image-name":"docker.io/a:1"}}',
    )
    with pytest.raises(OptionError):
        guest_pull_storage("c1", KataVirtualVolume(VolumeType.DIRECT_BLOCK), CONTAINER)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\n", "a\0", "a" * 200, "ä"])
def test_container_ids_that_climb(name):
    for make in (image_mountpoint, overlay_storage):
        with pytest.raises(OptionError, match="container id"):
            make(name)
    with pytest.raises(OptionError, match="container id"):
        guest_pull_storage(name, guest_pull_volume({}), CONTAINER)


def test_the_overlay_in_the_guest():
    assert image_mountpoint("c-1") == "/rafs/c-1/lowerdir"
    storage = overlay_storage("c-1")
    top = "/run/kata-containers/shared"
    assert storage.mount_point == f"{top}/containers/c-1/rootfs"
    assert storage.options == (
        f"upperdir={top}/containers/c-1/snapshotdir/fs",
        f"workdir={top}/containers/c-1/snapshotdir/work",
        f"lowerdir={top}/rafs/c-1/lowerdir",
        "index=off",
    )
