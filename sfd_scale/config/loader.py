"""Recipes → frozen dataclasses, and back to plain data.

OmegaConf interpolates and takes overrides; this file adds what it lacks: unions of dataclasses chosen by their `kind`,
and errors that start with the dotted key and name the file that set it. `extends` is in recipe_files.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

from sfd_scale.config import files as recipe_files
from sfd_scale.config.files import ConfigError as ConfigError

T = TypeVar("T")
_CHANGES_NO_RESULT = "changes no result"
# The type of a setting that changes no result: a name, a place, how the work is done, what is shown of it.
Incidental = Annotated[T, _CHANGES_NO_RESULT]
_COMMAND_LINE = "the command line"
_SOURCE = "# started as: "


def load(source: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """The recipe `source` with `key=value` overrides, as a checked `cls`.

    Raises ConfigError that starts with the dotted key and says the value, what is allowed and the file.
    """
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"{override}: an override has the form dotted.key=value")
    path, command = recipe_files.find(source), _command(overrides)
    with recipe_files.errors_in(path):
        tree, origin = recipe_files.merged(recipe_files.read_file(path))
        merged = OmegaConf.to_container(recipe_files.merge(tree, command), resolve=True)
    origin = {**origin, **dict.fromkeys(recipe_files.leaves(command), _COMMAND_LINE)}
    _check_kind(cls, merged, str(source))
    return _Reader(origin, str(path)).value(cls, merged, "")


def load_by_kind(source: str | Path, kinds: Mapping[str, type], overrides: Sequence[str] = ()) -> Any:
    """The recipe `source`, as the class that its `kind` key chooses.

    Raises:
        ConfigError: naming the kinds, if the file is a part that only other recipes extend.
    """
    kind = kind_of(source, overrides)
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"kind: {kind!r} in {source}; allowed: {', '.join(kinds)}")
    return load(source, kinds[kind], overrides)


def kind_of(source: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """The `kind` key of a recipe, after `extends` and overrides; None for a part that other recipes extend."""
    return tree(source, overrides).get("kind")


def tree(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe after `extends` and overrides as plain data, without defaults and unchecked: what a launcher reads."""
    path, command = recipe_files.find(source), _command([o for o in overrides if "=" in o])
    with recipe_files.errors_in(path):
        own = recipe_files.merged(recipe_files.read_file(path))[0]
        plain = OmegaConf.to_container(recipe_files.merge(own, command))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_kind(cls: type[Any], merged: Any, source: str) -> None:
    """Refuse a recipe of another kind as that, and not for the first key that the wanted kind does not have."""
    hints = get_type_hints(cls)
    if get_origin(hints.get("kind")) is not Literal or not isinstance(merged, dict):
        return
    wanted, kind = get_args(hints["kind"])[0], merged.get("kind")
    if kind is None and "name" in hints and "name" not in merged:
        raise ConfigError(f"kind: none in {source}, a part that other recipes extend; allowed here: {wanted}")
    if isinstance(kind, str) and kind != wanted:
        raise ConfigError(f"kind: {kind} in {source}; allowed here: {wanted}")


