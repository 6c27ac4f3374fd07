"""The one error of this package: texts that a VM runtime could not use, or that lie."""

from __future__ import annotations

from erofs.errors import FormatError

__all__ = ["OptionError"]


class OptionError(FormatError):
    """An option, a mount list or a disk description that breaks its contract.

    Says which field it is and what was expected; no content that may be a secret.
    """
