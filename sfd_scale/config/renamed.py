"""Names of earlier releases: keys of recipes and names of recipe files, with their new names; and implied kinds.

A renamed key in a user's recipe is an error that says the new one. Files written by earlier releases (recipe.yaml of a
run folder, notes of exports, manifests) are read under the new keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Old dotted key → new dotted key, by the kind of the recipe.
RENAMED_KEYS: dict[str, dict[str, str]] = {"train": {"meter": "metrics"}}
# Key that allowed one kind only, and so had no `kind` → that kind, by the kind of the recipe.
_IMPLIED_KINDS = {"train": {"optimizer": "adamw"}}
# Pattern of an old recipe name → the new name, with overrides.
_RENAMED_RECIPES = {r"train/ablation/delta_t_(\d\.\d)": r"train/ablation/delta_t schedule.delta_t=\1"}


def new_recipe(name: str) -> str | None:
    """The new name of a renamed recipe, with the overrides that it needs; None for all other names."""
    matches = ((re.fullmatch(pattern, name), words) for pattern, words in _RENAMED_RECIPES.items())
    return next((match.expand(words) for match, words in matches if match), None)


def new_keys(key: str, kinds: Sequence[str]) -> dict[str, str]:
    """The renamed keys that are `key` or stand below it, with their new names."""
    known = [pair for kind in kinds for pair in RENAMED_KEYS.get(kind, {}).items()]
    return {old: new for old, new in known if old == key or old.startswith(f"{key}.")}


def implied_kind(key: str, kinds: Sequence[str]) -> str | None:
    """The `kind` of a mapping under this dotted key that names none; None where it has to name one."""
    return next((found for kind in kinds if (found := _IMPLIED_KINDS.get(kind, {}).get(key))), None)


def with_current_keys(data: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """A copy of the plain data of a recipe, of any release, with this release's keys."""
    current = _copied(data)
    for kind in kinds:
        for old, new in RENAMED_KEYS.get(kind, {}).items():
            _move(current, old.split("."), new.split("."))
    return current


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def _move(tree: dict[str, Any], old: list[str], new: list[str]) -> None:
    above = [tree]
    for part in old[:-1]:
        below = above[-1].get(part)
        if not isinstance(below, dict):
            return
        above.append(below)
    if old[-1] not in above[-1]:
        return
    value = above[-1].pop(old[-1])
    for parent, part in reversed(list(zip(above[:-1], old[:-1], strict=True))):
        if not parent[part]:
            del parent[part]  # nothing but renamed keys stood there
    target = tree
    for part in new[:-1]:
        target = target.setdefault(part, {})
    target[new[-1]] = value
