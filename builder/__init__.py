"""The builder: `build`, `merge`, `unpack` and `export_block`, from paths and options."""

from builder.build import BuildOptions, BuildResult, SourceType, build
from builder.errors import BuildError
from builder.export import ExportOptions, ExportResult, VerityOptions, export_block
from builder.merge import MergeOptions, merge
from builder.prefetch import PrefetchPolicy
from builder.source.options import SourceOptions, WhiteoutSpec
from builder.unpack import unpack

__all__ = [
    "BuildError",
    "BuildOptions",
    "BuildResult",
    "ExportOptions",
    "ExportResult",
    "MergeOptions",
    "PrefetchPolicy",
    "SourceOptions",
    "SourceType",
    "VerityOptions",
    "WhiteoutSpec",
    "build",
    "export_block",
    "merge",
    "unpack",
]
