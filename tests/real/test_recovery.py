"""What the recover policies of nydus-snapshotter do when nydusd is killed below a container.

The recordings are in fixtures/snapshotter-nydusd: dedicated-none to shared-failover.
"""

import os
import signal

import pytest

from tests.capabilities import requires
from tests.real.box import wait_for
from tests.real.readers import Readers
from tests.real.rig import write_nydusd

pytestmark = [
    requires("root", "erofs_mount", "fanotify"),
    pytest.mark.skipif("NYDUSD" in os.environ, reason="another nydusd has no holder"),
    pytest.mark.timeout(900, func_only=True),
]

SECONDS = 90.0
# How many pieces of half a mebibyte `open` and `new` have read by the end of each phase. Those in
# which they are to wait are longer than what is fetched ahead of them, 16 MiB.
BOUNDS = (8, 48, 88, 128)


def start(rig, image, layers):
    """Pull an image, and run readers up to the end of the first phase."""
    reference = rig.push(image)
    rig.pull(reference)
    readers = Readers(rig, reference, layers, BOUNDS)
    readers.begin(0)
    readers.wait(0, late=False)
    return readers


def kill_under_waiting_reads(rig, readers, phase):
    """Kill nydusd while the registry gives nothing and both readers wait."""
    rig.registry.pause()
    readers.begin(phase)
    wait_for("waiting reads", SECONDS, lambda: rig.waiting_reads() >= 2)
    rig.kill_daemon()
    rig.registry.resume()


def wait_for_successor(rig, before):
    """Wait until the snapshotter has another process that serves, and no more than that."""

    def is_there():
        return (
            rig.daemon()["pid"] != before
            and rig.state() == "RUNNING"
            and len(rig.nydusds()) == len(rig.holders()) == 1
        )

    wait_for("recovery", SECONDS, is_there)


def restart_snapshotter(rig, readers, phase):
    """Restart it while readers go on; the daemon lives."""
    daemons = rig.nydusds()
    rig.snapshotter.end()
    readers.begin(phase)
    rig.start_snapshotter()
    assert rig.nydusds() == daemons
    readers.wait(phase, late=True)


def end(rig, readers):
    """Remove everything, and see that it is gone."""
    readers.remove()
    if rig.mode == "shared":
        # The daemon and its own mount stay for the next image; not with a snapshotter that
        # has found it running, except under `failover`.
        wait_for("removal", SECONDS, lambda: len(rig.mounts()) <= 1)
        rig.snapshotter.end()
    rig.wait_until_clean()


@pytest.mark.parametrize("policy", ["restart", "failover"])
def test_killed_daemon_is_recovered(make_rig, mode, policy, image, other_image, layers):
    """Once, and again with a snapshotter that has found the daemon running."""
    rig = make_rig(mode, policy)
    readers = start(rig, image, layers)
    before = rig.daemon()["pid"]
    kill_under_waiting_reads(rig, readers, 1)
    # A file that nobody had open, while there is no daemon.
    readers.touch("/late")
    wait_for_successor(rig, before)
    readers.wait(1, late=True)
    # Another image, and this one again.
    other = rig.push(other_image)
    rig.pull(other)
    assert rig.run(other, "cat /etc/hostname") == "before\n"
    assert rig.run(readers.reference, "cat /etc/hostname") == "replaced\n"
    rig.ctr("image", "rm", "--sync", other)
    wait_for("end of the other daemon", SECONDS, lambda: len(rig.nydusds()) == 1)
    restart_snapshotter(rig, readers, 2)
    before = rig.daemon()["pid"]
    kill_under_waiting_reads(rig, readers, 3)
    wait_for_successor(rig, before)
    readers.wait(3, late=True)
    assert rig.run(readers.reference, "cat /etc/hostname") == "replaced\n"
    end(rig, readers)


