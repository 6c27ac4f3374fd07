"""The ring of errors: what it keeps, in the original's form."""

import json
import logging
import re

import pytest

from fscache.events import MAX_ERRORS, MAX_SIZE, ErrorRing


@pytest.fixture
def ring():
    logger = logging.getLogger("fscache.test_events")
    ring = ErrorRing()
    logger.addHandler(ring)
    yield ring, logger
    logger.removeHandler(ring)


def test_messages_have_the_form_of_the_recordings(ring):
    ring, logger = ring
    logger.warning("not an error")
    logger.error("blob %s is gone", "abc")
    answer = ring.as_dict()
    (text,) = answer["errors"]
    # As in backend-errors.txt: "Sun, 22 Nov 2026 03:01:58 GMT - ..."
    assert re.fullmatch(
        r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT - blob abc is gone", text
    )
    assert answer == {
        "max_errors": 500,
        "total_errors": 1,
        "max_size": 51200,
        "total_size": len(text),
        "errors": [text],
    }
    assert ring.count == 1


def test_tracebacks_are_left_out(ring):
    ring, logger = ring
    try:
        raise ValueError("inside")
    except ValueError:
        logger.exception("it failed")
    assert ring.as_dict()["errors"][0].endswith(" GMT - it failed")


def test_oldest_go_by_number(ring):
    ring, logger = ring
    for number in range(MAX_ERRORS + 7):
        logger.error("%d", number)
    answer = ring.as_dict()
    assert answer["total_errors"] == len(answer["errors"]) == MAX_ERRORS
    assert answer["errors"][0].endswith(" - 7")
    assert answer["total_size"] == sum(map(len, answer["errors"]))
    assert ring.count == MAX_ERRORS + 7


@pytest.mark.parametrize(
    "text", ["x" * 1000, "\xe4" * 1000, "y" * (MAX_SIZE * 2), "\xe9" * MAX_SIZE]
)
def test_oldest_go_by_bytes(ring, text):
    ring, logger = ring
    for _ in range(100):
        logger.error(text)
    answer = ring.as_dict()
    assert answer["errors"]
    size = sum(len(error.encode()) for error in answer["errors"])
    # Half a character at the end of a cut message is counted and not shown.
    assert size <= answer["total_size"] <= min(MAX_SIZE, size + 1)


def test_any_message_is_json(ring):
    ring, logger = ring
    logger.error("bad name \udcff, and %s", "\n\0")
    text = json.dumps(ring.as_dict())
    text.encode("utf-8")
    assert "bad name \\\\udcff" in text


def test_wrong_arguments_of_a_message_end_no_thread(ring, capsys, monkeypatch):
    ring, logger = ring
    monkeypatch.setattr(logger, "propagate", False)
    logger.error("%d", "no number")
    assert ring.as_dict()["total_errors"] == 0
    assert "no number" in capsys.readouterr().err
