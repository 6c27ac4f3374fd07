"""Flags as the real tool has them: one table drives parsing, environment and help.

`-name` and `--name` are the same, values follow a space or `=`, and nearly every flag can be
given by a variable of the environment (spec tools 15).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from erofs.errors import NydusError

__all__ = ["Command", "Flag", "UsageError", "Values", "missing_flags", "parse_flags"]

_TRUE = ("1", "t", "true", "yes")
_FALSE = ("0", "f", "false", "no", "")


class UsageError(NydusError):
    """Words that are not understood; `shows_help` when the help belongs to the message."""

    def __init__(self, what: str, *, shows_help: bool = False) -> None:
        super().__init__(what)
        self.shows_help = shows_help


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Args:
        name: without dashes.
        help: what it is for.
        default: also gives the type: text, bool, int, or a tuple for what may be repeated.
        aliases: further names.
        env: variable of the environment; None for the usual one, empty for none.
        required: whether there is no use without it.
        hidden: left out of the help.
    """

    name: str
    help: str = ""
    default: str | bool | int | tuple[str, ...] = ""
    aliases: tuple[str, ...] = ()
    env: str | None = None
    required: bool = False
    hidden: bool = False

    @property
    def variable(self) -> str:
        """The variable of the environment, empty for none."""
        if self.env is not None:
            return self.env
        name = self.name
        for end in ("backend-type", "backend-config", "backend-config-file"):
            if name.endswith(f"-{end}"):
                name = end
        return name.upper().replace("-", "_")

    def read(self, text: str) -> str | bool | int:
        """Return a value; raise `UsageError` for text of the wrong type."""
        if isinstance(self.default, bool):
            if text.lower() in _TRUE:
                return True
            if text.lower() in _FALSE:
                return False
            raise UsageError(f'invalid boolean value "{text}" for -{self.name}')
        if isinstance(self.default, int):
            try:
                return int(text, 0)
            except ValueError:
                raise UsageError(
                    f'invalid value "{text}" for flag -{self.name}: parse error'
                ) from None
        return text


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command: its names, what it is for, its flags, and what runs it."""

    name: str
    usage: str
    flags: tuple[Flag, ...]
    aliases: tuple[str, ...] = ()

    def help_text(self) -> str:
        """Return the help."""
        rows = [_row(flag) for flag in self.flags if not flag.hidden]
        rows.append(("--help, -h", "show help"))
        width = max(len(words) for words, _ in rows)
        lines = [f"   {words:<{width}}  {text}".rstrip() for words, text in rows]
        return (
            f"NAME:\n   Nydusify {self.name} - {self.usage}\n\nUSAGE:\n"
            f"   Nydusify {self.name} [command options]\n\nOPTIONS:\n" + "\n".join(lines) + "\n"
        )


def _row(flag: Flag) -> tuple[str, str]:
    value = "" if isinstance(flag.default, bool) else " value"
    words = ", ".join(
        f"{'-' if len(name) == 1 else '--'}{name}{value}" for name in (flag.name, *flag.aliases)
    )
    text = textwrap.shorten(flag.help, 400)
    if isinstance(flag.default, bool):
        text += f" (default: {str(flag.default).lower()})"
    elif flag.default and isinstance(flag.default, str):
        text += f' (default: "{flag.default}")'
    elif flag.default:
        text += f" (default: {flag.default})"
    if flag.variable:
        text += f" [${flag.variable}]"
    return words, text


@dataclass(slots=True)
class Values:
    """What was given; `given` are the names of flags that have a value of the caller's."""

    values: dict[str, Any] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    rest: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        """Return a text, empty when it was not given and has no default."""
        return str(self.values[name])

    def flag(self, name: str) -> bool:
        """Return whether a switch is on."""
        return bool(self.values[name])

    def number(self, name: str) -> int:
        """Return a whole number."""
        return int(self.values[name])

    def texts(self, name: str) -> tuple[str, ...]:
        """Return the values of a flag that may be repeated."""
        return tuple(self.values[name])


def parse_flags(
    flags: Sequence[Flag], words: Sequence[str], environment: Mapping[str, str]
) -> Values:
    """Read words up to the first that is no flag.

    Raises:
        UsageError: an unknown flag, one without its value, a value of the wrong type, or a
            required flag that is missing.
    """
    known = {name: flag for flag in flags for name in (flag.name, *flag.aliases)}
    values = Values({flag.name: flag.default for flag in flags})
    for flag in flags:
        text = environment.get(flag.variable, "") if flag.variable else ""
        if text:
            _take(values, flag, text)
    position = 0
    while position < len(words) and words[position].startswith("-") and words[position] != "-":
        word = words[position]
        position += 1
        if word == "--":
            break
        name, equals, text = word.lstrip("-").partition("=")
        if name in ("h", "help"):
            values.given.add("help")
            continue
        if name not in known:
            raise UsageError(f"flag provided but not defined: -{name}", shows_help=True)
        flag = known[name]
        if not equals:
            if isinstance(flag.default, bool):
                text = "true"
            elif position == len(words):
                raise UsageError(f"flag needs an argument: -{name}", shows_help=True)
            else:
                text = words[position]
                position += 1
        first = flag.name not in values.given or not isinstance(flag.default, tuple)
        if first and isinstance(flag.default, tuple):
            values.values[flag.name] = ()
        _take(values, flag, text)
        values.given.add(flag.name)
    values.rest = list(words[position:])
    if "help" not in values.given:
        _require(flags, values)
    return values


def _take(values: Values, flag: Flag, text: str) -> None:
    if isinstance(flag.default, tuple):
        values.values[flag.name] = (*values.values[flag.name], text)
    else:
        values.values[flag.name] = flag.read(text)


def _require(flags: Sequence[Flag], values: Values) -> None:
    missing_flags([flag.name for flag in flags if flag.required and not values.values[flag.name]])


def missing_flags(missing: Sequence[str]) -> None:
    """Raise `UsageError` when there are names of flags that are missing."""
    if len(missing) == 1:
        raise UsageError(f'Required flag "{missing[0]}" not set', shows_help=True)
    if missing:
        raise UsageError(f'Required flags "{", ".join(missing)}" not set', shows_help=True)
