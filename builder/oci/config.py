"""The configuration of an image: what runs in it, and the layers by their uncompressed digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from builder.oci.errors import ImageError
from builder.oci.records import Platform, check_digest, go_json, parse_json

__all__ = ["ImageConfig", "history_entry"]

# Members in the order of the specification's own program; which of them are left out when empty.
_TOP = (
    "created", "author", "architecture", "os", "os.version", "os.features", "variant", "config",
    "rootfs", "history",
)  # fmt: skip
_TOP_KEPT = {"architecture", "os", "config", "rootfs"}
_RUN = (
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels",
    "StopSignal", "ArgsEscaped",
)  # fmt: skip
_SORTED = {"ExposedPorts", "Volumes", "Labels"}
_HISTORY = ("created", "created_by", "author", "comment", "empty_layer")


def _ordered(
    value: Mapping[str, Any], names: Sequence[str], kept: set[str] | frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return known members in order, empty ones left out, then the others as they come."""
    known = {name: value[name] for name in names if value.get(name) or name in value.keys() & kept}
    return known | {name: item for name, item in value.items() if name not in names}


def history_entry(comment: str) -> dict[str, str]:
    """Return the line of the history for a layer that the converter adds."""
    return {"created_by": "Nydus Converter", "comment": comment}


class ImageConfig:
    """A configuration; members that nobody knows are kept.

    Args:
        values: checked members.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode; raise `ImageError`."""
        values = parse_json(data, "configuration of the image")
        root = values.get("rootfs")
        digests = root.get("diff_ids") if isinstance(root, dict) else {}
        if digests is not None and not isinstance(digests, list):
            raise ImageError("configuration of the image has no rootfs")
        for digest in digests or []:
            check_digest(digest)
        history = values.get("history")
        history = [] if history is None else history
        if not isinstance(history, list) or not all(isinstance(one, dict) for one in history):
            raise ImageError("configuration of the image has a wrong history")
        run = values.get("config")
        if run is not None and not isinstance(run, dict):
            raise ImageError("configuration of the image has a wrong config")
        return cls(values)

    @property
    def diff_ids(self) -> list[str]:
        """Digests of the uncompressed layers."""
        return list(self.values["rootfs"].get("diff_ids") or [])

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was done to the image, oldest first."""
        return list(self.values.get("history") or [])

    @property
    def platform(self) -> Platform:
        """What the image runs on; raise `ImageError`."""
        return Platform.from_json(self.values)

    def with_layers(
        self, diff_ids: Sequence[str], history: Sequence[Mapping[str, Any]]
    ) -> ImageConfig:
        """Return a copy for other layers."""
        root = {"type": "layers", "diff_ids": list(diff_ids)}
        return ImageConfig({**self.values, "rootfs": root, "history": list(history)})

    def without_layers(self) -> dict[str, Any]:
        """Return what does not depend on layers, to compare."""
        values = self._in_order()
        return {name: values[name] for name in values if name not in ("rootfs", "history")}

    def pack(self, indent: int | None = None) -> bytes:
        """Encode."""
        return go_json(self._in_order(), indent)

    def _in_order(self) -> dict[str, Any]:
        values = {"architecture": "", "os": "", "config": {}, **self.values}
        run = _ordered(values["config"] or {}, _RUN)
        for name in _SORTED & run.keys():
            if isinstance(run[name], dict):
                run[name] = dict(sorted(run[name].items()))
        values["config"] = run
        values["history"] = [_ordered(one, _HISTORY) for one in self.history]
        values["rootfs"] = {"type": "layers", "diff_ids": self.diff_ids}
        return _ordered(values, _TOP, _TOP_KEPT)
