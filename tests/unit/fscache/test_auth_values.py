"""Challenges, tokens and signed addresses as values."""

import json

import pytest

from fscache.backend import AuthError, BackendError
from fscache.backend.challenge import (
    Challenge,
    choose_challenge,
    parse_challenges,
    parse_token,
)
from fscache.backend.redirects import Targets, redirect_target, same_origin, seconds_left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("Basic", [Challenge("basic", {})]),
        ('Basic realm="a b"', [Challenge("basic", {"realm": "a b"})]),
        (
            'Bearer realm="https://t/x?y=1,2",service="s",scope="repository:a:pull,push"',
            [Challenge("bearer", {"realm": "https://t/x?y=1,2", "service": "s",
                                  "scope": "repository:a:pull,push"})],
        ),
        (
            'Negotiate, BASIC Realm = plain , Bearer realm="a\\"b" , error=x',
            [Challenge("negotiate", {}), Challenge("basic", {"realm": "plain"}),
             Challenge("bearer", {"realm": 'a"b', "error": "x"})],
        ),
        ('realm="lost"', []),
        ('Bearer realm="open', [Challenge("bearer", {})]),
        ("\x00\xff", []),
    ],
)  # fmt: skip
def test_challenges(text, expected):
    found = parse_challenges(text)
    assert [one for one in found if one.scheme != "realm"] == expected


def test_which_challenge_is_answered():
    assert choose_challenge([]) is None
    assert choose_challenge(["Negotiate", "Bearer"]) is None
    assert choose_challenge(["Basic", 'Bearer realm="r"']).scheme == "bearer"
    assert choose_challenge(['Digest realm="r"', "Basic"]).scheme == "basic"


@pytest.mark.parametrize("size", [100_000])
def test_long_challenges_end(size):
    for text in ('Bearer realm="' + "\\" * size, "a " * size, "," * size, 'x="' * size):
        parse_challenges(text)


@pytest.mark.parametrize(
    ("life", "chance", "renew_at", "expires_at"),
    [
        (600, 0.0, 580.0, 600.0),
        (600, 1.0, 520.0, 600.0),
        (None, 0.0, 580.0, 600.0),
        (-1, 0.0, 580.0, 600.0),
        (True, 0.0, 580.0, 600.0),
        ("600", 0.0, 580.0, 600.0),
        (36000, 1.0, 36000 - 320.0, 36000.0),
        (4, 0.0, 3.0, 4.0),
        (1e300, 0.0, 2592000.0 - 20, 2592000.0),
        (10**400, 0.0, 2592000.0 - 20, 2592000.0),
    ],
)
def test_when_a_token_is_renewed(life, chance, renew_at, expires_at):
    body = json.dumps({"token": "abc", "expires_in": life}).encode()
    token = parse_token(body, 1000.0, chance)
    assert token.authorization == "Bearer abc"
    assert token.renew_at == pytest.approx(1000.0 + renew_at)
    assert token.expires_at == pytest.approx(1000.0 + expires_at)


def test_access_token_is_another_name():
    assert parse_token(b'{"access_token": "x"}', 0.0, 0.0).authorization == "Bearer x"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"token": ""}', b'{"token": 3}', b'{"token": "a\\nb"}', b"\xff",
     b'{"token": "a b"}', b"[" * 100_000],
)  # fmt: skip
def test_answers_without_a_token(body):
    with pytest.raises(AuthError):
        parse_token(body, 0.0, 0.0)


NOW = 1_700_000_000.0  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("query", "left"),
    [
        ("", None),
        ("signature=x", None),
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=900&X-Amz-Signature=s", 900.0),
        ("X-Goog-Date=20231114T221220Z&X-Goog-Expires=900", 840.0),
        ("OSSAccessKeyId=a&Expires=1700000100&Signature=s", 100.0),
        ("se=2023-11-14T22%3A14%3A20Z&sig=s", 60.0),
        ("X-Amz-Expires=900", 0.0),
        ("X-Amz-Date=yesterday&X-Amz-Expires=900", 0.0),
        ("Expires=never", 0.0),
        ("Expires=" + "9" * 5000, 0.0),
        ("se=2023", 0.0),
    ],
)
def test_how_long_an_address_is_good(query, left):
    found = seconds_left(f"https://store/x?{query}", NOW)
    assert found == (left if left is None else pytest.approx(left))


def test_targets():
    clock = [NOW]
    targets = Targets(lambda: clock[0])
    for_ever, for_a_minute = "https://s/a", "https://s/b?Expires=1700000060"
    targets.remember("a", for_ever)
    targets.remember("b", for_a_minute)
    targets.remember("c", "https://s/c?Expires=1700000009")
    assert [targets.get(name) for name in "abc"] == [for_ever, for_a_minute, None]
    clock[0] += 50
    assert [targets.get(name) for name in "ab"] == [for_ever, None]
    targets.forget("a", "https://s/another")
    assert targets.get("a") == for_ever
    targets.forget("a", for_ever)
    assert targets.get("a") is None


@pytest.mark.parametrize(
    ("location", "scheme", "host", "expected"),
    [
        ("/x?s=1", "", "", "https://r:5000/x?s=1"),
        ("//s/x#f", "", "", "https://s/x"),
        ("https://s:99/x?s=1", "http", "", "http://s:99/x?s=1"),
        ("https://s:99/x", "", "cdn", "https://cdn:99/x"),
        ("https://s:99/x", "http", "cdn:1", "http://cdn:1/x"),
    ],
)
def test_redirect_targets(location, scheme, host, expected):
    assert redirect_target(location, "https://r:5000/v2/b", scheme, host) == expected


@pytest.mark.parametrize("location", [None, "", "file:///etc/passwd", "http:///x", "http://h:x/"])
def test_redirects_to_nowhere(location):
    with pytest.raises(BackendError) as caught:
        redirect_target(location, "https://r/", "", "")
    assert "passwd" not in str(caught.value)


def test_same_origin():
    assert same_origin("https://r:1/a", "https://r:1/b?c")
    for other in ("http://r:1/a", "https://r/a", "https://r:1.evil/a", "https://x@r:1/a"):
        assert not same_origin("https://r:1/a", other)
