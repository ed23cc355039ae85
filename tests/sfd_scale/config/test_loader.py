"""Recipes: extends, overrides, typed values, and errors that name key, value, what is allowed and the file."""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from eval.recipe import EvalRecipe
from sfd_scale import config
from sfd_scale.config.renamed import RENAMED_KEYS, with_current_keys
from sfd_scale.recipe import EncodeRecipe, TrainRecipe


@dataclass(frozen=True, kw_only=True)
class Zero:
    kind: Literal["zero"] = "zero"
    stage: Literal[1, 2, 3] = 1


@dataclass(frozen=True, kw_only=True)
class Fsdp:
    kind: Literal["fsdp"] = "fsdp"
    shard: Literal["full", "hybrid"] = "full"


@dataclass(frozen=True, kw_only=True)
class Replicated:
    kind: Literal["ddp", "replicate"] = "replicate"
    bucket: int = 25


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: {self.lr}; allowed: above 0")


@dataclass(frozen=True, kw_only=True)
class Root:
    name: str
    steps: int = 10
    widths: tuple[int, ...] = ()
    engine: Zero | Fsdp | Replicated = field(default_factory=Zero)
    optim: Optim = field(default_factory=Optim)
    path: Path | None = None
    clip: float | None = None


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def load(folder: Path, name: str = "child", *overrides: str) -> Root:
    return config.load(folder / f"{name}.yaml", Root, overrides)


def test_extends_merges_and_later_wins(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="name: base\nsteps: 5\noptim: {lr: 1e-3, fused: true}\n",
        other="steps: 7\n",
        child="extends: [base, other]\nname: child\noptim: {lr: 2e-4}\n",
    )
    root = load(tmp_path, "child", "widths=[1,2]", "path=a/b", "clip=1")
    assert root == Root(
        name="child", steps=7, widths=(1, 2), optim=Optim(lr=2e-4, fused=True), path=Path("a/b"), clip=1.0
    )
    assert config.from_dict(Root, config.to_dict(root)) == root
    assert config.digest(root) != config.digest(load(tmp_path))
    assert config.digest({"a": 1, "b": {"c": 2, "d": 3}}) == config.digest({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_parent_stays_as_it_is_and_is_read_again_when_it_changes(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="name: x\noptim: {lr: 1e-3}\nengine: {kind: zero, stage: 3}\n",
        child="extends: base\noptim: {lr: 2e-4}\nengine: {kind: fsdp}\n",
        other="extends: base\nsteps: 7\n",
    )
    for _ in range(2):
        assert load(tmp_path, "child", "optim.fused=true").optim == Optim(lr=2e-4, fused=True)
        assert load(tmp_path, "other") == Root(name="x", steps=7, engine=Zero(stage=3), optim=Optim(lr=1e-3))
    write(tmp_path, base="name: y\n")
    assert load(tmp_path, "other") == Root(name="y", steps=7)


@dataclass(frozen=True, kw_only=True)
class Named:
    kind: Literal["named"] = "named"
    name: str
    run: Path = Path()


def test_a_recipe_without_a_name_is_named_for_its_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="kind: named\nrun: runs/${name}\n",
        child="extends: base\n",
        named="extends: base\nname: mine\n",
        inheriting="extends: named\n",
    )
    found = {name: config.load(tmp_path / f"{name}.yaml", Named) for name in ("base", "child", "named", "inheriting")}
    names = {"base": "base", "child": "child", "named": "mine", "inheriting": "mine"}
    assert found == {file: Named(name=name, run=Path("runs", name)) for file, name in names.items()}
    assert config.load(tmp_path / "child.yaml", Named, ["name=given"]).run == Path("runs/given")
    # A launcher reads the same name and folder without the class.
    assert config.tree(tmp_path / "child.yaml") == {"kind": "named", "name": "child", "run": "runs/child"}


def test_another_kind_replaces_the_node(tmp_path: Path) -> None:
    write(tmp_path, base="name: x\nengine: {kind: zero, stage: 3}\n", child="extends: base\nengine: {kind: fsdp}\n")
    assert load(tmp_path).engine == Fsdp()
    assert load(tmp_path, "base", "engine.kind=fsdp", "engine.shard=hybrid").engine == Fsdp(shard="hybrid")
    assert load(tmp_path, "base", "engine.stage=2").engine == Zero(stage=2)


def test_one_dataclass_may_have_several_kinds(tmp_path: Path) -> None:
    write(tmp_path, child="name: x\nengine: {kind: ddp, bucket: 50}\n")
    root = load(tmp_path)
    assert root.engine == Replicated(kind="ddp", bucket=50)
    assert config.from_dict(Root, config.to_dict(root)) == root
    assert load(tmp_path, "child", "engine.kind=replicate").engine == Replicated()
    assert config.with_defaults(Root, {"name": "x", "engine": {"kind": "ddp"}})["engine"] == {
        "kind": "ddp",
        "bucket": 25,
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stesp=3", ["stesp: unknown key", "did you mean steps?", "command line"]),
        ("steps=3.5", ["steps: 3.5; allowed: a whole number", "command line"]),
        ("steps=true", ["steps: True; allowed: a whole number"]),
        ("steps=9223372036854775808", ["steps: 9223372036854775808; allowed: a whole number of at most 64 bits"]),
        ("optim.lr=.nan", ["optim.lr: nan; allowed: a number", "command line"]),
        ("clip=.nan", ["clip: nan; allowed: a number"]),
        ("optim.betas=[.nan,0.9]", ["optim.betas.0: nan; allowed: a number"]),
        ("name=[1]", ["name: [1]; allowed: a text (set in the command line)"]),
        ("optim.lr=fast", ["optim.lr: 'fast'; allowed: a number"]),
        ("optim.lr=true", ["optim.lr: True; allowed: a number"]),
        ("optim.lr=-1", ["optim.lr: -1.0; allowed: above 0", "command line"]),
        ("optim.betas=[0.9]", ["optim.betas: [0.9]; allowed: a list of 2 values"]),
        ("optim.betas=[0.9,0.99,0.9]", ["optim.betas: [0.9, 0.99, 0.9]; allowed: a list of 2 values"]),
        ("engine.stage=true", ["engine.stage: True; allowed: 1, 2, 3"]),
        ("engine.kind=hybrid", ["engine.kind: 'hybrid'; allowed: zero, fsdp, ddp, replicate"]),
        ("engine.shard=full", ["engine.shard: unknown key; allowed: kind, stage"]),
        ("widths=[1,a]", ["widths.1: 'a'"]),
        ("steps", ["form dotted.key=value"]),
    ],
)
def test_errors_name_key_value_allowed_and_file(tmp_path: Path, override: str, words: list[str]) -> None:
    write(tmp_path, child="name: x\nengine: {kind: zero}\n")
    with pytest.raises(config.ConfigError) as caught:
        load(tmp_path, "child", override)
    for word in words:
        assert word in str(caught.value)


