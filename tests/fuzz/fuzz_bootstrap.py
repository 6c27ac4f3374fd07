"""Reading any bytes as an image succeeds or raises FormatError; check and dump never raise."""

from harness import GOLDEN, instrument, run

with instrument():
    from readers import read_bootstrap, read_image


def target(data):
    read_image(data)
    read_bootstrap(data)


def seeds():
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.boot"))]


if __name__ == "__main__":
    run(target, seeds())
