"""Calls as Go's net/rpc does them with its gob codec: one at a time."""

from __future__ import annotations

import time

from builder.nydusify.hook.errors import PluginError
from builder.nydusify.hook.gob import STRING, UINT, Decoder, Encoder, Struct, Type
from builder.nydusify.hook.yamux import Stream

__all__ = ["Client"]

_REQUEST = Struct("Request", {"ServiceMethod": STRING, "Seq": UINT})


class Client:
    """Calls methods over a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._encoder = Encoder()
        self._decoder = Decoder(self._read)
        self._number = 0
        self._deadline = 0.0

    def _read(self, length: int) -> bytes:
        return self._stream.read(length, self._deadline)

    def _call(self, method: str, kind: Type, argument: object, seconds: float) -> None:
        """Send a call and read the head of its answer."""
        self._deadline = time.monotonic() + seconds
        request = {"ServiceMethod": method, "Seq": self._number}
        data = self._encoder.encode(_REQUEST, request) + self._encoder.encode(kind, argument)
        self._stream.write(data, self._deadline)
        answer = self._decoder.struct()
        if answer.get("Seq", 0) != self._number:
            raise PluginError("answer to another call", expected=self._number, got=answer)
        self._number += 1
        failure = answer.get("Error", "")
        if failure:
            self._decoder.skip()
            raise PluginError(str(failure))

    def call(self, method: str, kind: Type, argument: object, seconds: float) -> None:
        """Call a method whose answer says nothing but whether it failed.

        Raises:
            PluginError: it failed, with its own words, or there is no answer in time.
        """
        self._call(method, kind, argument, seconds)
        self._decoder.skip()

    def ask_number(self, method: str, kind: Type, argument: object, seconds: float) -> int:
        """Call a method that returns a number; raise `PluginError` as `call`."""
        self._call(method, kind, argument, seconds)
        return self._decoder.number()
