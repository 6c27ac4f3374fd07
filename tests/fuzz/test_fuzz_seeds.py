"""Runs every fuzz target on its seeds, whole and cut, without atheris."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent
_TARGETS = [
    "fuzz_bootstrap",
    "fuzz_blobmeta",
    "fuzz_gzip",
    "fuzz_nbd",
    "fuzz_tables",
    "fuzz_tar",
    "fuzz_toc",
    "fuzz_v5",
    "fuzz_zran",
]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(_HERE))
    for name in ("harness", *_TARGETS):
        sys.modules.pop(name, None)
    monkeypatch.setattr(importlib.import_module("harness"), "instrument", contextlib.nullcontext)
    return importlib.import_module


@pytest.mark.parametrize("name", _TARGETS)
def test_target_takes_its_seeds(load, name):
    module = load(name)
    seeds = list(module.seeds())
    assert len(seeds) > 2
    for seed in seeds:
        for length in (0, 100, 1200, len(seed) // 2, len(seed)):
            module.target(seed[:length])
