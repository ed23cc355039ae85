"""A bound for what the interpolations of a recipe, such as `${name}`, stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sfd_scale.config.plain import flatten

_MOST_CHARACTERS = 1 << 20
_NESTED = re.compile(r"\$\{[^}]*\$\{")
_WORD = re.compile(r"[\w.-]+")
_RELATIVE = re.compile(r"\$\{\s*\.")


def check_interpolations(tree: Mapping[str, Any]) -> None:
    """Check how long the values of a recipe are with their interpolations, before OmegaConf resolves them.

    A few lines of `b: ${a}${a}`, `c: ${b}${b}` stand for gigabytes. The length is an upper bound: each word in a value
    with an interpolation that may name a key counts with the length of that key.

    Raises:
        ValueError: if the values are too long, or an interpolation stands inside another.
    """
    texts = {str(key): str(value) for key, value in flatten(tree).items()}
    lengths = {key: len(text) for key, text in texts.items() if "${" not in text}
    if len(lengths) == len(texts):
        return
    open_keys: set[str] = set()

    def length(key: str) -> int:
        if key in lengths or key in open_keys:  # OmegaConf itself refuses a key that refers to itself
            return lengths.get(key, 0)
        if _NESTED.search(texts[key]):
            raise ValueError(f"{key}: {texts[key][:80]!r}; allowed: no interpolation inside another")
        open_keys.add(key)
        words = [word.strip(".") for word in _WORD.findall(texts[key])]
        total = len(texts[key]) + sum(length(other) for word in words for other in _named_by(word, texts))
        open_keys.discard(key)
        lengths[key] = min(total, _MOST_CHARACTERS + 1)
        return lengths[key]

    if sum(map(length, texts)) > _MOST_CHARACTERS:
        raise ValueError(f"more than {_MOST_CHARACTERS} characters once its interpolations are followed; write fewer")


def _named_by(word: str, keys: dict[str, str]) -> list[str]:
    """The keys that a word may name: whole, as the end of a relative name, or as a mapping of keys."""
    return [
        key
        for key in keys
        if key == word or key.endswith(f".{word}") or key.startswith(f"{word}.") or f".{word}." in key
    ]


def sections_to_resolve(tree: Mapping[str, Any]) -> list[str]:
    """The top-level keys whose values contain an interpolation, and those that such a value may name.

    OmegaConf takes a millisecond for each hundred values, so it gets these keys alone. A relative name such as
    `${.name}` can stand for any key.
    """
    texts = {key: str(value) for key, value in tree.items()}
    found = [key for key, text in texts.items() if "${" in text]
    if any(_RELATIVE.search(texts[key]) for key in found):
        return list(tree)
    for key in found:  # grows while it is read
        words = {word.partition(".")[0] for word in _WORD.findall(texts[key])}
        found += [other for other in texts if str(other) in words and other not in found]
    return found
