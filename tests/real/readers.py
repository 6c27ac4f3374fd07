"""A container whose readers go on while daemons are killed below it, and say what they got.

Each part of the big file is read once, so that hardly any of it is in a cache before:
`open` reads on in a file that it has open from the start, `new` opens the file for each
piece and goes from the end towards the middle, `late` is a file of another layer. The
phases of both begin when the test says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.real.box import wait_for
from tests.real.rig import Rig
from tests.real.rootfs import BIG, PIECE, Layers

__all__ = ["Readers"]

LATE = "/data/added"
SECONDS = 120.0
NAME = "readers"

# The readers' lines are for one file, and each is one write. After an error the offset of an
# open file is anywhere, so that `open` ends then.
_SCRIPT = f"""
wait_for() {{ while [ ! -e $1 ]; do sleep 0.05; done; }}
say() {{
    line="$1 $2 $3"
    if read -r text </tmp/$1; then line="$1 $2 error $text"; fi
    echo "$line"
    [ -z "$text" ]
}}
open() {{
    while [ $open -lt $1 ]; do
        sum=$(dd bs={PIECE} count=1 status=none <&3 2>/tmp/open | sha256sum)
        say open $open "$sum" || {{ open=1000; return; }}
        open=$((open + 1))
    done
}}
new() {{
    while [ $new -ge $1 ]; do
        sum=$(dd if={BIG} bs={PIECE} skip=$new count=1 status=none 2>/tmp/new | sha256sum)
        say new $new "$sum"
        new=$((new - 1))
    done
}}
late() {{
    sum=$(sha256sum {LATE} 2>/tmp/late)
    say late 0 "$sum"
}}
exec 3<{BIG}
"""


def _phases(bounds: Sequence[int], count: int) -> str:
    """Return what the container runs: from 0 up to and from `count` down by these bounds."""
    opens = [f"wait_for /go{phase}; open {bound};" for phase, bound in enumerate(bounds)]
    news = [f"wait_for /go{phase}; new {count - bound};" for phase, bound in enumerate(bounds)]
    return (
        f"{_SCRIPT}open=0; new={count - 1}\n"
        f"{{ {' '.join(opens)} }} & {{ {' '.join(news)} }} & {{ wait_for /late; late; }} &\n"
        "sleep 1000\n"
    )


class Readers:
    """The container; it runs on until `remove`.

    Args:
        bounds: how many pieces each of `open` and `new` has read by the end of each phase.
    """

    def __init__(self, rig: Rig, reference: str, layers: Layers, bounds: Sequence[int]) -> None:
        self._rig = rig
        self.reference = reference
        self._bounds = bounds
        self._log = rig.root / f"{NAME}.log"
        pieces = layers.pieces()
        count = len(pieces)
        read = [("open", index) for index in range(max(bounds))]
        read += [("new", index) for index in range(count - max(bounds), count)]
        self._truth = {f"{name} {index}": f"{pieces[index]}  -" for name, index in read}
        self._truth["late 0"] = f"{layers.sums[LATE]}  {LATE}"
        script = _phases(bounds, count)
        rig.ctr(
            "run", "-d", "--log-uri", f"file://{self._log}", reference, NAME, "sh", "-c", script
        )

    def touch(self, path: str) -> None:
        """Make a file in the container."""
        # From outside: no program of the container has to be read for that.
        bundles = self._rig.root / "state/io.containerd.runtime.v2.task"
        inside = bundles / self._rig.root.name / NAME / "rootfs"
        (self._rig.box.top / f"{inside}{path}".lstrip("/")).touch()

    def begin(self, phase: int) -> None:
        """Let `open` and `new` go on."""
        self.touch(f"/go{phase}")

    def lines(self) -> list[str]:
        """Return what was said until now."""
        # The last one may not be complete yet.
        return self._log.read_text(errors="replace").rpartition("\n")[0].splitlines()

    def errors(self) -> list[str]:
        """Return what is not right data; raise `AssertionError` for wrong data."""
        errors = []
        for line in self.lines():
            name, index, text = line.split(" ", 2)
            if text.startswith("error "):
                errors.append(line)
            else:
                assert text == self._truth[f"{name} {index}"], line
        return errors

    def wait(self, phase: int, *, late: bool) -> None:
        """Wait for the end of a phase; raise `AssertionError` for an error or wrong data."""
        count = 2 * self._bounds[phase] + late

        def done() -> bool:
            assert not self.errors()
            return len(self.lines()) == count

        wait_for(f"end of phase {phase}", SECONDS, done)

    def remove(self) -> None:
        """Remove container and image."""
        self._rig.remove(self.reference, NAME)