def test_killed_with_the_snapshotter(make_rig, mode, image, layers):
    """What a successor is to be told in `failover`, nobody has any more."""
    rig = make_rig(mode, "failover")
    readers = start(rig, image, layers)
    before = rig.daemon()["pid"]
    rig.snapshotter.end(signal.SIGKILL)
    rig.registry.pause()
    readers.begin(1)
    rig.kill_daemon()
    rig.registry.resume()
    rig.start_snapshotter()
    wait_for_successor(rig, before)
    readers.wait(1, late=False)
    end(rig, readers)


def test_nobody_recovers(make_rig, image, layers):
    """Policy `none`: what is not cached fails in time, and heals with the snapshotter."""
    rig = make_rig("dedicated", "none", environment={"NYDUSD_HOLDER_SECONDS": "2"})
    readers = start(rig, image, layers)
    before = rig.daemon()["pid"]
    kill_under_waiting_reads(rig, readers, 1)
    readers.touch("/late")
    # Both readers that waited, and the one that came late.
    names = {"open", "new", "late"}
    wait_for("errors", SECONDS, lambda: {line.split()[0] for line in readers.errors()} == names)
    assert all("Input/output error" in line for line in readers.errors())
    assert not rig.nydusds()
    assert rig.daemon()["pid"] == before
    rig.snapshotter.end()
    rig.start_snapshotter()
    wait_for_successor(rig, before)
    assert rig.run(readers.reference, "cat /etc/hostname") == "replaced\n"
    end(rig, readers)


def test_nobody_recovers_and_all_is_removed(make_rig, image):
    """The snapshotter leaves the mount of a dead daemon, as recorded; the holder goes with it."""
    rig = make_rig("dedicated", "none", environment={"NYDUSD_HOLDER_SECONDS": "1"})
    reference = rig.push(image)
    rig.pull(reference)
    rig.ctr("run", "-d", "--null-io", reference, "sleeper", "sleep", "1000")
    rig.kill_daemon()
    rig.remove(reference, "sleeper")
    (mount,) = rig.mounts()
    assert len(rig.holders()) == 1
    rig.box.run("umount", mount.split()[1])
    rig.wait_until_clean()


def upgrade(rig, path):
    return rig.system(
        "PUT", "/api/v1/daemons/upgrade", {"nydusd_path": str(path), "policy": "rolling"}
    )


def test_live_upgrade(make_rig, mode, image, layers):
    """By the system socket, below readers; and the new daemon is killed in its turn."""
    rig = make_rig(mode, "failover")
    readers = start(rig, image, layers)
    old = rig.daemon()
    other = rig.root / "nydusd-2"
    write_nydusd(other)
    readers.begin(1)
    assert upgrade(rig, other) == (200, "")
    new = rig.daemon()
    assert new["pid"] != old["pid"]
    assert new["api_socket"] == str(old["api_socket"]).replace("api.sock", "api1.sock")
    wait_for_successor(rig, old["pid"])
    readers.wait(1, late=False)
    kill_under_waiting_reads(rig, readers, 2)
    wait_for_successor(rig, new["pid"])
    readers.wait(2, late=False)
    # The program itself again: the snapshotter upgrades, and fails to replace it by itself.
    status, text = upgrade(rig, rig.root / "nydusd")
    assert (status, "source path and destination path are the same" in text) == (500, True)
    readers.begin(3)
    readers.wait(3, late=False)
    end(rig, readers)


def test_snapshotter_upgrades_what_it_finds(make_rig, mode, image, layers):
    """A snapshotter that starts with another nydusd than those that run replaces them."""
    rig = make_rig(mode, "failover")
    readers = start(rig, image, layers)
    before = rig.daemon()["pid"]
    rig.snapshotter.end()
    write_nydusd(rig.root / "nydusd", commit="another")
    readers.begin(1)
    rig.start_snapshotter()
    wait_for_successor(rig, before)
    readers.wait(1, late=False)
    end(rig, readers)
