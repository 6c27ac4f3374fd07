"""The sub-command among the words of nydusd, wherever it stands."""

import argparse

import pytest

from fscache import __main__ as program
from fscache.cli import nydusd
from fscache.cli.words import takes_value


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-M m --transport fuse", "fuse -M m --transport fuse"),
        ("-M m --transport nbd -B b", "fuse -M m --transport nbd -B b"),
        ("--id singleton --supervisor s -M m", "fuse --id singleton --supervisor s -M m"),
        ("--transport fuse erofs -M m", "erofs --transport fuse -M m"),
        ("--apisock a singleton", "singleton --apisock a"),
        ("--apisock=a singleton", "singleton --apisock=a"),
        ("-Aa singleton --upgrade", "singleton -Aa --upgrade"),
        ("--upgrade singleton -A a", "singleton --upgrade -A a"),
        ("--eager fuse -M m", "fuse --eager -M m"),
        ("--writable -M m", "fuse --writable -M m"),
        ("singleton --id fuse --supervisor s", "singleton --id fuse --supervisor s"),
        ("--help", "--help"),
        ("help singleton", "singleton --help"),
    ],
)
def test_where_the_command_stands(words, expected):
    assert nydusd._with_command(words.split()) == expected.split()


@pytest.mark.parametrize("command", list(nydusd._COMMANDS))
def test_every_option_is_known_to_have_a_value_or_none(command):
    """The list of switches is that of all parsers."""
    parser = nydusd._parser(command)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for action in commands.choices[command]._actions:
        for option in action.option_strings:
            assert takes_value(option) == (action.nargs is None), option


def test_interrupted_while_it_is_loaded(monkeypatch, capsys):
    """As by Ctrl-C at once: one line, and the status of a program that SIGINT has ended."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(program.gc, "disable", lambda: None)
    monkeypatch.setattr(nydusd, "main", interrupted)
    assert program.main() == 130
    assert capsys.readouterr().err == "Error: interrupted before anything was begun\n"
