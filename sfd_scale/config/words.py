"""The words of a command line: which of them is a recipe, which is an override, and how the value of one is read.

A path may hold any character. So a `=` alone makes no override, and a value that is no YAML is a text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+|\[[\w.-]+\])*")


def is_override(word: str) -> bool:
    """Whether a word is `dotted.key=value`. A word that names an existing file is a recipe, whatever its characters."""
    key, sign, _ = word.partition("=")
    return bool(sign) and _KEY.fullmatch(key) is not None and not any(map(os.path.isfile, (word, f"{word}.yaml")))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The recipes and the overrides among the words of a command line, each in their order."""
    return [word for word in words if not is_override(word)], [word for word in words if is_override(word)]


def has_key(word: str) -> bool:
    """Whether a word that stands where only overrides may stand has the form `dotted.key=value`."""
    key, sign, _ = word.partition("=")
    return bool(sign) and _KEY.fullmatch(key) is not None


def local_path(text: str) -> Path:
    """The path that a setting or an option names. `~` is the home folder: a shell leaves it in `run=~/runs/x`.

    Raises:
        ValueError: for an empty text, which would be the current folder, and for an address such as s3://bucket/x,
            which would be a folder named `s3:`.
    """
    if not text.strip():
        raise ValueError(f"{text!r}; allowed: a path; the current folder is `.` (is a variable of the shell not set?)")
    if _ADDRESS.match(text):
        raise ValueError(f"{text!r}; allowed: a path of this machine; data.remote alone takes an address")
    if text != "~" and not text.startswith("~/"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r}; the home folder is not known; set HOME, or write the path in full") from error


def checked_arguments(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, with `~` in the values of options as the home folder.

    Raises:
        ValueError: for an empty word, and an option whose value is empty or an address.
    """
    found: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, sign, value = word.partition("=")
        if joined := bool(sign) and option.startswith("--"):  # --run=PATH
            name, text = option, value
        else:  # --run PATH, or no option
            name, text = before if before.startswith("--") and "=" not in before else "", word
        if not text.strip():
            raise ValueError(f"{name or 'argument'}: {text!r}; allowed: a value (is a variable of the shell not set?)")
        if name and (text.startswith("~") or _ADDRESS.match(text)):
            try:
                text = str(local_path(text))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        found.append(f"{option}={text}" if joined else text)
    return found


def override(key: str, value: Path | str) -> str:
    """The override that sets a key to a text, whatever its characters: quoted, and without interpolation.

    Raises:
        ValueError: for a name that is not UTF-8, which no YAML file can hold.
    """
    text = str(value).replace("${", "\\${")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{key}: {text!r} is not UTF-8; rename it") from error
    return f"{key}={yaml.safe_dump(text, default_style=chr(34), width=float('inf')).strip()}"


def parse_override(word: str) -> tuple[str, Any]:
    """The dotted key of an override, and its value as plain data."""
    key, _, text = word.partition("=")
    return key, _value(text)


def _value(text: str) -> Any:
    """The YAML value of a text: a number, a word, a quoted text, `{...}` or `[...]`. Anything else is the text itself.

    So a path keeps a `: `, a ` #`, an `&` or a bracket that YAML would read as its own.
    """
    bare = text.strip()
    try:
        node = yaml.compose(bare, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    if node is None:
        return None if not bare else text
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None and node.value == bare
        quoted = node.style in ("'", '"') and node.end_mark.index == len(bare)
        literal = not (plain or quoted)
    else:
        literal = not getattr(node, "flow_style", False) or os.path.lexists(text)
    if literal:
        return text
    # OmegaConf's loader has its own numbers, such as 5e-5.
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={bare}"]))["value"]  # type: ignore[index,call-overload]
