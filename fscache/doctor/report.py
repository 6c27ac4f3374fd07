"""`nydusd doctor`: the table of what is possible here, and which way would be taken.

The end of the program is 0 when images can be read lazily from the directory, else 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fscache.doctor.checks import Row, Transport, rows, transports
from fscache.doctor.facts import Facts, gather

__all__ = ["Report", "diagnose", "doctor"]


class Report(NamedTuple):
    """Everything that `nydusd doctor` has to say.

    Args:
        facts: what was looked at.
        rows: the table.
        ways: how data get to the kernel, the best first.
        chosen: the one that would be taken, None when there is none.
    """

    facts: Facts
    rows: Sequence[Row]
    ways: Sequence[Transport]
    chosen: Transport | None

    @property
    def lazy(self) -> bool:
        """Whether images can be read lazily."""
        return self.chosen is not None and self.chosen.lazy

    @property
    def reason(self) -> str:
        """Why this way, in a sentence for people."""
        if self.chosen is None:
            return "no image can be mounted here: see above for what is missing"
        if self.chosen is self.ways[0]:
            return "the best one, and it was tried"
        missing = next(row for row in self.rows if row.verdict == "no")
        return f"better ones are not there, first of all: {missing.name} ({missing.found})"

    def as_dict(self) -> dict[str, object]:
        """Return what `--json` prints."""
        return {
            "kernel": self.facts.release,
            "machine": self.facts.machine,
            "work_dir": str(self.facts.work_dir),
            "filesystem": self.facts.filesystem,
            "free_bytes": self.facts.free_bytes,
            "checks": [row._asdict() for row in self.rows],
            "transports": [way._asdict() for way in self.ways],
            "chosen": self.chosen.name if self.chosen else None,
            "reason": self.reason,
            "lazy": self.lazy,
        }

    def as_text(self) -> str:
        """Return the table."""
        lines = [f"{'CHECK':<22}{'':<6}FOUND"]
        for row in self.rows:
            lines.append(f"{row.name:<22}{row.verdict:<6}{row.found}")
            lines.append(f"{'':<28}{row.meaning}")
            if row.remedy:
                lines.append(f"{'':<28}-> {row.remedy}")
        name = self.chosen.name if self.chosen else "none"
        lines += ["", f"Transport: {name}", f"  {self.reason}"]
        names = ", ".join(way.name for way in self.ways if way.possible and not way.served)
        if names:
            lines.append(f"  this kernel would allow, but this version does not use: {names}")
        lines.append(f"Lazy reading: {'yes' if self.lazy else 'no'}")
        return "\n".join(lines)


def diagnose(facts: Facts) -> Report:
    """Return the report about facts."""
    ways = transports(facts)
    chosen = next((way for way in ways if way.possible and way.served), None)
    return Report(facts, rows(facts), ways, chosen)


def doctor(work_dir: Path, *, as_json: bool) -> int:
    """Print the report about this machine and a cache directory, and return the exit status.

    Raises `OSError` for a directory that cannot be used.
    """
    report = diagnose(gather(work_dir))
    try:
        print(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text(), flush=True)
    except BrokenPipeError:
        # Whoever read the table has seen enough; the verdict is the same.
        sys.stdout = None
    return 0 if report.lazy else 1
