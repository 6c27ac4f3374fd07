"""The kernel's cachefiles, served by the test itself: one call for each step of the protocol.

Threads of the test process read the mounts: their calls let the others run.
"""

import ctypes
import errno
import mmap
import os
import select
import threading
import time
from pathlib import Path

from fscache.cachefiles.device import DEVICE, Device
from fscache.cachefiles.protocol import Close, Open, Read, parse_message
from fscache.probe_image import BLOB_SIZE, build_probe_image

PAGE = 4096
TIMEOUT = 60
# What the image of the probe asks for.
BLOB = b"probe"
MS_RDONLY = 1
MNT_DETACH = 2
BOOT = build_probe_image()
DATA = b"".join((b"%07x." % page) * 512 for page in range(BLOB_SIZE // PAGE))

_libc = ctypes.CDLL(None, use_errno=True)


def name_of(code):
    """Return the name of an errno; of two names the one that the kernel uses."""
    return "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode[code]


class Call(threading.Thread):
    """A call in a thread; `result` waits for what it returned, errors as their errno's name."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self._function, self._args = function, args
        self._result = None
        self.start()

    def run(self):
        try:
            self._result = self._function(*self._args)
        except OSError as error:
            self._result = name_of(error.errno)

    def ended_within(self, seconds):
        self.join(seconds)
        return not self.is_alive()

    def result(self):
        self.join(TIMEOUT)
        assert not self.is_alive(), "still waits"
        return self._result


def mount_now(target, options):
    """Mount over fscache; 0 or the errno's name."""
    if _libc.mount(b"none", os.fsencode(target), b"erofs", MS_RDONLY, options.encode()) == 0:
        return 0
    return name_of(ctypes.get_errno())


def unmount_now(target, flags=0):
    if _libc.umount2(os.fsencode(target), flags) == 0:
        return 0
    return name_of(ctypes.get_errno())


def read_file(path, offset=0, length=PAGE):
    """Read without read-ahead, past what the kernel has."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def aligned(data):
    """Return a page-aligned buffer, with zeros up to a whole page."""
    room = mmap.mmap(-1, max(PAGE, -(-len(data) // PAGE) * PAGE))
    room[: len(data)] = data
    return memoryview(room)


class Cache:
    """An opened device, bound or not; `stack` ends it with all mounts and descriptors."""

    def __init__(self, directory, stack, fd=None):
        self.directory = directory / "cache"
        self.directory.mkdir(exist_ok=True)
        self.top = directory
        self.stack = stack
        self.device = Device(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC) if fd is None else fd)
        self.fds = []
        self.mounts = []
        stack.callback(self.end)

    def end(self):
        for mountpoint in self.mounts:
            unmount_now(mountpoint, MNT_DETACH)
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.device.close()

    # Commands

    def command(self, text):
        """Write one command; None, or the errno's name."""
        try:
            assert os.write(self.device.fileno(), text) == len(text)
        except OSError as error:
            return name_of(error.errno)
        return None

    def bind(self):
        assert self.command(b"dir %s" % os.fsencode(self.directory)) is None
        assert self.command(b"bind ondemand") is None
        return self

    def copen(self, message, answer):
        return self.command(b"copen %d,%s" % (message.msg_id, str(answer).encode()))

    def cread(self, message, fd):
        try:
            self.device.complete(fd, message.msg_id)
        except OSError as error:
            return name_of(error.errno)
        return None

    # Messages

    def readable(self, seconds=0.0):
        poll = select.poll()
        poll.register(self.device.fileno(), select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def take(self, kind=None):
        """Wait for the next message."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            raw = os.read(self.device.fileno(), 1024) if self.readable(1.0) else b""
            if raw:
                message = parse_message(raw)
                if isinstance(message, Open):
                    self.fds.append(message.fd)
                assert kind is None or isinstance(message, kind), message
                return message
        raise AssertionError("no message")

    def quiet(self, seconds=0.3):
        """Whether nothing is asked for during a moment."""
        return not self.readable(seconds) or not os.read(self.device.fileno(), 1024)

    def drop(self, fd):
        self.fds.remove(fd)
        os.close(fd)

    # Data

    def write(self, fd, offset, data):
        """Fill a range; None, or the errno's name."""
        view = aligned(data)
        end = time.monotonic() + 5
        while True:
            try:
                assert os.pwritev(fd, [view], offset) == len(view)
            except OSError as error:
                # The kernel needs a moment behind `copen`.
                if error.errno == errno.ENOBUFS and time.monotonic() < end:
                    time.sleep(0.01)
                    continue
                return name_of(error.errno)
            return None

    # Mounts

    def mountpoint(self):
        path = self.top / f"mnt{len(self.mounts)}"
        path.mkdir()
        self.mounts.append(path)
        return path

    def mount(self, fsid, domain=None, target=None):
        """Begin to mount; the call ends with 0 or the errno's name."""
        target = target or self.mountpoint()
        options = f"fsid={fsid}" + (f",domain_id={domain}" if domain else "")
        call = Call(mount_now, target, options)
        call.target = target
        return call

    def open_boot(self, call, boot=BOOT):
        """Answer the OPEN of a bootstrap and all its READs; return message and mount point."""
        message = self.take(Open)
        assert self.copen(message, len(boot)) is None
        assert self.write(message.fd, 0, boot) is None
        return message, call.target

    def mounted(self, fsid="boot1", domain="dom0", size=BLOB_SIZE):
        """Mount the image and open its blob; return mount point, bootstrap's and blob's OPEN."""
        call = self.mount(fsid, domain)
        boot, target = self.open_boot(call)
        # The READs that came before the bootstrap was filled are to be completed.
        blob = None
        while blob is None:
            message = self.take()
            if isinstance(message, Read):
                self.cread(message, boot.fd)
            else:
                blob = message
        assert self.copen(blob, size) is None
        while not call.ended_within(0.05):
            if self.readable(0.05):
                self.cread(self.take(Read), boot.fd)
        assert call.result() == 0
        self.drain(boot.fd)
        return target, boot, blob

    def drain(self, fd):
        """Complete READs of the bootstrap that are still to be read."""
        while self.readable(0.1):
            raw = os.read(self.device.fileno(), 1024)
            if raw:
                self.cread(parse_message(raw), fd)

    def unmount(self, target):
        assert unmount_now(target) == 0


class Server:
    """Serves a cache by threads: `files` by volume and cookie; `events` are all messages seen."""

    def __init__(self, cache, files, threads=1):
        self.cache = cache
        self.files = files
        self.events = []
        self.objects = {}
        self.answered = set()
        self.on_read = self.fill
        self.lock = threading.Lock()
        self.stopped = False
        self.threads = [Call(self._run) for _ in range(threads)]
        cache.stack.callback(self.stop)

    def stop(self):
        self.stopped = True
        for thread in self.threads:
            thread.join(TIMEOUT)

    def _run(self):
        while not self.stopped:
            if not self.cache.readable(0.05):
                continue
            # EMFILE and EEXIST end the request, not the server.
            try:
                raw = os.read(self.cache.device.fileno(), 1024)
            except OSError as error:
                self.events.append(error.errno)
                continue
            if raw:
                self.handle(parse_message(raw))

    def handle(self, message):
        with self.lock:
            self.events.append(message)
        if isinstance(message, Open):
            content = self.files.get((message.volume_key, message.cookie_key))
            self.objects[message.object_id] = (message, content)
            if message.fd not in self.cache.fds:
                self.cache.fds.append(message.fd)
            self.cache.copen(message, -errno.ENOENT if content is None else len(content))
            self.answered.add(message.object_id)
            if content is None:
                self.cache.drop(message.fd)
        elif isinstance(message, Close):
            self.answered.discard(message.object_id)
            known = self.objects.pop(message.object_id, None)
            if known is not None:
                self.cache.drop(known[0].fd)
        else:
            opened, content = self.objects[message.object_id]
            self.on_read(message, opened.fd, content)

    def fill(self, message, fd, content):
        data = content[message.offset : message.offset + message.length]
        self.cache.write(fd, message.offset, data)
        self.cache.cread(message, fd)

    def seen(self, kind):
        return [item for item in self.events if isinstance(item, kind)]


def files(domain, *fsids, data=DATA):
    """Return what a server needs for images of the probe."""
    volume = f"erofs,{domain}".encode()
    boots = {(volume, fsid.encode()): BOOT for fsid in fsids}
    return {**boots, (volume, BLOB): data}


def find(directory, name):
    """Return the kernel's files of a name."""
    return sorted(Path(directory).glob(f"cache/I*/@*/D{name}"))
