"""A hook plug-in as a process: started, greeted, called, and ended whatever happens.

Source: hashicorp/go-plugin 1.6 ("internals", protocol net/rpc): the program gets a cookie by its
environment and prints one line, `1|1|unix|ADDRESS|netrpc`. The first stream is for control, the
next two bring what the program prints.
"""

from __future__ import annotations

import logging
import queue
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from builder.convert.driver import HookImage
from builder.nydusify.hook.errors import PluginError
from builder.nydusify.hook.gob import BOOL, INT, STRING, SliceOf, Struct
from builder.nydusify.hook.rpc import Client
from builder.nydusify.hook.yamux import Session
from erofs.errors import error_context

__all__ = ["VARIABLE", "HookPlugin"]

logger = logging.getLogger(__name__)

VARIABLE = "NYDUS_HOOK_PLUGIN_PATH"
_COOKIE = {"NYDUS_HOOK_PLUGIN": "nydus-hook-plugin"}
_CORE_VERSION = APP_VERSION = "1"
_START_SECONDS = 60.0
_SHORT_SECONDS = 10.0
# What a hook does is its own affair; without any limit a broken one would hold a build for ever.
_CALL_SECONDS = 1800.0
_END_SECONDS = 2.0
_LINE_MAX = 4096
_STREAM_NUMBER = struct.Struct("<I")
_BLOB = Struct("Blob", {"ID": STRING, "Size": INT})
_INFO = Struct(
    "Info",
    {
        "BootstrapPath": STRING,
        "SourceRef": STRING,
        "TargetRef": STRING,
        "Blobs": SliceOf(_BLOB),
    },
)


class HookPlugin:
    """A plug-in that runs; `close` ends it.

    Args:
        path: of the program.
        environment: of the program.
        call_seconds: what a call may take.

    Raises:
        PluginError: it cannot be started, or is no hook plug-in.
    """

    def __init__(
        self, path: Path, environment: Mapping[str, str], call_seconds: float = _CALL_SECONDS
    ) -> None:
        self._path = path
        self._call_seconds = call_seconds
        self._session: Session | None = None
        self._control: Client | None = None
        # As by the real host: a plug-in that is killed leaves its socket behind.
        self._sockets = tempfile.TemporaryDirectory(prefix="hook-")
        try:
            self._process = self._start(environment)
        except BaseException:
            self._sockets.cleanup()
            raise
        try:
            with error_context(path=path):
                self._hook = self._connect(self._handshake())
        except BaseException:
            self.close()
            raise
        logger.info("[HOOK] Loaded hook plugin %s", path)

    def before_push(self, image: HookImage) -> None:
        """Tell of an image whose manifest is to be pushed; raise `PluginError` if it may not."""
        self._call("BeforePushManifest", image)

    def after_push(self, image: HookImage) -> None:
        """Tell of an image whose manifest was pushed; raise `PluginError`."""
        self._call("AfterPushManifest", image)

    def close(self) -> None:
        """Ask the program to end, and kill it when it does not."""
        try:
            if self._control is not None:
                # It may end before it answers.
                with suppress(PluginError):
                    self._control.call("Control.Quit", BOOL, True, _END_SECONDS)
                self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("[HOOK] plug-in %s does not end and is killed", self._path)
        finally:
            self._process.kill()
            self._process.wait()
            if self._session is not None:
                self._session.close()
            self._sockets.cleanup()
            for thread in self._threads:
                # What the program has started may hold its pipes open.
                thread.join(_END_SECONDS)

    def _start(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                [self._path.absolute()],
                env={
                    **environment, **_COOKIE, "PLUGIN_PROTOCOL_VERSIONS": APP_VERSION,
                    "PLUGIN_MIN_PORT": "10000", "PLUGIN_MAX_PORT": "25000",
                    "PLUGIN_UNIX_SOCKET_DIR": self._sockets.name,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            raise PluginError(
                f"hook plug-in cannot be started ({error.strerror})", path=self._path
            ) from error
        self._first_line: queue.Queue[bytes] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._drain, args=words, name="hook", daemon=True)
            for words in ((process.stdout, self._first_line), (process.stderr, None))
        ]
        for thread in self._threads:
            thread.start()
        return process

    @staticmethod
    def _drain(pipe: IO[bytes], first: queue.Queue[bytes] | None) -> None:
        """Log what a pipe brings, but for a first line that somebody waits for."""
        with pipe:
            if first is not None:
                first.put(pipe.readline(_LINE_MAX))
            while line := pipe.readline(_LINE_MAX):
                _log(line)

    def _handshake(self) -> str:
        """Return where the program listens; raise `PluginError`."""
        try:
            line = self._first_line.get(timeout=_START_SECONDS)
        except queue.Empty:
            raise PluginError("hook plug-in says nothing", expected="its address") from None
        words = line.decode("utf-8", "replace").strip().split("|")
        # The protocol came later than the others, and has a default.
        words += ["netrpc"] * (5 - len(words))
        if len(words) > 7 or words[0] != _CORE_VERSION or not all(words[:5]):
            raise PluginError(
                "no plug-in of go-plugin", expected="1|1|unix|ADDRESS|netrpc",
                got=ascii(line[:200]),
            )  # fmt: skip
        if words[1] != APP_VERSION:
            raise PluginError("plug-in of another version", expected=APP_VERSION, got=words[1])
        if (words[2], words[4]) != ("unix", "netrpc") or any(words[5:6]):
            raise PluginError(
                "plug-in wants another transport", expected="unix, netrpc, no TLS",
                got=ascii("|".join(words)),
            )  # fmt: skip
        return words[3]

    def _connect(self, address: str) -> Client:
        """Return what calls the hook; raise `PluginError`."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_SHORT_SECONDS)
            connection.connect(address)
            connection.settimeout(None)
        except (OSError, ValueError) as error:
            connection.close()
            raise PluginError(f"plug-in does not listen where it says ({error})") from error
        session = self._session = Session(connection)
        self._control = Client(session.open())
        for _ in range(2):
            session.open(_log)
        number = self._control.ask_number("Dispenser.Dispense", STRING, "hook", _SHORT_SECONDS)
        if number >= 1 << 32:
            raise PluginError("plug-in names an impossible stream", got=number)
        stream = session.open()
        word, deadline = _STREAM_NUMBER.pack(number), time.monotonic() + _SHORT_SECONDS
        stream.write(word, deadline)
        if stream.read(_STREAM_NUMBER.size, deadline) != word:
            raise PluginError("plug-in acknowledges another stream", expected=number)
        return Client(stream)

    def _call(self, method: str, image: HookImage) -> None:
        logger.info("[HOOK] Call hook '%s'", method)
        info = {
            "BootstrapPath": str(image.bootstrap.absolute()),
            "SourceRef": image.source,
            "TargetRef": image.target,
            "Blobs": [{"ID": name, "Size": size} for name, size in image.blobs],
        }
        try:
            self._hook.call(f"Plugin.{method}", _INFO, info, self._call_seconds)
        except PluginError as error:
            raise PluginError(f"Failed to call hook '{method}': {error}") from error


def _log(data: bytes) -> None:
    text = data.decode("utf-8", "replace").rstrip()
    if text:
        logger.debug("[HOOK] plug-in says: %s", text[:_LINE_MAX])
