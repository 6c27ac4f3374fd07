from test_cachefiles_daemon import *
import time


def test_tmp(node, long_image):
    t0 = time.time()
    out = []
    pid = node.start()
    out.append(("start", time.time() - t0))
    t0 = time.time()
    node.register(long_image.image)
    out.append(("register", time.time() - t0))
    t0 = time.time()
    target = node.mount()
    out.append(("mount", time.time() - t0))
    t0 = time.time()
    node.kill(pid)
    out.append(("kill", time.time() - t0))
    t0 = time.time()
    pid = node.start()
    out.append(("start", time.time() - t0))
    t0 = time.time()
    readers = long_image.readers(target, random.Random(1), 4, 0, 8)
    for reader in readers:
        reader.finish()
    out.append(("read", time.time() - t0))
    t0 = time.time()
    read_tree(target)
    out.append(("tree", time.time() - t0))
    t0 = time.time()
    node.unmount(target)
    node.kill(pid, signal.SIGTERM)
    out.append(("term", time.time() - t0))
    t0 = time.time()
    import subprocess

    assert 0, (out, node.said, open("/proc/loadavg").read())
