"""The command line of `nydus-backend-proxy` (tools section 14)."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from erofs.console import CommandParser, set_up_logging
from erofs.version import VERSION
from fscache.backendproxy import BackendProxy, ProxyError

__all__ = ["main"]

logger = logging.getLogger(__name__)

ENDING = (signal.SIGINT, signal.SIGTERM)
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = "8000"
MAX_PORT = 65535


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="nydus-backend-proxy",
        description="A simple HTTP server to provide a fake container registry for nydusd",
        epilog="ROCKET_ADDRESS (default 127.0.0.1) and ROCKET_PORT (default 8000) of the"
        " environment say where to listen.",
    )
    parser.add_argument(
        "-b", "--blobsdir", required=True, metavar="<blobsdir>",
        help="path to directory hosting nydus blob files",
    )  # fmt: skip
    parser.add_argument(
        "-V", "--version", action="version", version=f"%(prog)s {VERSION}",
        help="Print version",
    )  # fmt: skip
    return parser


def _listen_at(environment: Mapping[str, str]) -> tuple[IPv4Address | IPv6Address, int]:
    """Return address and port of the original's framework variables; raise `ProxyError`."""
    text = environment.get("ROCKET_ADDRESS", DEFAULT_ADDRESS)
    try:
        address = ip_address(text)
    except ValueError as error:
        raise ProxyError("ROCKET_ADDRESS", expected="an IP address", got=ascii(text)) from error
    port = environment.get("ROCKET_PORT", DEFAULT_PORT)
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= MAX_PORT):
        raise ProxyError("ROCKET_PORT", expected=f"a port, 0 to {MAX_PORT}", got=ascii(port))
    return address, int(port)


def _serve(directory: Path) -> None:
    address, port = _listen_at(os.environ)
    # Threads inherit the mask, so a signal waits for `sigwait` from the start on.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    proxy = BackendProxy(directory, address, port)
    try:
        logger.info("serving %s at %s", directory, proxy.url)
        number = signal.sigwait(ENDING)
        logger.info("%s, ending", signal.Signals(number).name)
    finally:
        proxy.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.blobsdir:
        parser.error("a value is required for '--blobsdir <blobsdir>' but none was supplied")
    set_up_logging("info", None)
    try:
        _serve(Path(arguments.blobsdir))
    except ProxyError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
