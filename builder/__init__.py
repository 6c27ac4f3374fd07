"""The builder: `build`, `merge`, `unpack` and `export_block`, from paths and options.

The names below are loaded with their modules when they are used for the first time: a command
line that starts needs few of them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.build import build
    from builder.compact import CompactOptions, compact
    from builder.dictgenerate import DictionaryOptions, generate_dictionary
    from builder.errors import BuildError
    from builder.export import ExportOptions, ExportResult, VerityOptions, export_block
    from builder.merge import MergeOptions, merge
    from builder.optimize import FileRanges, OptimizeOptions, optimize
    from builder.options import BuildOptions, BuildResult, SourceType
    from builder.prefetch import PrefetchPolicy
    from builder.source.options import SourceOptions, WhiteoutSpec
    from builder.unpack import unpack

__all__ = [
    "BuildError",
    "BuildOptions",
    "BuildResult",
    "CompactOptions",
    "DictionaryOptions",
    "ExportOptions",
    "ExportResult",
    "FileRanges",
    "MergeOptions",
    "OptimizeOptions",
    "PrefetchPolicy",
    "SourceOptions",
    "SourceType",
    "VerityOptions",
    "WhiteoutSpec",
    "build",
    "compact",
    "export_block",
    "generate_dictionary",
    "merge",
    "optimize",
    "unpack",
]

_NAMES_BY_MODULE = {
    "build": "build",
    "compact": "CompactOptions compact",
    "dictgenerate": "DictionaryOptions generate_dictionary",
    "errors": "BuildError",
    "export": "ExportOptions ExportResult VerityOptions export_block",
    "merge": "MergeOptions merge",
    "optimize": "FileRanges OptimizeOptions optimize",
    "options": "BuildOptions BuildResult SourceType",
    "prefetch": "PrefetchPolicy",
    "source.options": "SourceOptions WhiteoutSpec",
    "unpack": "unpack",
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()}


class _Package(ModuleType):
    """Keeps modules of the package from hiding the functions that are called like them."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
