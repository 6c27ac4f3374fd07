"""What can go wrong with the lab itself, as opposed to the command in the guest."""

from __future__ import annotations

__all__ = ["GuestDied", "GuestTimeout", "LabError"]


class LabError(Exception):
    """The lab could not do what was asked; the message says why and what helps."""


class GuestDied(LabError):
    """The virtual machine ended by itself; `console` has the end of the kernel's messages."""

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(message)
        self.console = console

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; the console's last lines:\n{self.console}" if self.console else message


class GuestTimeout(GuestDied):
    """A command, or booting, took longer than allowed; the virtual machine has been killed."""
