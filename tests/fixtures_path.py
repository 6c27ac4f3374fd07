"""Where the shared fixtures are, and the mark of tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
FIXTURES = Path(os.environ.get("NYDUS_FIXTURES", _DEFAULT))

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES}, set NYDUS_FIXTURES"
)
