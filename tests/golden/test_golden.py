import importlib.util
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent


def _load():
    spec = importlib.util.spec_from_file_location("golden_make", _HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MAKE = _load()


@pytest.mark.parametrize("name", _MAKE.IMAGES)
def test_remaking_gives_the_golden_bytes(name):
    files = _MAKE.make(name)
    # The dump first: when bytes change, its difference names the field.
    dump = f"{name}.dump"
    assert files.pop(dump).decode() == (_HERE / dump).read_text()
    for file, content in files.items():
        assert content == (_HERE / file).read_bytes(), file
