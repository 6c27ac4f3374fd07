"""What the fuzz targets share: seeds, and how atheris is run.

A target states its invariant in its first line. Run one as
`python tests/fuzz/fuzz_bootstrap.py -max_total_time=60`; found inputs are left in the
working directory.
"""

import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
GOLDEN = _ROOT / "tests" / "golden"
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]


def run(target, seeds):
    """Fuzz `target` with libFuzzer's arguments, starting from `seeds` (bytes)."""
    import atheris

    with tempfile.TemporaryDirectory(prefix="fuzz-") as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], target)
        atheris.Fuzz()


def instrument():
    """Return the context in which the code under test is imported."""
    import atheris

    return atheris.instrument_imports(include=["erofs", "builder", "fscache"])
