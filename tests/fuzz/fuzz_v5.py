"""Reading any bytes as RAFS v5 succeeds or raises FormatError; what translates opens as v6."""

from harness import instrument, run

with instrument():
    from readers_v5 import read_v5


def target(data):
    """Read the input as it is, and behind the superblock of an image that is as long."""
    read_v5(data)
    if len(data) > 96:
        read_v5(data[:80] + bytes(8112) + data[80 : len(data) - len(data) % 8])


def _short(image, **options):
    """Return an image without the unused part of its superblock."""
    data = image.finish(**options)
    return data[:80] + data[8192:]


def seeds():
    import tinyv5

    for options in ({}, {"extended": False}, {"early": True}):
        image = tinyv5.everything(**options)
        yield image.finish([image.root])
        yield _short(tinyv5.everything(**options))
    yield _short(tinyv5.TinyV5())


if __name__ == "__main__":
    run(target, seeds())
