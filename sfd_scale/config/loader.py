"""Recipes by name or file, with overrides, as typed settings: see `load`.

OmegaConf reads files and overrides and resolves `${...}`; files.py merges them; typed.py makes dataclasses of them.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from sfd_scale.config import files
from sfd_scale.config.files import ConfigError
from sfd_scale.config.interpolations import check_interpolations, sections_to_resolve
from sfd_scale.config.plain import flatten, kinds_of_class, to_dict, type_hints
from sfd_scale.config.typed import typed
from sfd_scale.config.words import has_key, parse_override

logger = logging.getLogger(__name__)
T = TypeVar("T")
_COMMAND_LINE = "the command line"


def load(source: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """A recipe, by its name or file, with `key=value` overrides, as a checked `cls`.

    Raises:
        ConfigError: starting with the dotted key, and naming the value, what is allowed, and the file.
    """
    path, merged, origin = _merged_checked(source, overrides)
    data = _resolved(path, merged)
    _check_kind(cls, data, str(source))
    found = typed(cls, data, origin, str(path))
    if overrides:
        _warn_about_dropped(path, overrides, found)
    return found


def load_by_kind(source: str | Path, kinds: Mapping[str, type], overrides: Sequence[str] = ()) -> Any:
    """A recipe as the class that its `kind` key chooses among `kinds`.

    Raises:
        ConfigError: see `load`; or naming the kinds, if the file is a part that other recipes extend.
    """
    found = load_unless_part(source, kinds, overrides)
    if found is None:
        raise ConfigError(f"kind: None in {source}; allowed: {', '.join(kinds)}")
    return found


def load_unless_part(source: str | Path, kinds: Mapping[str, type], overrides: Sequence[str] = ()) -> Any | None:
    """As `load_by_kind`; None for a part that other recipes extend."""
    path, merged, origin = _merged_checked(source, overrides)
    kind = merged.get("kind")
    if kind is None:
        return None
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"kind: {kind!r} in {source}; allowed: {', '.join(kinds)}")
    data = _resolved(path, merged)
    _check_kind(kinds[kind], data, str(source))
    return typed(kinds[kind], data, origin, str(path))


def kind_of(source: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """The `kind` key of a recipe; None for a part that other recipes extend."""
    _, merged, _ = _merged(source, overrides)
    kind: str | None = merged.get("kind")
    return kind


def tree(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe with its parents and overrides as plain data, unchecked and without defaults: for launchers."""
    path, merged, _ = _merged(source, [o for o in overrides if has_key(o)])
    return {str(key): value for key, value in _resolved(path, merged).items()}


def _merged_checked(source: str | Path, overrides: Sequence[str]) -> tuple[Path, files.Tree, dict[str, str]]:
    """As `_merged`, but an override without a key is an error."""
    for override in overrides:
        if not has_key(override):
            raise ConfigError(f"{override}: an override has the form dotted.key=value")
    return _merged(source, overrides)


def _merged(source: str | Path, overrides: Sequence[str]) -> tuple[Path, files.Tree, dict[str, str]]:
    """The file of a recipe, its tree with parents and overrides, and what set each dotted key.

    A recipe without a `name` is named for its file.
    """
    path, command = files.find_recipe(source), _command(overrides)
    own, origin = files.merged(files.read_file(path))
    tree = files.merge(own, command)
    if "kind" in tree and "name" not in tree:
        tree = {"name": path.stem, **tree}
    return path, tree, {**origin, **dict.fromkeys(files.leaves(command), _COMMAND_LINE)}


def _resolved(path: Path, merged: files.Tree) -> files.Tree:
    """The tree with the values of its interpolations (`${...}`)."""
    with files.errors_in(path):
        check_interpolations(merged)
        needed = {key: merged[key] for key in sections_to_resolve(merged)}
        plain = OmegaConf.to_container(OmegaConf.create(needed), resolve=True)
    assert isinstance(plain, dict)
    return {key: plain[key] if key in plain else copy.deepcopy(value) for key, value in merged.items()}


def _check_kind(cls: type[Any], data: Any, source: str) -> None:
    """Refuse a recipe of another kind by its kind, before an error about a key that the wanted kind lacks."""
    kinds = kinds_of_class(cls)
    if not kinds or not isinstance(data, dict):
        return
    wanted, kind = " or ".join(kinds), data.get("kind")
    if kind is None and "name" in type_hints(cls) and "name" not in data:
        raise ConfigError(f"kind: none in {source}, a part that other recipes extend; allowed here: {wanted}")
    if isinstance(kind, str) and kind not in kinds:
        raise ConfigError(f"kind: {kind} in {source}; allowed here: {wanted}")


def _warn_about_dropped(path: Path, overrides: Sequence[str], recipe: Any) -> None:
    """Name the settings of the file that another `kind` on the command line set back to their defaults."""
    own, _ = files.merged(files.read_file(path))
    now = flatten(to_dict(recipe))
    for key, value in files.dropped(own, _command(overrides)).items():
        if key in now and now[key] != value:
            logger.warning(
                "%s: %s in %s does not apply to another kind; it is %s now. To keep it, add %s=%s",
                key, value, path.name, now[key], key, value,
            )  # fmt: skip


def _command(overrides: Sequence[str]) -> files.Tree:
    tree: files.Tree = {}
    with files.errors_in(_COMMAND_LINE):
        for key, value in map(parse_override, overrides):
            one = OmegaConf.create({})
            OmegaConf.update(one, key, value)
            plain = OmegaConf.to_container(one)
            assert isinstance(plain, dict)
            tree = files.merge(tree, {str(name): item for name, item in plain.items()})
    return tree


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Where the settings of a recipe come from, by dotted keys. `resolved` includes the defaults."""

    parents: list[str]
    inherited: dict[str, Any]
    own: dict[str, Any]
    resolved: dict[str, Any]


def lineage(source: str | Path, cls: type[Any]) -> Lineage:
    """The parents of a recipe, the settings inherited from them, and the settings of its own file.

    Raises:
        ConfigError: if the recipe is not found or not valid any more.
    """
    file = files.read_file(files.find_recipe(source))
    inherited, own = (flatten(tree) for tree in (files.inherited(file)[0], files.own_settings(file)))
    return Lineage(list(file.extends), inherited, own, flatten(to_dict(load(source, cls))))