def test_the_file_that_set_a_value_is_named(tmp_path: Path) -> None:
    write(tmp_path, base="name: x\nsteps: many\n", child="extends: base\nclip: 1.0\n")
    with pytest.raises(config.ConfigError, match=r"steps: 'many'; allowed: a whole number \(set in .*base\.yaml\)"):
        load(tmp_path)


@pytest.mark.parametrize("parent", ["../secret", "/etc/passwd", "child"])
def test_extends_stays_in_its_folder_and_ends(tmp_path: Path, parent: str) -> None:
    write(tmp_path, child=f"extends: {parent}\nname: x\n")
    with pytest.raises(config.ConfigError):
        load(tmp_path)


def test_missing_recipe_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="no such recipe"):
        config.load("train/no_such_recipe_at_all", Root)
    write(tmp_path, child="name: [x\n")
    with pytest.raises(config.ConfigError, match=r"child\.yaml: not readable as settings"):
        load(tmp_path)


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    write(tmp_path, child=f"name: !!python/object/apply:os.system ['touch {tmp_path}/made']\n")
    with pytest.raises(config.ConfigError):
        load(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("name: x\nengine: {kind: [fsdp]}\n", "steps=1", r"engine\.kind: \['fsdp'\]; allowed: "),
        ("name: x\n", "steps=[", r"steps: '\['; allowed: a whole number \(set in the command line\)"),
        ("extends: base\nname: x\nengine: [1]\n", "steps=1", r"engine: \[1\]; allowed: .*child\.yaml"),
        ("extends: ${nowhere}\nname: x\n", "steps=1", r"\$\{nowhere\}: no such recipe"),
        ("name: x\nengine: {kind: '${nowhere}'}\n", "steps=1", r"child\.yaml: not readable as settings: .*nowhere"),
        ("extends: ''\nname: x\n", "steps=1", "'': not the name of a recipe"),
        ("name: x\n", "widths=[1,a]", r"widths\.1: 'a'; allowed: a whole number \(set in the command line\)"),
    ],
)
def test_whatever_is_wrong_is_an_error_of_the_recipe(tmp_path: Path, text: str, override: str, message: str) -> None:
    write(tmp_path, base="name: base\nengine: {kind: zero}\nwidths: [3]\n", child=text)
    with pytest.raises(config.ConfigError, match=message):
        load(tmp_path, "child", override)


def test_a_recipe_of_another_kind_is_refused_as_that() -> None:
    with pytest.raises(config.ConfigError, match="^kind: eval in eval/sfd_xl; allowed here: train"):
        config.load("eval/sfd_xl", TrainRecipe)
    with pytest.raises(config.ConfigError, match="^kind: none in data/imagenet256, a part that other recipes extend"):
        config.load("data/imagenet256", TrainRecipe)


