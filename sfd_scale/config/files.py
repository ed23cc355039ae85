"""YAML files of recipes: found by name, read by OmegaConf, and merged with their parents.

A recipe may come from outside: a folder of the Hugging Face hub holds a recipe.yaml. So reading has limits: size,
aliases, parents outside of the folder, secrets of the environment.
"""

from __future__ import annotations

import difflib
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sfd_scale.config.renamed import new_recipe, with_current_keys
from sfd_scale.runtime.errors import reason
from sfd_scale.runtime.file_kind import require_kind
from sfd_scale.runtime.run_paths import RECIPE
from sfd_scale.runtime.seeds import with_parts

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds the recipes in the package, a checkout beside it.
CHECKOUT = None if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
RECIPE_ROOT = (CHECKOUT or _PACKAGE) / "recipes"
# A recipe has a few hundred values. A few lines of YAML aliases of aliases can stand for billions.
_MOST_BYTES, _MOST_NODES, _MOST_LEVELS = 1 << 20, 100_000, 100
# libyaml, where PyYAML has it, is ten times as fast.
_COMPOSER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
# Plain data of a recipe; a text in it may be an interpolation, such as ${name}.
Tree = dict[str, Any]
_SECRET = re.compile(r"oc\.env\s*:\s*[^},]*(?:key|token|secret|passw|credential)", re.IGNORECASE)


class ConfigError(ValueError):
    """A recipe that cannot be used. The message starts with the dotted key or the file."""


