"""What runs when in the bounded pool."""

import threading

import pytest

from fscache.pool import WorkerPool


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
    assert done.wait(30)
    assert order == ["a", "b", "background"]


def test_closed_pool_refuses(pool):
    pool.close(5)
    assert not pool.submit("key", lambda: None)
    assert not pool.submit_background(lambda: None)
