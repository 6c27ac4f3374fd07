"""RAFS v5, read only: records, reader, check. `erofs.translate` makes v6 metadata of it.

Nothing here writes v5. Source of the layout: the published images, and the facts of the
original's `rafs/src/metadata/layout/v5.rs`. The public names are in `erofs`.
"""
