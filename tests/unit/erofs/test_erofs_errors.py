import pytest

from erofs.errors import CorruptStructure, FormatError, NydusError, OutOfBounds, error_context


def test_text_has_places_then_reason():
    error = OutOfBounds("too long", offset=0x40, chunk=3, blob="ab", expected=4, got=b"x\n")
    assert str(error) == "blob ab, chunk 3, offset 0x40: too long: expected 4, got x\\n"
    assert error.reason == "too long: expected 4, got x\\n"


@pytest.mark.parametrize(
    ("where", "text"),
    [({}, "bad"), ({"got": 1}, "bad: got 1"), ({"path": "/a", "offset": None}, "/a: bad")],
)
def test_text_leaves_out_what_is_not_known(where, text):
    assert str(FormatError("bad", **where)) == text


def test_context_adds_but_does_not_replace():
    with (
        pytest.raises(CorruptStructure) as caught,
        error_context(path="/image", blob=1),
        error_context(blob=0),
    ):
        raise CorruptStructure("bad")
    assert str(caught.value) == "/image, blob 0: bad"
    assert isinstance(caught.value, NydusError)
    assert caught.value.exit_code == 1
