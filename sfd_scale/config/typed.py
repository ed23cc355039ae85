"""Plain data → frozen dataclasses, by their type hints. A union of dataclasses is chosen by its `kind`.

Errors start with the dotted key, say what is allowed, and name the file that set the value.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from sfd_scale.config.files import ConfigError
from sfd_scale.config.plain import by_kind, kinds_of_class, type_hints
from sfd_scale.config.renamed import implied_kind, new_keys, with_current_keys
from sfd_scale.config.words import local_path

T = TypeVar("T")
LARGEST = 2**63 - 1  # of whole numbers; NumPy and PyTorch take no larger ones


def from_dict(cls: type[T], data: Mapping[str, Any], source: str = "data") -> T:
    """`cls` from plain data that `to_dict` wrote in this release or an earlier one, checked as a recipe is.

    Raises:
        ConfigError: naming the dotted key and `source`.
    """
    return typed(cls, with_current_keys(data, kinds_of_class(cls)), {}, source)


def typed(cls: type[T], data: Any, origin: Mapping[str, str], source: str) -> T:
    """`cls` from plain data under this release's keys.

    Args:
        origin: the file that set each dotted key.
        source: the file to name for keys that `origin` lacks.

    Raises:
        ConfigError: naming the dotted key, the value, what is allowed, and the file.
    """
    value: T = _Reader(origin, source, cls).value(cls, data, "")
    return value


@dataclasses.dataclass
class _Reader:
    """Reads one recipe; every method takes a type hint, the value for it, and the value's dotted key."""

    origin: Mapping[str, str]
    source: str
    root: type[Any]  # the class of the whole recipe

    def fail(self, key: str, message: str) -> ConfigError:
        # An item of a list has the origin of its list; a mapping has the origin of its first key.
        parts = key.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        below = (k for k in self.origin if k.startswith(f"{key}."))
        file = next((self.origin[k] for k in (*above, *below) if k in self.origin), self.source)
        return ConfigError(f"{key or 'recipe'}: {message} (set in {file})")

    def value(self, hint: Any, value: Any, key: str) -> Any:
        origin, options = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if origin is Literal:
            # Python has True == 1; a recipe has not.
            if value not in options or type(value) not in {type(option) for option in options}:
                raise self.fail(key, f"{value!r}; allowed: {', '.join(map(str, options))}")
            return value
        if origin in (Union, types.UnionType):
            return self.union(options, value, key)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.dataclass(hint, value, key)
        if origin is tuple:
            return self.tuple_(options, value, key)
        if origin is dict:
            if not isinstance(value, dict):
                raise self.fail(key, f"{value!r}; allowed: a mapping")
            return {self.value(options[0], k, key): self.value(options[1], v, f"{key}.{k}") for k, v in value.items()}
        return self.scalar(hint, value, key)

    def scalar(self, hint: Any, value: Any, key: str) -> Any:
        if hint is float and type(value) is int:
            return float(value)
        if hint is Path and isinstance(value, str):
            try:
                return local_path(value)
            except ValueError as error:
                raise self.fail(key, str(error)) from error
        # Not isinstance: a bool is an int in Python, but never in a recipe.
        if type(value) is not hint:
            unquoted = hint in (str, Path) and isinstance(value, bool | int | float)
            advice = ", in quotes, or YAML reads a number or a truth value" if unquoted else ""
            raise self.fail(key, f"{value!r}; allowed: {_describe(hint)}{advice}")
        if value != value:  # NaN passes most comparisons with bounds
            raise self.fail(key, f"{value!r}; allowed: {_describe(hint)}")
        if hint is int and abs(value) > LARGEST:
            raise self.fail(key, f"{value!r}; allowed: a whole number of at most 64 bits")
        return value

    def tuple_(self, options: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise self.fail(key, f"{value!r}; allowed: a list")
        hints = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(hints) != len(value):
            raise self.fail(key, f"{value!r}; allowed: a list of {len(hints)} values")
        return tuple(self.value(h, v, f"{key}.{i}") for i, (h, v) in enumerate(zip(hints, value, strict=True)))

    def union(self, options: tuple[Any, ...], value: Any, key: str) -> Any:
        if value is None and type(None) in options:
            return None
        if value == "None" and type(None) in options:  # Python's word; YAML would take it for a text
            raise self.fail(key, "'None'; allowed: null, for no value")
        rest = [option for option in options if option is not type(None)]
        if len(rest) == 1:
            return self.value(rest[0], value, key)
        if not isinstance(value, dict):
            for option in rest:
                literal = get_origin(option) is Literal and value in get_args(option)
                if type(value) is option or literal or (option is Path and isinstance(value, str)):
                    return self.value(option, value, key)
            raise self.fail(key, f"{value!r}; allowed: {' or '.join(map(_describe, rest))}")
        classes = by_kind(rest)
        plain = [option for option in rest if dataclasses.is_dataclass(option)]
        if len(plain) == 1 and not classes:  # such as int | Seeds
            return self.dataclass(plain[0], value, key)
        value = {"kind": implied, **value} if (implied := implied_kind(key, kinds_of_class(self.root))) else value
        if "kind" not in value:
            given = ", ".join(map(str, value)) or "nothing"
            raise self.fail(f"{key}.kind", f"missing, beside {given}; allowed: {', '.join(map(str, classes))}")
        if not isinstance(value["kind"], str) or value["kind"] not in classes:
            raise self.fail(f"{key}.kind", f"{value['kind']!r}; allowed: {', '.join(map(str, classes))}")
        return self.dataclass(classes[value["kind"]], value, key)

    def dataclass(self, cls: Any, value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            raise self.fail(key, f"{value!r}; allowed: the keys of {cls.__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        dot = f"{key}." if key else ""
        for name in value:
            if name not in fields:
                raise self.unknown(f"{dot}{name}", list(fields))
        hints = type_hints(cls)
        given = {name: self.value(hints[name], item, f"{dot}{name}") for name, item in value.items()}
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in given:
                raise self.fail(f"{dot}{name}", f"missing; allowed: {_describe(hints[name])}")
        try:
            return cls(**given)
        except ConfigError:
            raise
        except ValueError as error:
            # The class names its own field; the recipe's key starts with the keys above it.
            name = str(error).split(":", 1)[0]
            if name.split(".")[0] in fields:
                raise self.fail(f"{dot}{name}", str(error).split(":", 1)[1].strip()) from error
            raise self.fail(key, str(error)) from error

    def unknown(self, key: str, allowed: list[str]) -> ConfigError:
        if renamed := new_keys(key, kinds_of_class(self.root)):
            words = (
                f"renamed to {new}" if old == key else f"{old} was renamed to {new}" for old, new in renamed.items()
            )
            return self.fail(key, "; ".join(words))
        above, _, name = key.rpartition(".")
        near = difflib.get_close_matches(name, allowed, n=1)
        elsewhere = {path for path in _paths(self.root) if path.rpartition(".")[2] == name}
        hint = ""
        if near:
            hint = f"; did you mean {above}.{near[0]}?" if above else f"; did you mean {near[0]}?"
        elif len(elsewhere) == 1:
            hint = f"; did you mean {elsewhere.pop()}?"
        return self.fail(key, f"unknown key; allowed: {', '.join(allowed)}{hint}")


def _paths(hint: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys that a class of settings can have, through every option of its unions."""
    if dataclasses.is_dataclass(hint):
        for name, below in type_hints(hint).items():
            yield f"{prefix}{name}"
            yield from _paths(below, f"{prefix}{name}.")
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            yield from _paths(option, prefix)


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return f"the keys of {getattr(hint, '__name__', hint)}"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return names.get(hint) or str(hint)
