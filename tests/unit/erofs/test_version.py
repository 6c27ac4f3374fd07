"""The version that programs tell is the package's."""

from __future__ import annotations

import tomllib
from pathlib import Path

from erofs.version import VERSION


def test_version_is_that_of_the_project() -> None:
    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == VERSION
