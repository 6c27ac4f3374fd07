"""Values behave as frozen dataclasses do, where the code relies on it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from erofs.values import EMPTY, Value, field


class Base(Value, kw_only=True):
    limit: int = 3
    secret: str = field(default="", repr=False)


class Place(Base):
    host: str
    port: int = 80
    note: str = field(default="", compare=False)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def test_fields_by_place_and_by_name() -> None:
    place = Place("a", 1, limit=5)
    assert (place.host, place.port, place.limit, place.secret) == ("a", 1, 5, "")
    assert place == Place(host="a", port=1, limit=5)
    assert place.address == "a:1"
    assert place._asdict() == {
        "limit": 5, "secret": "", "host": "a", "port": 1, "note": ""
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((), {}),
        (("a", 1, "n", 4), {}),
        (("a",), {"host": "b"}),
        (("a",), {"other": 1}),
    ],
)
def test_wrong_arguments_are_refused(values: tuple[object, ...], named: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        Place(*values, **named)


def test_a_value_is_frozen() -> None:
    place = Place("a")
    with pytest.raises(AttributeError):
        place.host = "b"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del place.host
    with pytest.raises(AttributeError):
        place.other = 1  # type: ignore[attr-defined]


def test_replace_makes_another_value() -> None:
    place = Place("a", secret="s")
    other = place._replace(port=8)
    assert (other.host, other.port, other.secret, place.port) == ("a", 8, "s", 80)
    with pytest.raises(TypeError):
        place._replace(prot=8)


def test_equality_goes_by_type_and_compared_fields() -> None:
    assert Place("a", note="x") == Place("a", note="y")
    assert hash(Place("a", note="x")) == hash(Place("a", note="y"))
    assert Place("a", secret="x") != Place("a")
    assert Place("a") != ("a", 80)
    assert Base() != Place("a")


def test_secrets_are_not_shown() -> None:
    assert repr(Place("a", secret="hush")) == "Place(limit=3, host='a', port=80, note='')"
    assert EMPTY == {}


def test_a_daemon_starts_without_dataclasses() -> None:
    """They, and `inspect` with them, cost a quarter of a start."""
    program = (
        "import sys, fscache.cli.nydusd, fscache.api.server, fscache.api.routes\n"
        "print([name for name in ('dataclasses', 'inspect') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
