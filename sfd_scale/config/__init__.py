"""Recipes: YAML files → typed settings, and back to plain data. Use it as `from sfd_scale import config`.

`config.load("train/sfd_xl", TrainRecipe, ["seed=1"])` reads a recipe; `config.to_dict` and `config.from_dict` convert
settings to plain data and back. Dataclasses of settings declare bounds by `sfd_scale.runtime.settings`, which needs
the standard library alone; this package needs OmegaConf and PyYAML.
"""

from sfd_scale.config.files import CHECKOUT, RECIPE_ROOT, ConfigError, find_recipe, read_mapping, recipe_names
from sfd_scale.config.loader import Lineage, kind_of, lineage, load, load_by_kind, load_unless_part, tree
from sfd_scale.config.plain import (
    differences,
    digest,
    flatten,
    settings_affecting_results,
    source_of,
    to_dict,
    to_yaml,
    with_defaults,
    with_source,
)
from sfd_scale.config.typed import from_dict
from sfd_scale.config.words import checked_arguments, is_override, local_path, override, split_words

__all__ = [
    "CHECKOUT",
    "RECIPE_ROOT",
    "ConfigError",
    "Lineage",
    "checked_arguments",
    "differences",
    "digest",
    "find_recipe",
    "flatten",
    "from_dict",
    "is_override",
    "kind_of",
    "lineage",
    "load",
    "load_by_kind",
    "load_unless_part",
    "local_path",
    "override",
    "read_mapping",
    "recipe_names",
    "settings_affecting_results",
    "source_of",
    "split_words",
    "to_dict",
    "to_yaml",
    "tree",
    "with_defaults",
    "with_source",
]