def test_a_part_whose_kind_is_not_named_says_so() -> None:
    with pytest.raises(
        config.ConfigError, match=r"guidance\.kind: missing, beside scale_texture; allowed: none, cfg, auto"
    ):
        config.load("eval/sfd_xl", EvalRecipe, ["guidance.scale_texture=1.5"])


def test_an_item_of_a_list_names_the_file_that_set_the_list(tmp_path: Path) -> None:
    write(tmp_path, base="name: base\nwidths: [3, a]\n", child="extends: base\nsteps: 3\n")
    with pytest.raises(config.ConfigError, match=r"widths\.1: 'a'; .*base\.yaml\)"):
        load(tmp_path)


def test_what_changes_no_result_is_left_out_of_what_decides_it() -> None:
    """Names, places and how the work is done; at any depth, and in lists."""
    words = ["name=other", "run=elsewhere", "train.log_every=7", "data.num_workers=3", "checkpoint.background=false",
             "wandb.mode=disabled", "metrics.peak=measured"]  # fmt: skip
    first, free = (config.load("train/sfd_xl", TrainRecipe, extra) for extra in ([], words))
    assert first != free and config.settings_affecting_results([first]) == config.settings_affecting_results([free])
    for word in ("seed=1", "train.steps=7", "data.shuffle=false", "checkpoint.keep_last=1", "engine.precision=fp32"):
        assert config.settings_affecting_results(
            config.load("train/sfd_xl", TrainRecipe, [word])
        ) != config.settings_affecting_results(first), word


# -------------------------------------------------------------------------------------------- renamed keys


@pytest.mark.parametrize("override", ["meter.peak=measured", "meter={peak: measured}"])
def test_a_renamed_key_is_an_error_that_says_the_new_one(override: str) -> None:
    with pytest.raises(config.ConfigError, match=r"^meter: renamed to metrics \(set in the command line\)$"):
        config.load("train/sfd_xl", TrainRecipe, [override])


def test_a_renamed_key_in_a_recipe_of_the_user_names_its_file(tmp_path: Path) -> None:
    write(tmp_path, mine="extends: train/sfd_xl\nkind: train\nmeter: {peak: measured}\n")
    with pytest.raises(config.ConfigError, match=r"meter: renamed to metrics \(set in .*mine\.yaml\)$"):
        config.load(tmp_path / "mine.yaml", TrainRecipe)


def test_files_of_earlier_releases_are_read_under_the_new_keys(tmp_path: Path) -> None:
    wanted = config.load("train/sfd_xl", TrainRecipe, ["metrics.peak=measured"])
    old = config.to_dict(wanted)
    old["meter"] = old.pop("metrics")
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(old))
    assert config.load(tmp_path / "recipe.yaml", TrainRecipe) == wanted  # a run folder
    assert config.tree(tmp_path / "recipe.yaml") == config.to_dict(wanted)
    assert config.from_dict(TrainRecipe, old) == wanted  # the note of an export
    assert config.with_defaults(TrainRecipe, old) == config.to_dict(wanted)  # a comparison
    with pytest.raises(config.ConfigError, match="meter: renamed to metrics"):
        config.load(tmp_path / "recipe.yaml", TrainRecipe, ["meter.peak=table"])


@pytest.mark.parametrize(
    ("renamed", "old", "new"),
    [
        ({"a": "b"}, {"a": 1, "x": 0}, {"b": 1, "x": 0}),
        ({"a": "b"}, {"x": 0}, {"x": 0}),
        ({"a.c": "b.d.e"}, {"a": {"c": 1, "x": 0}}, {"a": {"x": 0}, "b": {"d": {"e": 1}}}),
        ({"a.c": "b"}, {"a": {"c": {"k": 1}}}, {"b": {"k": 1}}),
        ({"a.c": "b"}, {"a": None}, {"a": None}),
    ],
)
def test_keys_move_between_mappings(
    monkeypatch: pytest.MonkeyPatch, renamed: dict[str, str], old: dict[str, object], new: dict[str, object]
) -> None:
    monkeypatch.setitem(RENAMED_KEYS, "train", renamed)
    before = copy.deepcopy(old)
    assert with_current_keys(old, ["train"]) == new and old == before
    assert with_current_keys(old, ["encode"]) == old


def test_settings_that_another_kind_drops_are_named(caplog: pytest.LogCaptureFixture) -> None:
    words = ["source.kind=folder", "source.path=pictures"]
    with caplog.at_level(logging.WARNING):
        assert config.load("quickstart/images", EncodeRecipe, words).source.size == 256
        assert "source.size: 64 in images.yaml does not apply to another kind; it is 256 now" in caplog.text
        caplog.clear()
        config.load("quickstart/images", EncodeRecipe, [*words, "source.size=64"])
        config.load("quickstart/images", EncodeRecipe, ["source.num_images=5"])
    assert not caplog.records
