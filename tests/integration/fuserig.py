"""What tests of FUSE share: how a daemon is started that serves through it."""

from treecompare import differences

from fscache.daemon import Transport
from fscache.mounts.place import Mounted, mounted_at

__all__ = ["ALL", "assert_same", "start"]

ALL = [Transport.FANOTIFY, Transport.FUSE, Transport.EAGER]
OURS = Mounted("fuse.nydusd", "nydusd")


def start(serving, image, backend=None, **options):
    daemon = serving.start(image, backend, transport=Transport.FUSE, **options)
    assert mounted_at(daemon.mountpoint) == OURS
    return daemon


def assert_same(expected, got):
    lines = differences(expected, got)
    assert not lines, "\n".join(lines[:20])
