"""EROFS mounts and loop devices against the real kernel."""

import errno
import os
from pathlib import Path

import pytest
from capabilities import requires
from leftovers import loops_over, no_erofs_left, no_open_file_left
from serving import wait_until

from fscache import kernel
from fscache.channel.eager import mount_complete
from fscache.mounts.loop import LoopDevice, LoopError
from fscache.mounts.mount import MountBusy, MountError, create_mount, mount_erofs
from fscache.probe_image import BLOB_SIZE

pytestmark = [pytest.mark.root, pytest.mark.erofs_mount, requires("root", "erofs_mount")]


@pytest.fixture
def complete(rig):
    """A rig whose data file holds everything; no channel."""
    rig.make_data()
    os.pwrite(rig.writer, rig.truth, 0)
    rig.link = rig.data
    return rig


def test_mount_read_unmount(complete):
    mount = complete.mount()
    assert complete.read(mount, 0, BLOB_SIZE) == complete.truth
    assert mount.name.startswith("erofs-")
    assert mount.is_attached()
    assert not mount.is_gone()
    with pytest.raises(OSError) as caught:
        (mount.mountpoint / "new").touch()
    assert caught.value.errno == errno.EROFS
    mount.unmount()
    assert mount.is_gone()
    assert list(mount.mountpoint.iterdir()) == []
    mount.unmount()


def test_names_and_read_ahead_are_those_of_the_mount(complete):
    mounts = [complete.mount(read_ahead_kb=256 * (n + 1)) for n in range(3)]
    assert len({mount.name for mount in mounts}) == 3
    for number, mount in enumerate(mounts):
        setting = Path("/sys/class/bdi") / mount.name / "read_ahead_kb"
        assert setting.read_text().strip() == str(256 * (number + 1))
    mounts[1].unmount()
    assert [mount.is_gone() for mount in mounts] == [False, True, False]


def test_busy_mount_tells_and_detach_waits_for_the_last_user(complete):
    mount = complete.mount()
    file = os.open(mount.mountpoint / "data", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(MountBusy) as caught:
            mount.unmount()
        assert caught.value.errno == errno.EBUSY
        assert str(mount.mountpoint) in str(caught.value)
        mount.detach()
        assert not mount.is_gone()
    finally:
        os.close(file)
    assert mount.is_gone()


def test_unmount_leaves_what_others_mounted_over_it(complete, stack):
    mount = complete.mount()
    context = kernel.fsopen("tmpfs")
    stack.callback(os.close, context)
    kernel.fsconfig_create(context)
    cover = kernel.fsmount(context, 0)
    stack.callback(os.close, cover)
    kernel.move_mount(cover, mount.mountpoint)
    try:
        mount.unmount()
        assert not mount.is_gone()
        assert os.path.ismount(mount.mountpoint)
    finally:
        kernel.umount(mount.mountpoint, kernel.MNT_DETACH)
    mount.unmount()
    assert mount.is_gone()


def test_directory_of_the_caller_does_not_matter(complete, monkeypatch):
    monkeypatch.chdir(complete.directory)
    mountpoint = Path("relative")
    mountpoint.mkdir()
    mount = mount_erofs(Path("image"), [Path(complete.data.name)], mountpoint)
    complete.stack.callback(mount.detach)
    monkeypatch.chdir("/")
    assert mount.mountpoint == complete.directory / "relative"
    mount.unmount()
    assert mount.is_gone()


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ("no image", errno.ENOENT, "image"),
        ("no device", errno.ENOENT, "absent"),
        ("directory", errno.EINVAL, "neither a file nor a block device"),
        ("too many devices", errno.EINVAL, "number of its devices"),
        ("not erofs", errno.EINVAL, "refuses the image"),
        ("no mount point", errno.ENOTDIR, "not a directory"),
        ("mount point is a file", errno.ENOTDIR, "not a directory"),
    ],
)
def test_errors_name_place_and_reason(complete, change, code, text):
    image, devices = complete.image, [complete.data]
    mountpoint = complete.directory / "mnt"
    mountpoint.mkdir()
    match change:
        case "no image":
            image.unlink()
        case "no device":
            devices = [complete.directory / "absent"]
        case "directory":
            image = complete.directory
        case "too many devices":
            devices = devices * 2
        case "not erofs":
            image = complete.data
        case "no mount point":
            mountpoint.rmdir()
        case "mount point is a file":
            mountpoint = image
    refused = pytest.raises(MountError, match=text)
    with no_erofs_left(), no_open_file_left(), refused as caught:
        mount_erofs(image, devices, mountpoint)
    assert caught.value.errno == code
    assert str(complete.directory) in str(caught.value)