@contextmanager
def errors_in(where: Path | str) -> Iterator[None]:
    """Turn errors of YAML, OmegaConf and Python about settings into a ConfigError that names `where`."""
    try:
        yield
    except ConfigError:
        raise
    # RecursionError: nested too deep for the parser. TypeError and others: keys, dates, numbers that only YAML allows.
    except (
        yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        raise ConfigError(f"{where}: not readable as settings: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"a character that YAML does not allow, at position {error.position}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return " ".join(reason(error).split())


def recipe_names() -> list[str]:
    """The names of all files below recipes/, such as `train/sfd_xl`."""
    return sorted(path.relative_to(RECIPE_ROOT).with_suffix("").as_posix() for path in RECIPE_ROOT.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: an existing path, or a name below recipes/, with or without .yaml.

    Raises:
        ConfigError: naming similar recipes, or the new name of a renamed one.
    """
    given = Path(name)
    if not given.name or "\0" in str(name):
        raise ConfigError(f"{str(name)!r}: not the name of a recipe; `sfd recipes` lists them")
    for candidate in (given, given.with_name(given.name + ".yaml"), RECIPE_ROOT / given, RECIPE_ROOT / f"{given}.yaml"):
        if os.path.isfile(candidate):  # not Path.is_file, which fails for a name that is too long
            return candidate
    if os.path.isdir(given):
        inside = f", such as {given / RECIPE}" if (given / RECIPE).is_file() else ""
        raise ConfigError(f"{name}: a folder; allowed: the file of a recipe{inside}")
    # A user outside the checkout may type `recipes/train/x.yaml`.
    bare = str(name).removesuffix(".yaml").removeprefix("recipes/")
    if renamed := new_recipe(bare):
        raise ConfigError(f"{name}: this recipe was renamed; give: {renamed}")
    near = difflib.get_close_matches(bare, recipe_names(), n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; recipes are looked up in {RECIPE_ROOT}"
    raise ConfigError(f"{name}: no such recipe or file{hint}")


def _parent(name: object, child: Path) -> Path:
    """The file of `extends: name` in `child`: beside it, or below recipes/. No other folder is allowed."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"extends: {name!r} in {child}; allowed: a recipe name, or a file in the same folder")
    beside = child.parent / f"{name.removesuffix('.yaml')}.yaml"
    return beside if beside.is_file() and beside != child else find_recipe(name)


@dataclass(frozen=True)
class RecipeFile:
    """The text of a recipe file and of its parents, as they are on disk now. Hashable: the key of a cache."""

    path: Path
    text: str
    extends: tuple[str, ...]  # the parents, as the file names them
    parents: tuple[RecipeFile, ...]


def read_file(path: Path, trail: tuple[Path, ...] = ()) -> RecipeFile:
    """A file and, recursively, its parents.

    Args:
        trail: the files on the way to this one, each extending the next.

    Raises:
        ConfigError: if a file is missing, not readable, or extends itself.
    """
    if path.resolve() in trail:
        raise ConfigError(f"extends: {path} extends itself")
    text = _text(path)
    with errors_in(path):
        parents = _content(path, text).get("extends", [])
    if not isinstance(parents, str | list):
        raise ConfigError(f"extends: {parents!r} in {path}; allowed: a recipe name, or a list of them")
    names = tuple([parents] if isinstance(parents, str) else parents)
    trail = (*trail, path.resolve())
    return RecipeFile(path, text, names, tuple(read_file(_parent(name, path), trail) for name in names))


# Hundreds of recipes share a few parents. A changed file is another key of the cache.
@functools.lru_cache(maxsize=512)
def merged(file: RecipeFile) -> tuple[Tree, Mapping[str, str]]:
    """The merged tree of a file and its parents, and the file that set each dotted key. Cached: do not change it."""
    (tree, origin), own = inherited(file), own_settings(file)
    return merge(tree, own), {**origin, **{key: str(file.path) for key in leaves(own)}}


def inherited(file: RecipeFile) -> tuple[Tree, Mapping[str, str]]:
    """As `merged`, for the parents of a file without the file itself."""
    tree, origin = Tree(), dict[str, str]()
    for parent, parent_origin in map(merged, file.parents):
        tree, origin = merge(tree, parent), {**origin, **parent_origin}
    return tree, origin


def own_settings(file: RecipeFile) -> Tree:
    """The settings of the file itself. A run's recipe.yaml, perhaps of an earlier release, has this release's keys."""
    own = {key: value for key, value in _content(file.path, file.text).items() if key != "extends"}
    return with_current_keys(own, [str(own.get("kind"))]) if file.path.name == RECIPE else own


def _text(path: Path) -> str:
    try:
        require_kind(path, "recipe")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with errors_in(path):
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes; allowed: up to {_MOST_BYTES}")
        return path.read_text(encoding="utf-8")


def read_mapping(path: Path) -> Tree:
    """The content of a YAML file that holds a mapping of keys.

    Raises:
        ConfigError: if the file is missing, too large, or holds anything else.
    """
    return dict(_content(path, _text(path)))


def _content(path: Path, text: str) -> Tree:
    """The content of one file. Cached: do not change it."""
    with errors_in(path):
        own = _parse(text)
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: holds a {type(own).__name__}; allowed: a mapping of keys")
    return own


@functools.lru_cache(maxsize=512)
def _parse(text: str) -> Any:
    _check_text(text)
    # Not OmegaConf.create: it reads a plain text as a key.
    parsed = OmegaConf.load(io.StringIO(text))
    return OmegaConf.to_container(parsed) if OmegaConf.is_config(parsed) else parsed


def _check_text(text: str) -> None:
    """Refuse YAML whose aliases expand to very many values, and YAML that reads a secret of the environment.

    A secret would be written to recipe.yaml, checkpoints and exports.
    """
    if _SECRET.search(text):
        raise ValueError(
            "it reads a secret from the environment (oc.env), which would be written to recipe.yaml and checkpoints; "
            "remove it: libraries read such variables themselves"
        )
    levels = 0
    # libyaml and PyYAML compose by recursion, and libyaml's has no limit: the process would die of a deep text.
    for event in yaml.parse(text, Loader=_COMPOSER):
        levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if levels > _MOST_LEVELS:
            raise ValueError(f"not readable as settings: more than {_MOST_LEVELS} levels, one within another")
    known: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if node is None or isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in known:
            known[id(node)] = _MOST_NODES  # for an alias of a node inside the node
            parts = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
            known[id(node)] = 1 + sum(size(part) for part in parts)
        return known[id(node)]

    if size(yaml.compose(text, Loader=_COMPOSER)) > _MOST_NODES:
        raise ValueError(f"more than {_MOST_NODES} values once its aliases are followed; write fewer")


def merge(base: Tree, top: Tree) -> Tree:
    """`base` with the values of `top`; neither is changed. Mappings are merged, and lists are replaced.

    A mapping of another `kind` replaces the old mapping: the keys of the old kind do not apply to it.
    One part of a seed, such as `seed.init`, leaves the other parts at the number that was the seed of all.
    """
    merged = dict(base)
    for key, above in top.items():
        below = with_parts(base.get(key)) if key == "seed" and isinstance(above, dict) else base.get(key)
        if isinstance(below, dict) and isinstance(above, dict) and not _another_kind(below, above):
            merged[key] = merge(below, above)
        else:
            merged[key] = above
    return merged


def _another_kind(below: Tree, above: Tree) -> bool:
    return "kind" in below and "kind" in above and below["kind"] != above["kind"]


def dropped(base: Tree, top: Tree, prefix: str = "") -> Tree:
    """The values of `base` that `merge` drops because `top` has another kind, by dotted keys."""
    found: Tree = {}
    for key, above in top.items():
        below = base.get(key)
        if not isinstance(below, dict) or not isinstance(above, dict):
            continue
        if _another_kind(below, above):
            found |= {f"{prefix}{key}.{name}": value for name, value in below.items() if name not in above}
        else:
            found |= dropped(below, above, f"{prefix}{key}.")
    return found


def leaves(tree: Tree, prefix: str = "") -> Iterable[str]:
    """The dotted keys of all values in a tree."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key!s}.")
        else:
            yield f"{prefix}{key!s}"
