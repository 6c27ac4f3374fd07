import importlib.util
import re
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent


def _load():
    spec = importlib.util.spec_from_file_location("golden_make", _HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MAKE = _load()


@pytest.mark.parametrize("name", [*_MAKE.IMAGES, *_MAKE.BUILT])
def test_remaking_gives_the_golden_bytes(name):
    files = _MAKE.make(name)
    # The dump first: when bytes change, its difference names the field.
    dump = f"{name}.dump"
    assert files.pop(dump).decode() == (_HERE / dump).read_text()
    for file, content in files.items():
        assert content == (_HERE / file).read_bytes(), file


_DOCS = _HERE.parents[1] / "docs" / "format"
_BLOCK = re.compile(r"^```text (\w+\.dump)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", sorted(path.name for path in _DOCS.glob("*.md")))
def test_dumps_in_the_manual_are_those_of_the_images(page):
    """In their order; lines may be left out."""
    text = (_DOCS / page).read_text("utf-8")
    blocks = _BLOCK.findall(text)
    assert blocks or page in ("README.md", "cache.md", "v5.md", "disk.md")
    for dump, lines in blocks:
        rest = iter((_HERE / dump).read_text().splitlines())
        missing = [line for line in lines.splitlines() if line not in rest]
        assert missing == [], (page, dump)
    names = set(re.findall(r"\]\(([a-z0-9-]+\.md)\)", text))
    assert {name for name in names if not (_DOCS / name).exists()} == set()