def test_kernel_log_lines_are_in_the_error(complete):
    context = kernel.fsopen("erofs")
    complete.stack.callback(os.close, context)
    with pytest.raises(OSError, match="Unknown parameter 'nonsense'"):
        kernel.fsconfig_string(context, "nonsense", "x")


def test_missing_file_system_and_nul_in_a_path():
    with pytest.raises(OSError) as caught:
        kernel.fsopen("nosuchfs")
    assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "nosuchfs")
    with pytest.raises(OSError, match="NUL"):
        kernel.umount(Path("a\0b"), 0)


def test_bootstrap_on_tmpfs_is_enotblk(complete, tmpfs):
    image = tmpfs / "image"
    image.write_bytes(complete.image.read_bytes())
    with pytest.raises(MountError, match=r"Linux 6\.12") as caught:
        create_mount(image, [complete.data])
    assert caught.value.errno == errno.ENOTBLK


@requires("loop")
def test_loop_device_is_read_only_and_goes_with_its_last_user(complete):
    with LoopDevice.attach(complete.data) as device:
        assert loops_over(complete.data) == [device.path.name]
        assert device.path.read_bytes() == complete.truth
        with pytest.raises(OSError), device.path.open("r+b", buffering=0) as file:
            file.write(b"x" * 4096)
    wait_until(lambda: loops_over(complete.data) == [])
    device.close()


@requires("loop")
def test_loop_device_errors_name_the_file(complete):
    with no_open_file_left(), pytest.raises(LoopError, match="absent"):
        LoopDevice.attach(complete.directory / "absent")


@requires("loop")
def test_loop_devices_taken_by_others_are_no_error(complete):
    """Many processes at once want a free device: each gets its own."""
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fscache.mounts.loop import LoopDevice
for _ in range(20):
    with LoopDevice.attach(Path(sys.argv[1])) as device:
        assert device.path.read_bytes()[:8] == b"0000000."
"""
    root = Path(__file__).parents[2]
    children = [complete.child(code, complete.data, root) for _ in range(4)]
    for child in children:
        child.finish()
    wait_until(lambda: loops_over(complete.data) == [])


@requires("loop")
def test_eager_falls_back_to_loop_devices_and_says_so(complete, tmpfs, caplog):
    image, data = tmpfs / "image", tmpfs / "loop-data"
    seen = Path("/loop-data")  # by the kernel, in a file system that is attached nowhere
    image.write_bytes(complete.image.read_bytes())
    data.write_bytes(complete.truth)
    mountpoint = complete.directory / "mnt"
    mountpoint.mkdir()
    with caplog.at_level("INFO"):
        mount = mount_complete(image, [data], mountpoint)
    complete.stack.callback(mount.detach)
    assert "using loop devices" in caplog.text
    assert mount.name.startswith("loop")
    assert loops_over(seen)
    assert complete.read(mount, 0, BLOB_SIZE) == complete.truth
    setting = Path(f"/sys/class/bdi/{os.major(mount.device)}:{os.minor(mount.device)}")
    assert (setting / "read_ahead_kb").read_text().strip() == "1024"
    mount.unmount()
    assert mount.is_gone()
    wait_until(lambda: loops_over(seen) == [])


def test_eager_mounts_from_files_where_it_can(complete):
    mountpoint = complete.directory / "mnt"
    mountpoint.mkdir()
    mount = mount_complete(complete.image, [complete.data], mountpoint)
    complete.stack.callback(mount.detach)
    assert mount.name.startswith("erofs-")
    assert complete.read(mount, 4096) == complete.truth[4096:8192]
