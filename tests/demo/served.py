"""One running `nydusd`: started, asked through its API socket, and brought to an orderly end."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.demo.run import POLL_SECONDS, DemoError, Processes, ticker

__all__ = ["Nydusd"]

EXIT_SECONDS = 30.0
TERM_SECONDS = 15.0
_READY_POLL_SECONDS = 0.005


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Nydusd:
    """A daemon that serves one image.

    Args:
        command: how to start it, with `--apisock api`.
        api: path of the socket.
        log: file that takes what it says.
    """

    def __init__(self, command: Sequence[str], api: Path, log: Path) -> None:
        self.command = command
        self._api = api
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._patience: tuple[float, ...] = (EXIT_SECONDS, TERM_SECONDS)
        self.begin = 0.0

    def start(self, processes: Processes) -> None:
        """Start the process; `stop` has to follow whatever happens."""
        self.begin = time.monotonic()
        with self._log.open("wb") as log:
            processes.start(self.command, stderr=log.fileno(), registered=self._take)

    def _take(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait_until_mounted(self, timeout: float) -> float:
        """Return how many seconds it took; raise `DemoError` when it fails."""
        with ticker() as tick:
            while not self._is_running():
                if self._process is None or self._process.poll() is not None:
                    raise DemoError("nydusd cannot serve the image", self.log_lines())
                if time.monotonic() > self.begin + timeout:
                    raise DemoError("nydusd did not mount the image in time", self.log_lines())
                tick()
                time.sleep(_READY_POLL_SECONDS)
        return time.monotonic() - self.begin

    def _is_running(self) -> bool:
        try:
            return bool(self.get("daemon")["state"] == "RUNNING")
        except DemoError:
            return False

    def _request(self, method: str, path: str) -> bytes:
        connection = _Connection(self._api)
        try:
            connection.request(method, f"/api/v1/{path}")
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise DemoError(f"nydusd does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise DemoError(f"nydusd answers {method} {path} with status {answer.status}")
        return body

    def get(self, path: str) -> dict[str, Any]:
        """Return what the API says at a path; raise `DemoError`."""
        found: dict[str, Any] = json.loads(self._request("GET", path))
        return found

    def log_lines(self) -> list[str]:
        """Return the last lines of its log."""
        try:
            return self._log.read_text(errors="replace").splitlines()[-6:]
        except OSError:
            return []

    def stop(self) -> str | None:
        """Unmount and end it; never by force, because readers would see zeros."""
        process = self._process
        if process is None or process.poll() is not None:
            return None
        try:
            self._request("PUT", "daemon/exit")
        except DemoError:
            # It is not yet, or no longer, at its API.
            process.send_signal(signal.SIGTERM)
        for seconds in self._patience:
            if self._ended(process, seconds):
                return None
            process.send_signal(signal.SIGTERM)
        self._patience = ()
        return f"nydusd (process {process.pid}) runs until nobody uses its mount any more"

    @staticmethod
    def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
        end = time.monotonic() + seconds
        with ticker() as tick:
            while process.poll() is None and time.monotonic() < end:
                tick()
                time.sleep(POLL_SECONDS / 10)
        return process.poll() is not None
