"""The kernel's cachefiles on demand: EROFS over fscache, Linux 5.19 to 7.1 (spec ondemand 1 to 3).

The kernel keeps blobs in a cache of its own and asks through `/dev/cachefiles` for what is
missing there. From the bottom up: `protocol` and `machine` are pure, `names` too; `device` makes
the system calls; `copying` fills; `channel` is the thread that listens; `images` is what clients
have registered; `cache` puts all of it together. `culler` runs as a process of its own.
Nothing is imported here.
"""
