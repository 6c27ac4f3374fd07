"""Reading any bytes as a blob, its tables and its ToC succeeds or raises FormatError."""

from harness import GOLDEN, instrument, run

with instrument():
    from readers import entry_at, read_blob


def target(data):
    """Read the input as a blob, alone and with an entry that its first bytes make up."""
    read_blob(data)
    read_blob(data[256:], entry_at(data))


def seeds():
    from erofs import open_bootstrap

    for name in ("plain", "toc"):
        blob = (GOLDEN / f"{name}.blob").read_bytes()
        yield blob
        yield open_bootstrap(GOLDEN / f"{name}.boot").blobs[0].pack() + blob


if __name__ == "__main__":
    run(target, seeds())
