"""Guest images boot by their kernel command line (V12 of spec vm-runtimes 7.4), and bundles too.

The kernel is the lab's `guest`, which has everything built in: there is no initramfs.
"""

import lzma
import os
import re
import select
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from builder import BuildOptions, build
from guestimage.image import ImageOptions, make_image
from guestimage.layout import MIB, Table
from guestimage.rootfs import make_filesystem
from kata.bundle import make_bundle
from tests.capabilities import need_tool
from vmlab.catalogue import KERNELS
from vmlab.initramfs import Entry, busybox, load_order, pack
from vmlab.qemu import base_command
from vmlab.store import find

KERNEL = "guest"
OF_DEBIAN = "6.12-generic"
MODULES = ("crc32c_generic", "virtio_pci", "virtio_blk", "dm-verity", "erofs")
# What a kernel with DM_INIT does by itself.
INITRAMFS = """\
#!/bin/busybox sh
set -e
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t sysfs sys /sys
$b mount -t proc proc /proc
for module in {modules}; do $b insmod /modules/$module; done
export DM_DISABLE_UDEV=1
{dmsetup} create --readonly root --table "{table}"
$b mount -t erofs -o ro /dev/mapper/root /root
$b umount /proc /sys
$b mount --move /dev /root/dev
exec $b switch_root /root /sbin/init
"""
READY = "guest image ready: "
SECONDS = 250
APPLETS = ("sh", "mount", "mkdir", "chmod", "cat")
ARGUMENTS = "console=ttyS0 panic=-1 mitigations=off "


@pytest.fixture(scope="module")
def kernel(guests):
    guests.need(KERNEL)
    return find(KERNELS[KERNEL])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The least of a root: busybox, which is a static program."""
    top = tmp_path_factory.mktemp("guest-source")
    (top / "bin").mkdir()
    (top / "etc").mkdir()
    shutil.copy(need_tool("busybox"), top / "bin/busybox")
    for name in APPLETS:
        (top / "bin" / name).symlink_to("busybox")
    (top / "etc/os-release").write_text('PRETTY_NAME="a guest"\n')
    return top


def boot(kernel, line, disk, until, *more):
    """Boot with a disk, and return what the console says up to a text, or until the end."""
    words = [
        *base_command("tcg"), "-m", "384M", "-kernel", kernel.vmlinux, *more, "-append",
        f"{ARGUMENTS}{line}", "-serial", "stdio",
        "-drive", f"file={disk},format=raw,if=none,id=d,read-only=on",
        "-device", "virtio-blk-pci,drive=d",
    ]  # fmt: skip
    output, deadline = b"", time.monotonic() + SECONDS
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=-1) as process:
        # To the end of that line.
        while b"\n" not in output.partition(until.encode())[2] and time.monotonic() < deadline:
            if not select.select([process.stdout], [], [], 1)[0]:
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            output += data
        process.kill()
        output += process.stdout.read()
    return output.decode(errors="replace")


@pytest.mark.parametrize("table", list(Table))
def test_v12_a_measured_root(kernel, source, tmp_path, table):
    line = make_image(source, tmp_path, ImageOptions(table=table))
    output = boot(kernel, line, tmp_path / "guest.img", READY)
    assert f"{READY}a guest; root /dev/root erofs ro" in output, output[-3000:]
    assert "device-mapper: init: " in output
    # A byte of the filesystem's first block is enough.
    with (tmp_path / "guest.img").open("r+b") as file:
        file.seek(MIB + 1030)
        file.write(b"\xff")
    output = boot(kernel, line, tmp_path / "guest.img", "Kernel panic")
    assert "data block 0 is corrupted" in output
    assert READY not in output
    assert "Unable to mount root fs" in output


def with_libraries(program):
    """Return a program and what it is linked with, as entries of an initramfs."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
    files = {program, *re.findall(r"(/\S+) \(0x", listed.stdout)}
    folders = {str(parent) for file in files for parent in Path(file).parents} - {"/"}
    return [
        *(Entry(name[1:], stat.S_IFDIR | 0o755) for name in sorted(folders)),
        *(Entry(name[1:], stat.S_IFREG | 0o755, Path(name).read_bytes()) for name in sorted(files)),
    ]


def debians_initramfs(kernel, table):
    files = load_order((kernel.modules / "modules.dep").read_text(), MODULES)
    dmsetup = os.path.realpath(need_tool("dmsetup"))
    script = INITRAMFS.format(
        modules=" ".join(Path(file).name for file in files), dmsetup=dmsetup, table=table
    )
    program = stat.S_IFREG | 0o755
    taken = with_libraries(dmsetup)
    made = {entry.name for entry in taken}
    places = {"bin", "dev", "modules", "proc", "root", "sys"} - made
    return pack(
        [
            *(Entry(name, stat.S_IFDIR | 0o755) for name in sorted(places)),
            *taken,
            Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            Entry("bin/busybox", program, busybox()),
            Entry("init", program, script.encode()),
            *(
                Entry(f"modules/{Path(file).name}", stat.S_IFREG | 0o644,
                      module_bytes(kernel.modules / file))
                for file in files
            ),
        ]
    )  # fmt: skip


def module_bytes(path):
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def test_a_measured_root_under_debians_kernel(guests, source, tmp_path):
    """It has no DM_INIT: an initramfs does the same with the same table."""
    guests.need(OF_DEBIAN)
    stored = find(KERNELS[OF_DEBIAN])
    line = make_image(source, tmp_path)
    (table,) = re.findall(r'dm-mod.create="dm-verity,,,ro,([^"]+)"', line)
    (tmp_path / "initramfs").write_bytes(debians_initramfs(stored, table))
    more = ("-initrd", tmp_path / "initramfs")
    output = boot(stored, "", tmp_path / "guest.img", READY, *more)
    assert f"{READY}a guest; root /dev/mapper/root erofs ro" in output, output[-3000:]


def test_an_unmeasured_root(kernel, source, tmp_path):
    line = make_image(source, tmp_path, ImageOptions(measured=False))
    output = boot(kernel, line, tmp_path / "guest.img", READY)
    assert f"{READY}a guest; root /dev/root erofs ro" in output, output[-3000:]


def test_v12_the_disk_of_a_bundle(kernel, source, tmp_path):
    """Its command line is for a kernel that has the image as its root."""
    work = tmp_path / "work"
    work.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    blobs = folder / "blobs"
    blobs.mkdir()
    shutil.copytree(source, work / "root", symlinks=True)
    for name in ("dev", "proc", "run", "sbin", "sys", "tmp"):
        (work / "root" / name).mkdir()
    init = Path(make_filesystem.__code__.co_filename).with_name("init")
    shutil.copy(init, work / "root/sbin/init")
    (work / "root/sbin/init").chmod(0o755)
    build(work / "root", BuildOptions(bootstrap=folder / "image.boot", blob_dir=blobs))
    make_bundle(folder, tmp_path / "out")
    line = (tmp_path / "out/kernel.cmdline").read_text().strip()
    output = boot(kernel, line, tmp_path / "out/image.disk", READY)
    assert f"{READY}a guest; root /dev/root erofs ro" in output, output[-3000:]
