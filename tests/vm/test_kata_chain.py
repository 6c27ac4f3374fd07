"""From a mount option to a program that runs in a guest, with our daemon in front of the guest.

What Kata's runtime does is done by hand: it decodes the snapshotter's `extraoption`, starts
`nydusd virtiofs`, sends the recorded requests, boots a guest, and has the agent lay an overlay.
"""

import json
import stat
import subprocess
from pathlib import Path

import pytest

from kata import NydusExtraOptions
from kata.guest import PASSTHROUGH_MOUNTPOINT, SHARED, image_mountpoint, overlay_storage
from kata.mounts import Mount
from kata.rootfs import is_nydus_type, read_rootfs
from tests.capabilities import requires
from tests.demo.hostroot import collect_host
from tests.fakes.kata_runtime import SECONDS, Exported, image_request, passthrough_request
from vmlab.qemu import Hardware, SharedTree, base_command

KERNEL = "6.12-generic"
CONTAINER = "c0ffee"
PROGRAM = "import json, sys; print(json.dumps([sys.version_info[0], 6 * 7]))"

pytestmark = requires("root", "erofs_mount", "fanotify")


class Sandbox:
    """The runtime's side: an image, a snapshot, the daemon, a guest that has the share."""

    def __init__(self, directory: Path):
        source = directory / "rootfs"
        source.mkdir()
        collect_host(source)
        (source / "never-read").write_bytes(bytes(range(256)) * (32 << 10))
        self.image = image_request(source, directory)
        self.shared = directory / "shared"
        self.snapshot = self.shared / CONTAINER / "snapshotdir"
        for name in ("fs", "work"):
            (self.snapshot / name).mkdir(parents=True)
        (self.shared / CONTAINER / "rootfs").mkdir()
        self.extra = self._hand_over()
        self.daemon = Exported(directory, "--hybrid-mode")

    def _hand_over(self):
        """Go the way of the option: from the snapshotter's mount list to what the runtime sees."""
        options = NydusExtraOptions(
            self.image["source"], self.image["config"], str(self.snapshot), "v6"
        )
        words = [
            f"workdir={self.snapshot}/work",
            f"upperdir={self.snapshot}/fs",
            "lowerdir=/nowhere/mnt",
            options.encode(),
        ]
        mount = Mount("fuse.nydus-overlayfs", "overlay", tuple(words))
        assert is_nydus_type(mount.type)
        return read_rootfs([mount]).extra

    def mount(self):
        """Send the requests of spec vm-runtimes 2.5."""
        self.daemon.mount(PASSTHROUGH_MOUNTPOINT, passthrough_request(self.shared))
        body = {"fs_type": "rafs", "source": self.extra.source, "config": self.extra.config}
        self.daemon.mount(image_mountpoint(CONTAINER), body)

    def fetched(self):
        """Return how many bytes have come from the backend."""
        place = image_mountpoint(CONTAINER)
        status, _, answer = self.daemon.ask("GET", f"/api/v1/metrics/backend?id={place}")
        assert status == 200, answer
        return json.loads(answer)["read_amount_total"]


@pytest.fixture(scope="module")
def sandbox(guests, tmp_path_factory):
    guests.need(KERNEL)
    made = Sandbox(tmp_path_factory.mktemp("s"))
    try:
        made.daemon.wait()
        yield made
    finally:
        made.daemon.process.kill()
        made.daemon.process.wait(SECONDS)


@pytest.fixture(scope="module")
def shell(guests, sandbox):
    """Runs scripts in a guest that has mounted the share before there was anything in it."""
    hardware = Hardware(shares=(SharedTree("kataShared", sandbox.daemon.socket),))
    with guests.boot(KERNEL, hardware) as guest:

        def run(script, status=0):
            done = guest.run(["sh", "-ec", script], cwd=Path("/"))
            assert done.status == status, (done, guest.console()[-3000:])
            return done.stdout.decode()

        run(
            f"modprobe virtiofs; modprobe overlay; mkdir -p {SHARED}"
            f" && mount -t virtiofs kataShared {SHARED}"
        )
        yield run


def test_the_whole_chain(sandbox, shell):
    assert shell(f"ls {SHARED}") == ""
    sandbox.mount()
    # What is mounted on the host appears in the guest, which has mounted the share before.
    assert shell(f"ls {SHARED}") == "containers\nrafs\n"
    before = sandbox.fetched()
    storage = overlay_storage(CONTAINER)
    shell(
        f"mount -t {storage.fstype} {storage.source} -o {','.join(storage.options)}"
        f" {storage.mount_point}"
    )
    output = shell(f"chroot {storage.mount_point} /usr/bin/python3 -I -c '{PROGRAM}'")
    assert json.loads(output) == [3, 42]
    blobs = Path(json.loads(sandbox.image["config"])["device"]["backend"]["config"]["dir"])
    stored = sum(path.stat().st_size for path in blobs.iterdir())
    fetched = sandbox.fetched() - before
    assert 0 < fetched < stored / 2, f"{fetched} of {stored} bytes"
    # What the container writes is in the snapshot on the host, deletions too.
    shell(
        f"cd {storage.mount_point}; echo new > new; rm never-read; mv usr/bin/python3 python3; sync"
    )
    upper = sandbox.snapshot / "fs"
    assert (upper / "new").read_text() == "new\n"
    assert stat.S_ISCHR((upper / "never-read").lstat().st_mode)
    assert (upper / "python3").is_symlink()
    # The end of a container, while the guest goes on.
    shell(f"cd /; umount {storage.mount_point}")
    sandbox.daemon.umount(image_mountpoint(CONTAINER))
    assert shell(f"ls -A {SHARED}") == "containers\n"
    # And the next one.
    sandbox.daemon.mount(image_mountpoint("next"), sandbox.image)
    assert shell(f"test -s {SHARED}{image_mountpoint('next')}/never-read && echo there")


def test_the_daemon_ends_with_its_guest(guests, tmp_path_factory):
    """A machine that does not run connects all the same."""
    guests.need(KERNEL)
    daemon = Exported(tmp_path_factory.mktemp("e"))
    try:
        daemon.wait()
        machine = [
            *base_command("tcg"),
            *("-S", "-m", "64M", "-numa", "node,memdev=m"),
            *("-object", "memory-backend-memfd,id=m,size=64M,share=on"),
            *("-chardev", f"socket,id=c,path={daemon.socket}"),
            *("-device", "vhost-user-fs-pci,chardev=c,tag=t", "-qmp", "stdio"),
        ]
        with subprocess.Popen(machine, stdin=-1, stdout=-1) as guest:
            # It greets when its devices are there.
            assert b"QMP" in guest.stdout.readline()
            assert daemon.process.poll() is None
            guest.kill()
        assert daemon.process.wait(SECONDS) == 0, daemon.log.read_text()
        assert not daemon.socket.exists()
    finally:
        daemon.process.kill()
        daemon.process.wait(SECONDS)
