"""What a watchdog takes for dead, and what it does not."""

import threading
from types import SimpleNamespace

import pytest

from fscache import heartbeat
from fscache.fetch import fetcher as fetcher_module
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.fetch.pool import WorkerPool
from fscache.heartbeat import Heartbeat


def test_one_late_loop_is_enough(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    beats = Heartbeat("intake", 2)
    now[0] += heartbeat.LATE_SECONDS
    assert beats.trouble == ""
    beats.beat(0)
    now[0] += 1
    assert beats.trouble == "intake: no move for 31 s"
    beats.beat(1)
    assert beats.trouble == ""


@pytest.fixture
def pool():
    pool = WorkerPool(2, 2, "test")
    yield pool
    pool.close(10)


def test_a_pool_is_stuck_when_no_worker_is_left(pool):
    release, started = threading.Event(), threading.Semaphore(0)

    def task():
        started.release()
        release.wait(20)

    assert not pool.is_stuck(0)
    pool.submit("a", task)
    assert started.acquire(timeout=60)
    # The other worker is free.
    assert not pool.is_stuck(0)
    pool.submit("b", task)
    assert started.acquire(timeout=60)
    assert pool.is_stuck(0)
    # Slow is not stuck.
    assert not pool.is_stuck(1000)
    release.set()
    done = threading.Event()
    pool.submit("c", done.set)
    assert done.wait(60)


def test_a_closed_pool_has_no_workers(pool):
    pool.close(10)
    assert pool.is_stuck(1000)


def test_a_fetcher_in_trouble(monkeypatch):
    fetcher = Fetcher(FetcherOptions(workers=1))
    try:
        assert fetcher.trouble == ""
        monkeypatch.setattr(fetcher_module, "_STUCK_SECONDS", 0.0)
        release, started = threading.Event(), threading.Event()

        def task():
            started.set()
            release.wait(20)

        fetcher._pool.submit("x", task)
        assert started.wait(60)
        assert fetcher.trouble == "workers: all at one task for more than 0 s"
        release.set()
        monkeypatch.setattr(fetcher_module, "_STUCK_SECONDS", 600.0)
        monkeypatch.setattr(heartbeat, "LATE_SECONDS", -1.0)
        assert fetcher.trouble.startswith("deadlines of reads: no move for")
    finally:
        release.set()
        fetcher.close(10)
    # Nobody reads any more.
    assert fetcher.trouble == ""
