"""Frozen values with named fields, as `dataclasses` makes them, but quick to define.

`dataclasses` compiles the methods of each class when a program starts: a daemon has more than
thirty such classes, which took a quarter of its start (docs/architecture.md). These have their
methods in common. Records that are read from images by the thousand are `NamedTuple`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform

__all__ = ["EMPTY", "Value", "field"]

# Default of fields that are mappings.
EMPTY: Mapping[str, str] = MappingProxyType({})
_MISSING: Any = object()


class _Field(NamedTuple):
    default: Any
    repr: bool
    compare: bool


def field(*, default: Any = _MISSING, repr: bool = True, compare: bool = True) -> Any:  # noqa: A002
    """Describe a field: a secret is kept out of `repr`, what makes no difference of `compare`."""
    return _Field(default, repr, compare)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Value:
    """Base of frozen values; subclasses annotate their fields, and may inherit some.

    Defaults are shared between all values, so they have to be immutable. With `kw_only` the
    fields of a class are given by name alone.
    """

    _positional: ClassVar[tuple[str, ...]] = ()
    _fields: ClassVar[tuple[str, ...]] = ()
    _shown: ClassVar[tuple[str, ...]] = ()
    _compared: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__()
        own = {}
        for name in cls.__annotations__:
            given = cls.__dict__.get(name, _MISSING)
            own[name] = given if isinstance(given, _Field) else _Field(given, True, True)
            if isinstance(given, _Field):
                delattr(cls, name)
        names = tuple(own)
        cls._fields += names
        cls._positional += () if kw_only else names
        cls._shown += tuple(name for name in names if own[name].repr)
        cls._compared += tuple(name for name in names if own[name].compare)
        defaults = {name: it.default for name, it in own.items() if it.default is not _MISSING}
        cls._defaults = {**cls._defaults, **defaults}

    def __init__(self, *values: Any, **named: Any) -> None:
        if len(values) > len(self._positional):
            raise TypeError(f"{type(self).__name__} takes {len(self._positional)} values by place")
        given = dict(zip(self._positional, values, strict=False))
        if twice := given.keys() & named.keys():
            raise TypeError(f"{type(self).__name__} got twice: {', '.join(twice)}")
        fields = {**self._defaults, **given, **named}
        if wrong := fields.keys() ^ set(self._fields):
            raise TypeError(f"{type(self).__name__} lacks or does not have: {', '.join(wrong)}")
        self.__dict__.update(fields)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the fields, in subclasses of which some are impossible."""

    def _replace(self, **changes: Any) -> Self:
        """Return a value that differs in some fields."""
        return type(self)(**{**self.__dict__, **changes})

    def _asdict(self) -> dict[str, Any]:
        """Return the fields by name, in their order."""
        return {name: self.__dict__[name] for name in self._fields}

    def _key(self) -> tuple[Any, ...]:
        return tuple(self.__dict__[name] for name in self._compared)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._shown)
        return f"{type(self).__name__}({shown})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")
