"""Why the helper does not mount, with the exit status that mount(8) documents."""

__all__ = ["EXIT_INTERRUPTED", "EXIT_MOUNT", "EXIT_SYSTEM", "EXIT_USAGE", "HelperError", "shown"]

EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_INTERRUPTED = 8
EXIT_MOUNT = 32

_SHOWN_BYTES = 256


class HelperError(Exception):
    """A failure in one line; `status` is the exit status of the helper."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def shown(value: bytes) -> str:
    """Return bytes as one line of ASCII that is not too long."""
    text = repr(value[:_SHOWN_BYTES])[2:-1]
    return f"{text}..." if len(value) > _SHOWN_BYTES else text
