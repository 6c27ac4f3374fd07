"""An image as files of `fscache.imagefiles`, over a real fetcher and a directory of blobs."""

from __future__ import annotations

from erofs import open_bootstrap
from fscache.backend import LocalFsConfig, open_backend
from fscache.backend.retry import RetryPolicy
from fscache.cache.plan import read_plan
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.imagefiles import ImageFiles
from fscache.metrics import CacheMetrics
from fscache.sharing import Domain


class OpenImage:
    """`files` of a bootstrap whose blobs are in `blob_dir`; `blobs` are open, `close` it."""

    def __init__(self, bootstrap, blob_dir, work_dir):
        self.fetcher = Fetcher(FetcherOptions(negative_ttl=0.0))
        self.metrics = CacheMetrics(work_dir)
        self.domain = Domain(work_dir, self.fetcher)
        self.backend = open_backend(LocalFsConfig(dir=blob_dir))
        self.readers, self.blobs = [], []
        for plan in read_plan(bootstrap).blobs:
            reader = self.backend.open(plan.entry.id)
            retry = RetryPolicy(attempts=1)
            self.readers.append(reader)
            self.blobs.append(self.domain.acquire(plan, reader, self.metrics, retry))
        self.demand = Demand(self.fetcher)
        self.files = ImageFiles(open_bootstrap(bootstrap), self.blobs, self.demand)

    def close(self):
        self.files.close()
        for reader in self.readers:
            self.domain.release(reader)
        self.fetcher.close(10.0)
        self.backend.close()
