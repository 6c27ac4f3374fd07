"""Fill the hash tree of a disk on all cores, level by level, in bounded memory.

The format is `erofs.verity`'s. Holes of the disk are not read: a block of zeros has one
digest, a hash block of such digests has one again, and so on up.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, NamedTuple, Self, cast

from builder.errors import BuildError
from builder.output import OutputDisk
from builder.sharing import share_out
from erofs import CorruptStructure, blockhash
from erofs.blockhash import block_digests
from erofs.verity import DIGEST_SIZE, HashTree, TreeFormat, VeritySuperblock, tree_levels
from erofs.view import align_up

__all__ = ["add_hash_tree", "hash_workers"]

# What a worker is asked for at once: much beside the asking, little beside a core's share.
SPAN_BYTES = 2 << 20
# Below this, starting a worker takes longer than its share of the work.
WORKER_BYTES = 8 << 20
# Smaller holes are read like data, which keeps the list of holes short.
HOLE_BYTES = 1 << 20
_REQUESTS_AHEAD = 2
_Progress = Callable[[int], None] | None


class _Run(NamedTuple):
    """Blocks from `first` to before `end` that are all alike."""

    first: int
    end: int


class _Level(NamedTuple):
    """Blocks to digest: where they are on the disk, which are alike, and those blocks' digest."""

    offset: int
    block_size: int
    blocks: int
    alike: list[_Run]
    digest: bytes

    def size(self, run: _Run) -> int:
        """Return the bytes of a run."""
        return (run.end - run.first) * self.block_size

    def others(self) -> Iterator[_Run]:
        """Yield the blocks that have to be read, in runs of at most a span."""
        step = SPAN_BYTES // self.block_size
        position = 0
        for run in [*self.alike, _Run(self.blocks, self.blocks)]:
            for first in range(position, run.first, step):
                yield _Run(first, min(first + step, run.first))
            position = run.end

    def above(self, offset: int, form: TreeFormat) -> _Level:
        """Return the level of hash blocks that lie at `offset` and hold this one's digests."""
        fan_out = form.hash_block_size // DIGEST_SIZE
        runs = (_Run(-(-run.first // fan_out), run.end // fan_out) for run in self.alike)
        return _Level(
            offset,
            form.hash_block_size,
            -(-self.blocks // fan_out),
            [run for run in runs if run.first < run.end],
            block_digests(self.digest * fan_out, form.hash_block_size, form.salt),
        )


class _Worker:
    """A process that digests ranges of the disk and writes the digests; it ends with the block.

    Raises:
        BuildError: it cannot be started.
    """

    def __init__(self, disk: int, salt: bytes) -> None:
        try:
            # In a group of its own, so that Ctrl-C reaches the parent alone.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", blockhash.__file__, str(disk), salt.hex()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(disk,),
                process_group=0,
                bufsize=0,
            )
        except OSError as error:
            raise BuildError(f"no process can be started ({error.strerror})") from error

    def ask(self, request: bytes) -> None:
        """Send a request; raise `BuildError`."""
        try:
            cast(IO[bytes], self._process.stdin).write(request)
        except OSError as error:
            raise self._ended() from error

    def wait(self) -> None:
        """Return when the next request is done; raise `BuildError`."""
        answer = cast(IO[bytes], self._process.stdout).read(1)
        if not answer:
            raise self._ended()
        if answer[0] != blockhash.DONE:
            raise BuildError(f"hash tree cannot be written ({os.strerror(answer[0])})")

    @staticmethod
    def _ended() -> BuildError:
        return BuildError("a process that digests blocks has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:
            pass


class _Digester:
    """Digests levels of one disk, with workers where there is enough to do."""

    def __init__(
        self, disk: OutputDisk, salt: bytes, workers: Sequence[_Worker], progress: _Progress
    ) -> None:
        self._disk = disk
        self._salt = salt
        self._workers = workers
        self._progress = progress

    def fill(self, level: _Level, target: int) -> None:
        """Write the digests of a level's blocks to `target`; raise `BuildError`."""
        size = SPAN_BYTES // DIGEST_SIZE
        for run in level.alike:
            for first in range(run.first, run.end, size):
                count = min(size, run.end - first)
                self._disk.write_at(target + first * DIGEST_SIZE, level.digest * count)
        if self._workers and level.blocks * level.block_size >= WORKER_BYTES:
            feeders = [partial(self._feed, worker, level, target) for worker in self._workers]
            share_out(level.others(), feeders)
            return
        for run in level.others():
            digests = block_digests(self.read(level, run), level.block_size, self._salt)
            self._disk.write_at(target + run.first * DIGEST_SIZE, digests)
            self._tell(level, run)

    def read(self, level: _Level, run: _Run) -> bytes:
        """Return the bytes of some blocks; raise `BuildError`."""
        length = level.size(run)
        try:
            data = os.pread(
                self._disk.descriptor, length, level.offset + run.first * level.block_size
            )
        except OSError as error:
            raise BuildError(f"the disk cannot be read back ({error.strerror})") from error
        if len(data) != length:
            raise BuildError("the disk has become shorter while it was written")
        return data

    def _feed(self, worker: _Worker, level: _Level, target: int, spans: Iterator[_Run]) -> None:
        """Let a worker digest spans; it always has its next one before it needs it."""
        asked: deque[_Run] = deque()
        for run in spans:
            offset, length = level.offset + run.first * level.block_size, level.size(run)
            place = target + run.first * DIGEST_SIZE
            worker.ask(blockhash.pack_request(offset, length, level.block_size, place))
            asked.append(run)
            if len(asked) == _REQUESTS_AHEAD:
                worker.wait()
                self._tell(level, asked.popleft())
        for run in asked:
            worker.wait()
            self._tell(level, run)

    def _tell(self, level: _Level, run: _Run) -> None:
        if self._progress is not None:
            self._progress(level.size(run))


def _holes(disk: int, size: int, block_size: int) -> Iterator[_Run]:
    """Yield the larger holes among the first `size` bytes, in whole blocks; raise `BuildError`."""
    position = 0
    while position < size:
        hole = _seek(disk, position, os.SEEK_HOLE, size)
        position = _seek(disk, hole, os.SEEK_DATA, size)
        if position - hole >= HOLE_BYTES:
            yield _Run(-(-hole // block_size), position // block_size)


def _seek(disk: int, position: int, whence: int, size: int) -> int:
    """Return where the next hole or data begins, `size` when there is none before it."""
    if position == size:
        return size
    try:
        return min(os.lseek(disk, position, whence), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise BuildError(f"holes of the disk cannot be found ({error.strerror})") from error


def _worker_count(size: int, limit: int | None) -> int:
    """Return how many processes are worth starting for `size` bytes; 0 is none but this one."""
    cores = len(os.sched_getaffinity(0)) if limit is None else limit
    count = min(cores, size // WORKER_BYTES)
    return count if count > 1 and sys.executable else 0


@contextmanager
def hash_workers(
    disk: OutputDisk, data_size: int, form: TreeFormat, limit: int | None = None
) -> Iterator[Sequence[_Worker]]:
    """Start the processes that digest a disk, if it is worth it; they end with the block.

    Args:
        disk: need not have its data yet.
        data_size: bytes that are to be digested.
        limit: how many at most, None for one on each core.

    Raises:
        BuildError: one cannot be started.
    """
    with ExitStack() as stack:
        count = _worker_count(data_size, limit)
        yield [stack.enter_context(_Worker(disk.descriptor, form.salt)) for _ in range(count)]


def add_hash_tree(
    disk: OutputDisk,
    data_size: int,
    form: TreeFormat,
    *,
    workers: int | None = None,
    started: Sequence[_Worker] | None = None,
    progress: _Progress = None,
) -> HashTree:
    """Append the hash tree of the first `data_size` bytes of a disk, and return where it is.

    Memory does not grow with the disk, but for a few bytes a hole of a mebibyte or more. The
    bytes do not depend on `workers`.

    Args:
        disk: holds the data; what is behind it is replaced.
        data_size: bytes, whole data blocks, at least one.
        workers: processes, None for one on each core.
        started: what `hash_workers` gave for this disk and format; then `workers` is ignored.
        progress: called with the number of bytes that were digested, by several threads.

    Raises:
        BuildError: the disk cannot be written or read back, or a worker died.
        CorruptStructure: a size that no tree can have.
    """
    data_blocks, rest = divmod(data_size, form.data_block_size)
    if rest or not data_blocks:
        raise CorruptStructure("data of a hash tree is not in whole blocks", got=data_size)
    tree = HashTree(form, data_blocks, align_up(data_size, form.hash_block_size), b"")
    disk.resize(data_size)
    holes = list(_holes(disk.descriptor, data_size, form.data_block_size))
    disk.resize(tree.end)
    if form.superblock:
        superblock = VeritySuperblock(
            form.data_block_size, form.hash_block_size, data_blocks, form.salt, form.uuid
        )
        disk.write_at(tree.hash_offset, superblock.pack())
    zeros = block_digests(bytes(form.data_block_size), form.data_block_size, form.salt)
    level = _Level(0, form.data_block_size, data_blocks, holes, zeros)
    with ExitStack() as stack:
        if started is None:
            dense = data_size - _size_of(holes, form)
            started = stack.enter_context(hash_workers(disk, dense, form, workers))
        digester = _Digester(disk, form.salt, started, progress)
        for place in tree_levels(data_blocks, form.hash_block_size):
            target = tree.tree_offset + place.offset
            digester.fill(level, target)
            _fill_up(disk, target, place.blocks * form.hash_block_size, place.digests, form)
            level = level.above(target, form)
        top = digester.read(level, _Run(0, 1))
    return tree._replace(root=block_digests(top, len(top), form.salt))


def _size_of(holes: list[_Run], form: TreeFormat) -> int:
    return sum(run.end - run.first for run in holes) * form.data_block_size


def _fill_up(disk: OutputDisk, start: int, size: int, digests: int, form: TreeFormat) -> None:
    """Write the filler into the unused slots of a level, unless it is what a hole reads as."""
    if any(form.filler):
        used = digests * DIGEST_SIZE
        disk.write_at(start + used, form.filler * ((size - used) // DIGEST_SIZE))
