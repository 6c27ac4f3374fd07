import lzma
import stat
import subprocess

import pytest

from tests.capabilities import need_tool
from vmlab import initramfs
from vmlab.errors import LabError
from vmlab.initramfs import Entry, build_initramfs, load_order, pack

DEPENDENCIES = """\
kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko.xz kernel/fs/netfs/netfs.ko
kernel/fs/netfs/netfs.ko:
kernel/lib/libcrc32c.ko.xz: kernel/lib/crc.ko
kernel/lib/crc.ko:
kernel/drivers/block/virtio-blk.ko:
"""
SYSTEM = ("kernel/lib/libcrc32c.ko.xz", "kernel/fs/netfs/netfs.ko")


def unpack(archive, directory):
    need_tool("busybox")
    words = ["busybox", "cpio", "-idm"]
    subprocess.run(words, input=archive, cwd=directory, capture_output=True, check=True)


def test_another_cpio_reads_what_is_packed(tmp_path):
    entries = [
        Entry("folder", stat.S_IFDIR | 0o750),
        Entry("folder/odd", stat.S_IFREG | 0o644, b"12345"),
        Entry("folder/even", stat.S_IFREG | 0o755, b"1234"),
        Entry("empty", stat.S_IFREG | 0o600),
    ]
    unpack(pack(entries), tmp_path)
    for entry in entries:
        path = tmp_path / entry.name
        assert path.stat().st_mode == entry.mode
        assert path.is_dir() or path.read_bytes() == entry.data
    assert len(list(tmp_path.rglob("*"))) == len(entries)


def test_what_others_need_is_loaded_first():
    order = load_order(DEPENDENCIES, ["virtio_blk", "erofs", "netfs", "built_in"])
    assert order == [
        "kernel/drivers/block/virtio-blk.ko",
        "kernel/fs/netfs/netfs.ko",
        "kernel/lib/libcrc32c.ko.xz",
        "kernel/fs/erofs/erofs.ko",
    ]


def test_modules_and_settings_of_a_guest(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "kernel").mkdir(parents=True)
    (tree / "modules.dep").write_text("kernel/one.ko.xz:\nkernel/two.ko: kernel/one.ko.xz\n")
    (tree / "kernel" / "one.ko.xz").write_bytes(lzma.compress(b"first"))
    (tree / "kernel" / "two.ko").write_bytes(b"second")
    monkeypatch.setattr(initramfs, "busybox", lambda: b"program")
    archive = build_initramfs(tree, ["two"], {"share": "virtiofs", "path": "/with $a 'quote'"})
    target = tmp_path / "target"
    target.mkdir()
    # Without the device, which takes root.
    unpack(archive.replace(b"00002180", b"000081A4"), target)
    assert (target / "modules" / "one").read_bytes() == b"first"
    assert (target / "modules" / "two").read_bytes() == b"second"
    script = '. ./settings; echo "$modules|$share|$path"'
    done = subprocess.run(["sh", "-c", script], cwd=target, capture_output=True, check=True)
    assert done.stdout == b"one two|virtiofs|/with $a 'quote'\n"


def test_a_busybox_with_libraries_is_of_no_use(tmp_path, monkeypatch):
    program = tmp_path / "busybox"
    program.write_bytes(b"\x7fELF" + bytes(100) + b"/lib64/ld-linux-x86-64.so.2\0")
    monkeypatch.setattr(initramfs, "need", lambda *_: str(program))
    with pytest.raises(LabError, match="needs libraries"):
        initramfs.busybox()
