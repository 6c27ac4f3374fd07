"""containerd's services as far as `nydusify commit` asks them, on a socket of their own."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from builder.nydusify.protowire import pack_texts, parse_message

RUNNING, STOPPED, PAUSED = 2, 3, 4
PREFIX = "/containerd.services."


def _number(number: int, value: int) -> bytes:
    data = bytearray((number << 3,))
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*data, value))


def _message(number: int, data: bytes) -> bytes:
    """Pack a message in a message; its bytes are like those of a text."""
    return pack_texts([(number, data.decode("utf-8", "surrogateescape"))])


@dataclass
class FakeContainer:
    """A container; `key` is its snapshot."""

    name: str
    image: str
    upper: str
    parent: str = ""
    digest: str = ""
    pid: int = field(default_factory=os.getpid)
    status: int = RUNNING

    def packed(self) -> bytes:
        return pack_texts([(1, self.name), (3, self.image), (6, "nydus"), (7, f"key-{self.name}")])


class FakeContainerd:
    """A server at `path`; `calls` are the methods that pause and resume."""

    def __init__(self, path, containers):
        self.containers = {one.name: one for one in containers}
        self.calls = []
        self.fails = set()
        self.namespaces = set()
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers([self])
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def close(self):
        self._server.stop(None).wait()

    def service(self, details):
        method = details.method.removeprefix(PREFIX)
        metadata = dict(details.invocation_metadata)
        self.namespaces.add(metadata["containerd-namespace"])
        name = re.sub(r"\W+", "_", method.partition(".v1.")[2]).lower()
        found = getattr(self, f"_{name}", None)

        def handle(request, context):
            if method in self.fails:
                context.abort(grpc.StatusCode.INTERNAL, f"no {method} today")
            answer = None if found is None else found(parse_message(request))
            if answer is None:
                context.abort(grpc.StatusCode.NOT_FOUND, "not found")
            return answer

        return grpc.unary_unary_rpc_method_handler(handle)

    def _containers_list(self, request):
        pattern = re.fullmatch(r'id~="(.*)"', request.text(1))[1]
        found = [one for one in self.containers.values() if re.search(pattern, one.name)]
        return b"".join(_message(1, one.packed()) for one in found)

    def _containers_get(self, request):
        found = self.containers.get(request.text(1))
        return None if found is None else _message(1, found.packed())

    def _images_get(self, request):
        for one in self.containers.values():
            if one.image == request.text(1) and one.digest:
                target = pack_texts([(1, "application/json"), (2, one.digest)])
                return _message(1, pack_texts([(1, one.image)]) + _message(3, target))
        return None

    def _of_snapshot(self, request):
        assert request.text(1) == "nydus"
        return self.containers[request.text(2).removeprefix("key-")]

    def _snapshots_mounts(self, request):
        upper = self._of_snapshot(request).upper
        options = ["lowerdir=/nowhere", f"upperdir={upper}"] if upper else ["ro"]
        words = [(1, "overlay"), (2, "overlay"), *((4, option) for option in options)]
        return _message(1, pack_texts(words))

    def _snapshots_stat(self, request):
        return _message(1, pack_texts([(1, "x"), (2, self._of_snapshot(request).parent)]))

    def _tasks_get(self, request):
        found = self.containers[request.text(1)]
        if not found.pid:
            return None
        process = pack_texts([(1, found.name)])
        return _message(1, process + _number(3, found.pid) + _number(4, found.status))

    def _tasks_pause(self, request):
        self.calls.append("pause")
        self.containers[request.text(1)].status = PAUSED
        return b""

    def _tasks_resume(self, request):
        self.calls.append("resume")
        self.containers[request.text(1)].status = RUNNING
        return b""
