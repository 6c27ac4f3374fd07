"""What needs no privilege: machine numbers, image bytes, error texts."""

import errno
import os

import pytest

from erofs.layout import SUPERBLOCK_MAGIC, DeviceSlot, Superblock
from erofs.view import View
from fscache import kernel, probe
from fscache.channel import ChannelError, fanotify
from fscache.mounts.loop import _CONFIG
from fscache.mounts.mount import MountError, _mount_error
from fscache.probe_image import BLOB_SIZE, build_probe_image


def test_unknown_machine_is_a_clear_error(monkeypatch):
    class Uname:
        machine = "vax"

    kernel._numbers.cache_clear()
    monkeypatch.setattr(os, "uname", Uname)
    try:
        with pytest.raises(OSError, match="no system call numbers") as caught:
            kernel.fsopen("erofs")
    finally:
        kernel._numbers.cache_clear()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSYS, "vax")


def test_bad_descriptor_has_errno_and_name(tmp_path):
    with pytest.raises(OSError) as caught:
        kernel.fanotify_mark(-1, kernel.FAN_MARK_ADD, kernel.FAN_PRE_ACCESS, tmp_path)
    assert caught.value.errno == errno.EBADF
    assert caught.value.filename == str(tmp_path)


def test_loop_config_has_the_size_of_the_kernel_header():
    assert _CONFIG.size == 4 + 4 + 232 + 64


def test_probe_image_is_one_block_with_one_device():
    image = build_probe_image()
    assert len(image) == 4096
    superblock = Superblock.parse(View(image))
    assert superblock.magic == SUPERBLOCK_MAGIC
    assert superblock.extra_devices == 1
    slot = DeviceSlot.parse(View(image), superblock.devt_slotoff * 128)
    assert slot.blocks * 4096 == BLOB_SIZE == superblock.blocks * 4096


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EPERM, "root"),
        (errno.EINVAL, "Linux 6.14"),
        (errno.EOPNOTSUPP, "use ext4, xfs or btrfs"),
        (errno.ENOSPC, "No space left"),
    ],
)
def test_channel_errors_say_what_is_missing(monkeypatch, tmp_path, code, text):
    def fail(*_):
        raise OSError(code, os.strerror(code), "here")

    tmp_path.chmod(0o700)
    monkeypatch.setattr(kernel, "fanotify_init", fail)
    with pytest.raises(ChannelError, match=text) as caught:
        fanotify.FanotifyChannel(tmp_path, lambda request, reply: None)
    assert caught.value.errno == code


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EPERM, "root"),
        (errno.ENODEV, "no erofs"),
        (errno.ENOTBLK, "Linux 6.12"),
        (errno.EINVAL, "refuses the image"),
        (errno.EIO, "cannot mount: fsconfig"),
    ],
)
def test_mount_errors_say_what_is_missing(tmp_path, code, text):
    error = _mount_error(OSError(code, os.strerror(code), "fsconfig(create)"), tmp_path)
    assert isinstance(error, MountError)
    assert text in str(error)
    assert str(tmp_path) in str(error)
    assert os.strerror(code) in str(error)
    assert error.errno == code


def test_probe_without_a_directory_finds_reasons_and_does_not_raise(tmp_path):
    findings = probe.probe(tmp_path / "absent")
    assert [finding.name for finding in findings][-1] == "self-test"
    summary = probe.lazy_supported(findings)
    assert not summary.ok
    assert summary.detail


def test_old_kernel_is_named(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(errno.EINVAL, "Invalid argument", "x")

    monkeypatch.setattr(kernel, "fanotify_init", lambda *_: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(kernel, "fanotify_mark", fail)
    finding = probe._find("fanotify", probe._try_mark, tmp_path)
    assert not finding.ok
    assert finding.detail.startswith("Linux 6.14 with fanotify pre-content events (FAN_PRE_ACCESS)")
    assert list(tmp_path.iterdir()) == []


def test_file_system_type_is_that_of_the_deepest_mount():
    assert probe.filesystem_type(probe.Path("/proc/self")) == "proc"
    assert probe.filesystem_type(probe.Path("/sys")) == "sysfs"
