"""What runs when in the bounded pool."""

import threading

import pytest

from fscache.fetch.pool import WorkerPool


@pytest.fixture
def pool():
    pool = WorkerPool(1, 1, "test")
    yield pool
    pool.close(5)


def test_background_comes_last(pool):
    gate, done, order = threading.Event(), threading.Event(), []
    pool.submit("first", lambda: gate.wait(30))
    pool.submit_background(lambda: order.append("background"))
    pool.submit_background(done.set)
    for name in ("a", "b"):
        pool.submit(name, lambda name=name: order.append(name))
    gate.set()
    assert done.wait(60)
    assert order == ["a", "b", "background"]


def test_closed_pool_refuses(pool):
    pool.close(5)
    assert not pool.submit("key", lambda: None)
    assert not pool.submit_background(lambda: None)


def test_threads_start_when_tasks_come():
    pool = WorkerPool(3, 3, "test")
    release, started = threading.Event(), threading.Semaphore(0)

    def task():
        started.release()
        release.wait(30)

    try:
        assert len(pool._threads) == 1
        for number in range(5):
            assert pool.submit(number, task)
        # All of the bound at once, and no more.
        assert all(started.acquire(timeout=60) for _ in range(3))
        assert len(pool._threads) == 3
        release.set()
        assert all(started.acquire(timeout=60) for _ in range(2))
    finally:
        release.set()
        pool.close(10)


def test_tasks_wait_where_no_thread_can_start(monkeypatch):
    pool = WorkerPool(2, 2, "test")

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = [threading.Event() for _ in range(4)]
    try:
        assert all(pool.submit("key", event.set) for event in done)
        assert all(event.wait(60) for event in done)
    finally:
        pool.close(10)
