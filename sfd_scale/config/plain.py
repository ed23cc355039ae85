"""Typed settings as plain data (dicts, lists, texts, numbers): written to files, compared, hashed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sfd_scale.config.renamed import implied_kind, with_current_keys
from sfd_scale.runtime.files import read_text
from sfd_scale.runtime.settings import names_affecting_results

_STARTED_AS = "# started as: "


@functools.cache
def _type_hints(cls: Hashable) -> dict[str, Any]:
    return get_type_hints(cls)


def type_hints(cls: Any) -> dict[str, Any]:
    """The type hints of a class. Cached: they are texts, which Python evaluates, and recipes ask for them often."""
    return _type_hints(cls)


def to_dict(settings: Any) -> Any:
    """Plain nested data that YAML and JSON can hold; `from_dict` reads it back."""
    return _plain(settings, lambda cls: [field.name for field in dataclasses.fields(cls)])


def settings_affecting_results(settings: Any) -> Any:
    """As `to_dict`, without the fields marked `NoEffectOnResults`: equal data means equal results."""
    return _plain(settings, names_affecting_results)


def _plain(value: Any, names: Callable[[type[Any]], Iterable[str]]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name), names) for name in names(type(value))}
    if isinstance(value, Mapping):
        return {key: _plain(item, names) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, names) for item in value]
    return str(value) if isinstance(value, Path) else value


def with_defaults(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of any release, under this release's keys, with the defaults of `cls` for missing keys.

    It serves comparisons: values are not checked, and unknown keys stay.
    """
    hints, data = type_hints(cls), with_current_keys(data, kinds_of_class(cls))
    filled = dict(data)
    for field in dataclasses.fields(cls):
        if field.name in data:
            kind = implied_kind(field.name, kinds_of_class(cls))
            filled[field.name] = _filled(hints[field.name], data[field.name], kind)
        elif field.default is not dataclasses.MISSING:
            filled[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            filled[field.name] = to_dict(field.default_factory())
    return filled


def _filled(hint: Any, value: Any, implied: str | None) -> Any:
    if not isinstance(value, Mapping):
        return value
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    classes: list[type[Any]] = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    found = classes[0] if len(classes) == 1 else by_kind(classes).get(str(value.get("kind", implied)))
    return value if found is None else with_defaults(found, value)


def kinds_of_class(cls: type[Any]) -> tuple[str, ...]:
    """The values that a dataclass's `kind` may have; none for a class without a `kind`."""
    hint = type_hints(cls).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else ()


def by_kind(options: Iterable[Any]) -> dict[str, Any]:
    """The dataclasses of a union, by each value that their `kind` may have."""
    return {kind: option for option in options if isinstance(option, type) for kind in kinds_of_class(option)}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as one mapping of dotted keys to values."""
    if not isinstance(tree, Mapping) or (prefix and not tree):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, item in tree.items() for key, value in flatten(item, f"{prefix}{name}.").items()}


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two trees of plain data, sorted, with both values.

    A missing key counts as a difference; its value is None.
    """
    left, right = flatten(a), flatten(b)
    names = [n for n in sorted({*left, *right}) if n not in left or n not in right or left[n] != right[n]]
    return {name: (left.get(name), right.get(name)) for name in names}


def digest(settings: Any) -> str:
    """SHA-256 of the canonical JSON: equal for equal settings."""
    return hashlib.sha256(json.dumps(to_dict(settings), sort_keys=True).encode()).hexdigest()


def to_yaml(settings: Any) -> str:
    """The YAML text of settings, every key in the order of its dataclass."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, width=120)


def with_source(text: str, source: str | None) -> str:
    """The YAML text of a resolved recipe, headed by the name of the recipe that the user gave; see `source_of`."""
    return text if source is None else f"{_STARTED_AS}{source}\n{text}"


def source_of(path: Path) -> str | None:
    """The name that `with_source` wrote in the first line of a file; None if there is none."""
    first = read_text(path, "recipe").split("\n", 1)[0]
    return first.removeprefix(_STARTED_AS).strip() if first.startswith(_STARTED_AS) else None