def _command(overrides: Sequence[str]) -> DictConfig:
    with recipe_files.errors_in(_COMMAND_LINE):
        return OmegaConf.from_dotlist(list(overrides))


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Where the settings of a recipe come from; dotted keys. `resolved` has the defaults too."""

    parents: list[str]
    inherited: dict[str, Any]
    own: dict[str, Any]
    resolved: dict[str, Any]


def lineage(source: str | Path, cls: type[Any]) -> Lineage:
    """What a recipe extends, what it inherits by that, and what its own file sets.

    Raises:
        ConfigError: if it cannot be found or is not valid any more.
    """
    file = recipe_files.read_file(recipe_files.find(source))
    inherited, own = recipe_files.inherited(file)[0], recipe_files.own_settings(file)
    return Lineage(list(file.extends), _flat(inherited), _flat(own), flatten(to_dict(load(source, cls))))


def _flat(tree: DictConfig) -> dict[str, Any]:
    return flatten(OmegaConf.to_container(tree))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as dotted keys and leaves."""
    if not isinstance(tree, Mapping) or (prefix and not tree):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, item in tree.items() for key, value in flatten(item, f"{prefix}{name}.").items()}


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two trees of plain data differ, sorted, with both values: None where one has no such key."""
    left, right = flatten(a), flatten(b)
    names = [n for n in sorted({*left, *right}) if n not in left or n not in right or left[n] != right[n]]
    return {name: (left.get(name), right.get(name)) for name in names}


def from_dict(cls: type[T], data: Mapping[str, Any], source: str = "data") -> T:
    """`cls` from plain nested data (as `to_dict` writes it), with the same checks as a recipe."""
    return _Reader({}, source).value(cls, dict(data), "")


def with_defaults(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as `to_dict` wrote it, perhaps in another release, with `cls`'s defaults for what it lacks.

    Nothing is checked, and unknown keys stay: it is for comparing.
    """
    hints, filled = get_type_hints(cls), dict(data)
    for field in dataclasses.fields(cls):
        if field.name in data:
            filled[field.name] = _filled(hints[field.name], data[field.name])
        elif field.default is not dataclasses.MISSING:
            filled[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            filled[field.name] = to_dict(field.default_factory())
    return filled


def _filled(kind: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    classes: list[type[Any]] = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    found = classes[0] if len(classes) == 1 else _by_kind(classes).get(str(value.get("kind")))
    return value if found is None else with_defaults(found, value)


def _by_kind(options: Iterable[Any]) -> dict[Any, Any]:
    """The dataclasses of a union by their `kind`, a Literal of one or more kinds."""
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    return {kind: cls for cls in classes for kind in get_args(get_type_hints(cls)["kind"])}


def to_dict(config: Any) -> Any:
    """Plain nested data that YAML and JSON can hold; `from_dict` reads it back."""
    return _plain(config, lambda cls: [field.name for field in dataclasses.fields(cls)])


def decisive(config: Any) -> Any:
    """As `to_dict`, without the settings that are `Incidental`: two pieces of work that agree in it have one result."""
    return _plain(config, _decisive_names)


def _decisive_names(cls: type[Any]) -> list[str]:
    hints = get_type_hints(cls, include_extras=True)
    marks = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in dataclasses.fields(cls)}
    return [name for name, mark in marks.items() if _CHANGES_NO_RESULT not in mark]


def _plain(config: Any, names: Callable[[type[Any]], Iterable[str]]) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {name: _plain(getattr(config, name), names) for name in names(type(config))}
    if isinstance(config, Mapping):
        return {key: _plain(value, names) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [_plain(value, names) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def with_source(text: str, source: str | None) -> str:
    """A resolved recipe's YAML with the recipe that it was started as in its first line; see `source_of`."""
    return text if source is None else f"{_SOURCE}{source}\n{text}"


def source_of(path: Path) -> str | None:
    """The recipe that a resolved one was started as, if it says so."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix(_SOURCE).strip() if first.startswith(_SOURCE) else None


def digest(config: Any) -> str:
    """SHA-256 of the canonical JSON: two configurations are the same exactly when their digests are."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass
class _Reader:
    """Turns plain data into typed values, naming key and file on the way."""

    origin: Mapping[str, str]
    source: str

    def fail(self, key: str, message: str) -> ConfigError:
        # What was set whole above it (an item of a list), else what was set below it.
        parts = key.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        below = (k for k in self.origin if k.startswith(f"{key}."))
        file = next((self.origin[k] for k in (*above, *below) if k in self.origin), self.source)
        return ConfigError(f"{key or 'recipe'}: {message} (set in {file})")

    def value(self, kind: Any, value: Any, key: str) -> Any:
        origin, options = get_origin(kind), get_args(kind)
        if kind is Any:
            return value
        if origin is Literal:
            if value not in options or type(value) not in {type(option) for option in options}:
                raise self.fail(key, f"{value!r}; allowed: {', '.join(map(str, options))}")
            return value
        if origin in (Union, types.UnionType):
            return self.union(options, value, key)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return self.dataclass(kind, value, key)
        if origin is tuple:
            return self.tuple_(options, value, key)
        if origin is dict:
            if not isinstance(value, dict):
                raise self.fail(key, f"{value!r}; allowed: a mapping")
            return {self.value(options[0], k, key): self.value(options[1], v, f"{key}.{k}") for k, v in value.items()}
        return self.scalar(kind, value, key)

    def scalar(self, kind: Any, value: Any, key: str) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
        # `type is`, not isinstance: a bool is an int in Python, never in a recipe.
        if type(value) is not kind:
            raise self.fail(key, f"{value!r}; allowed: {_describe(kind)}")
        return value

    def tuple_(self, options: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise self.fail(key, f"{value!r}; allowed: a list")
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(kinds) != len(value):
            raise self.fail(key, f"{value!r}; allowed: a list of {len(kinds)} values")
        return tuple(self.value(k, v, f"{key}.{i}") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))

    def union(self, options: tuple[Any, ...], value: Any, key: str) -> Any:
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        if len(rest) == 1:
            return self.value(rest[0], value, key)
        if not isinstance(value, dict):
            for option in rest:
                literal = get_origin(option) is Literal and value in get_args(option)
                if type(value) is option or literal or (option is Path and isinstance(value, str)):
                    return self.value(option, value, key)
            raise self.fail(key, f"{value!r}; allowed: {' or '.join(map(_describe, rest))}")
        by_kind = _by_kind(rest)
        if "kind" not in value:
            beside = ", ".join(map(str, value)) or "nothing"
            raise self.fail(f"{key}.kind", f"missing, beside {beside}; allowed: {', '.join(map(str, by_kind))}")
        if not isinstance(value["kind"], str) or value["kind"] not in by_kind:
            raise self.fail(f"{key}.kind", f"{value.get('kind')!r}; allowed: {', '.join(map(str, by_kind))}")
        return self.dataclass(by_kind[value["kind"]], value, key)

    def dataclass(self, cls: Any, value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            raise self.fail(key, f"{value!r}; allowed: the keys of {cls.__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        dot = f"{key}." if key else ""
        for name in value:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise self.fail(f"{dot}{name}", f"unknown key; allowed: {', '.join(fields)}{hint}")
        hints = get_type_hints(cls)
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
            name = str(error).split(":", 1)[0]
            if name.split(".")[0] in fields:
                raise self.fail(f"{dot}{name}", str(error).split(":", 1)[1].strip()) from error
            raise self.fail(key, str(error)) from error


def _describe(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return f"the keys of {getattr(kind, '__name__', kind)}"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return names.get(kind) or str(kind)
