"""The floor of `create`: the same bytes read, digested, compressed and written, nothing else.

Arguments: tar, plan (`source.write_plan`), output, compressor. All cores work, nobody keeps an
order, and what is new is known before.
"""

from __future__ import annotations

import os
import sys
import threading
from array import array
from pathlib import Path

from erofs.codec import compress
from erofs.digest import crc32c, digest
from erofs.rafs import Compressor, Digester

_SPAN_BYTES = 1 << 20
_COMPRESSORS = {
    "zstd": Compressor.ZSTD,
    "lz4_block": Compressor.LZ4_BLOCK,
    "none": Compressor.NONE,
}


def _spans(plan: array[int]) -> list[tuple[int, int]]:
    """Cut the plan into runs of neighbours of about 1 MiB."""
    spans, first = [], 0
    for at in range(0, len(plan), 3):
        if plan[at] + plan[at + 1] - plan[first] > _SPAN_BYTES and at > first:
            spans.append((first, at))
            first = at
    return [*spans, (first, len(plan))] if plan else []


class _Floor:
    def __init__(self, source: int, target: int, plan: array[int], compressor: Compressor):
        self._source = source
        self._target = target
        self._plan = plan
        self._compressor = compressor
        self._lock = threading.Lock()
        self._spans = iter(_spans(plan))
        self._end = 0

    def work(self) -> None:
        while True:
            with self._lock:
                span = next(self._spans, None)
            if span is None:
                return
            parts = self._span(*span)
            size = sum(map(len, parts))
            with self._lock:
                start = self._end
                self._end += size
            for part in parts:
                start += os.pwrite(self._target, part, start)

    def _span(self, first: int, end: int) -> list[bytes | memoryview]:
        plan = self._plan
        base = plan[first]
        length = plan[end - 3] + plan[end - 2] - base
        data = memoryview(os.pread(self._source, length, base))
        parts: list[bytes | memoryview] = []
        for at in range(first, end, 3):
            start = plan[at] - base
            chunk = data[start : start + plan[at + 1]]
            digest(Digester.BLAKE3, chunk)
            if plan[at + 2]:
                crc32c(chunk)
                packed = compress(self._compressor, chunk)
                parts.append(chunk if packed is None else packed)
        return parts


def main() -> None:
    source, plan_path, target, compressor = sys.argv[1:]
    plan = array("Q")
    plan.frombytes(Path(plan_path).read_bytes())
    with open(source, "rb", buffering=0) as tar, open(target, "wb", buffering=0) as out:
        floor = _Floor(tar.fileno(), out.fileno(), plan, _COMPRESSORS[compressor])
        threads = [threading.Thread(target=floor.work) for _ in range(os.cpu_count() or 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # The builder's blob is durable before it has its name.
        os.fsync(out.fileno())


main()
