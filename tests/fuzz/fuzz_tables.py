"""Reading any bytes as a compression table succeeds or raises FormatError."""

from harness import instrument, run

with instrument():
    from readers import read_table


def target(data):
    """Read the input as a cached table, and as a table of every kind behind its header."""
    read_table(data)


def seeds():
    from erofs.blobmeta import CiFlags, CompressionInfoV2, CompressionTableHeader
    from erofs.citable import pack_cached
    from erofs.contexts import BatchContext, ZranContext
    from erofs.rafs import BlobFeatures as Features

    batch = CiFlags.COMPRESSED | CiFlags.BATCH
    zran = CiFlags.COMPRESSED | CiFlags.ZRAN
    for feature, entries, context, tail in (
        (
            Features.BATCH,
            [
                CompressionInfoV2(0, 100, 0, 0, batch, 0, 0),
                CompressionInfoV2(0x1000, 50, 0, 0, batch, 100, 0),
                CompressionInfoV2(0x2000, 4096, 60, 4096, CiFlags.HAS_CRC, 7, 0),
            ],
            BatchContext(60, 150),
            b"",
        ),
        (
            Features.ZRAN,
            [CompressionInfoV2(0, 100, 10, 50, zran, 512, 0)],
            ZranContext(10, 0, 0, 500, 4000, 4, 0x67, 5),
            b"dict",
        ),
    ):
        table = b"".join(item.pack() for item in (*entries, context)) + tail
        size = 24 * len(entries)
        header = CompressionTableHeader(
            feature | Features.CHUNK_INFO_V2, 0, len(entries), 0x10000, len(table), len(table),
            size, len(table) - size, 1,
        ).pack()  # fmt: skip
        yield pack_cached(table, header)
        yield header[:60] + table


if __name__ == "__main__":
    run(target, seeds())
