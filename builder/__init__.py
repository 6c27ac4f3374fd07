"""The builder: `build`, `merge` and `unpack` images, as functions of paths and options."""

from builder.build import BuildOptions, BuildResult, SourceType, build
from builder.errors import BuildError
from builder.merge import MergeOptions, merge
from builder.prefetch import PrefetchPolicy
from builder.source.options import SourceOptions, WhiteoutSpec
from builder.unpack import unpack

__all__ = [
    "BuildError",
    "BuildOptions",
    "BuildResult",
    "MergeOptions",
    "PrefetchPolicy",
    "SourceOptions",
    "SourceType",
    "WhiteoutSpec",
    "build",
    "merge",
    "unpack",
]
