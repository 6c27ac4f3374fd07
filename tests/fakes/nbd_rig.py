"""A served disk of an image, without a kernel."""

import os
import threading

from fscache.backend import LocalFsConfig, open_backend
from fscache.backend.retry import RetryPolicy
from fscache.cache.layer import open_reader
from fscache.cache.plan import read_plan
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.metrics import CacheMetrics
from fscache.nbd.disk import Slice, image_disk, read_disk_plan
from fscache.nbd.serving import read_file
from fscache.sharing import Domain

FAST = FetcherOptions(workers=4, negative_ttl=0.0, sync_interval=60.0)
RETRY = RetryPolicy(attempts=2, first_delay=0.001)


class DiskRig:
    """The disk of a bootstrap whose blobs lie beside it; `readers` may be put in between."""

    def __init__(self, bootstrap, work_dir, reader=lambda real: real):
        work_dir.mkdir(exist_ok=True)
        self.fetcher = Fetcher(FAST)
        self.domain = Domain(work_dir, self.fetcher)
        self.backend = open_backend(LocalFsConfig(dir=bootstrap.parent))
        self.metrics = CacheMetrics(work_dir)
        self.fd = os.open(bootstrap, os.O_RDONLY)
        self.stop = threading.Event()
        self.blobs = [
            self.domain.acquire(plan, reader(open_reader(self.backend, plan)), self.metrics, RETRY)
            for plan in read_plan(bootstrap).blobs
        ]
        plan = read_disk_plan(bootstrap)
        self.disk = image_disk(plan, self.fd, self.blobs, Demand(self.fetcher), self.stop)

    def close(self):
        self.stop.set()
        self.fetcher.close(5)
        os.close(self.fd)


def read(disk, offset=0, length=None):
    """Read a range as a connection does, but one part after the other."""
    data = b""
    for source, place, size in disk.parts(offset, disk.size - offset if length is None else length):
        if source is None:
            data += bytes(size)
            continue
        errors, ready = [], threading.Event()
        source.request(place, size, lambda error, e=errors, r=ready: (e.append(error), r.set()))
        assert ready.wait(60)
        if errors[0] is not None:
            raise errors[0]
        found = source.read(place, size)
        data += read_file(found) if isinstance(found, Slice) else found
    return data
