"""Which words of a command line are recipes, which are overrides, and how values are read: paths hold any character."""

import os
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import eval.__main__
import sfd_scale.__main__
from eval.recipe import EvalRecipe
from eval.recipes import compare, load_any
from eval.search.sweep import split_values
from sfd_scale import config
from sfd_scale.config import words
from sfd_scale.launch import commands
from sfd_scale.recipe import TrainRecipe

ODD = [
    "lr=1e-4,bs=8", "a b", "[x]", "{y: 1}", "a: b", "x #1", "=", "seed=1", "[bold]", ":100:", "-x", "'q", '"', "ü–漢",
    "&a *b", "%5", "!t",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_an_existing_file_is_a_recipe_whatever_its_path_holds(tmp_path: Path, odd: str) -> None:
    file = tmp_path / odd / f"{odd}.yaml"
    file.parent.mkdir()
    file.write_text(config.to_yaml(config.load("train/sfd_xl", TrainRecipe)))
    assert config.split_words([str(file), "seed=1", "train/sfd_xl"]) == ([str(file), "train/sfd_xl"], ["seed=1"])
    assert config.load(str(file), TrainRecipe, ["seed=3"]).seed == 3
    assert load_any(str(file)).name == "sfd_xl"
    assert compare("train/sfd_xl", [str(file)]) is None
    assert config.split_words([str(file.with_suffix(""))])[1] == []  # as every recipe, also without .yaml


def test_a_relative_path_that_looks_like_an_override_is_a_recipe_if_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4").mkdir()
    (tmp_path / "lr=1e-4/recipe.yaml").write_text("kind: train\n")
    (tmp_path / "seed=1").write_text("kind: train\n")
    (tmp_path / "seed=2.yaml").write_text("kind: train\n")
    recipes, overrides = config.split_words(["lr=1e-4/recipe.yaml", "seed=1", "seed=2", "seed=3"])
    assert (recipes, overrides) == (["lr=1e-4/recipe.yaml", "seed=1", "seed=2"], ["seed=3"])


@pytest.mark.parametrize(
    "word", ["runs/lr=1e-4,bs=8/recipe.yaml", "/a=b", "=x", "a b=c", "no/such", "x" * 5000, "a\0=b"]
)
def test_other_words_are_recipes_that_are_not_found(word: str) -> None:
    assert not config.is_override(word)
    with pytest.raises(config.ConfigError, match="no such recipe or file|not the name of a recipe"):
        config.find_recipe(word)


def test_a_folder_is_no_recipe_and_the_recipe_in_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"a folder; allowed: the file of a recipe$"):
        config.find_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text("kind: train\n")
    with pytest.raises(config.ConfigError, match=rf"a folder; allowed: .*such as {tmp_path}/recipe.yaml"):
        config.find_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("5e-5", 5e-5), ("true", True), ("null", None), ("", None), ("[0.9, 1]", [0.9, 1]),
        ("{kind: fsdp, a: 1}", {"kind": "fsdp", "a": 1}), ('"5"', "5"), ("'a: b'", "a: b"), ("runs/x", "runs/x"),
        ("${name}/x", "${name}/x"),
        ("a: b", "a: b"), ("x #1.pt", "x #1.pt"), ("[best].pt", "[best].pt"), ("{a}b", "{a}b"), ("&a", "&a"),
        ("*a", "*a"), ("- a", "- a"), ("a, b", "a, b"), ("'a' b", "'a' b"),
        ("%x", "%x"), ("!x y", "!x y"), ("@a", "@a"),
        ("|", "|"),
        ("x\udcff", "x\udcff"), ("lr=1e-4", "lr=1e-4"), ("...", "..."), ("---", "---"),
    ],
)  # fmt: skip
def test_values_are_yaml_and_anything_else_is_a_text(text: str, value: Any) -> None:
    assert words.parse_override(f"a.b={text}") == ("a.b", value)
    assert type(words.parse_override(f"a.b={text}")[1]) is type(value)


def test_a_list_is_a_path_if_a_file_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert words.parse_override("checkpoint=[a]")[1] == ["a"]
    (tmp_path / "[a]").write_text("")
    assert words.parse_override("checkpoint=[a]")[1] == "[a]"


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
        str.strip
    )
)
def test_a_path_that_a_program_sets_arrives_as_it_is(path: str) -> None:
    assume(path != "~" and not path.startswith("~/") and "://" not in path)  # the home folder, and addresses
    given = [config.override("checkpoint", path)]
    assert words.parse_override(given[0])[1] == path.replace("${", "\\${")
    if not path.startswith("\\") and "\\${" not in path and "\\\\" not in path:
        assert str(config.load("eval/sfd_xl", EvalRecipe, given).checkpoint) == str(Path(path))


def test_a_name_that_is_not_utf8_is_refused_by_its_key() -> None:
    for name in (b"a\xff", b"\x80/b.safetensors"):
        with pytest.raises(ValueError, match="checkpoint: .* is not UTF-8; rename it"):
            config.override("checkpoint", os.fsdecode(name))


def test_options_of_paths_reach_the_recipe_as_they_are(tmp_path: Path) -> None:
    for odd in ODD:
        loaded = eval.__main__._load("eval/sfd_xl", None, tmp_path / odd)
        assert loaded.checkpoint == tmp_path / odd


def test_the_value_of_an_option_is_no_override() -> None:
    made = commands.RankCommand(
        "sfd_scale", ("train", "--run", "seed=1", "quickstart/sfd", "--allow-foreign", "seed=2")
    )
    assert (made.recipe, made.overrides) == ("quickstart/sfd", ["seed=2"])
    assert made.log_folder() == Path("seed=1/logs").absolute()
    assert commands.RankCommand("eval", ("compare", "a.json", "b")).recipe is None
    assert commands.RankCommand("sfd_scale", ("train", "--run=x=1", "quickstart/sfd")).overrides == []


def test_launchers_know_which_options_have_no_value() -> None:
    for app, names in ((sfd_scale.__main__.app, ("train", "encode", "convert", "fit")), (eval.__main__.app, None)):
        group = typer.main.get_command(app)
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if names is not None and name not in names:
                continue
            flags = {opt for param in command.params if getattr(param, "is_flag", False) for opt in param.opts}
            assert flags <= set(commands.FLAGS), name


def test_a_sweep_takes_an_existing_path_and_a_quoted_text_as_one_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1,bs=2").mkdir()
    assert split_values("lr=1,bs=2") == ["lr=1,bs=2"]
    assert split_values("lr=1,bs=3") == ["lr=1", "bs=3"]
    assert split_values('"a,b",[1,2],{x: 1, y: 2},it\'s,c') == ['"a,b"', "[1,2]", "{x: 1, y: 2}", "it's", "c"]


def test_a_tilde_is_the_home_folder_in_settings_and_in_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands it in `--run ~/x`, not in `run=~/x`, `--run=~/x` or a YAML file: a folder named ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = config.load("train/sfd_xl", TrainRecipe, ["run=~/runs/x", "data.path=~/"])
    assert (loaded.run, loaded.data.path) == (tmp_path / "runs/x", tmp_path)
    assert config.checked_arguments(["train", "--run=~/x", "seed=1", "--out", "~/y=1", "--title", "~ 3 days"]) == [
        "train", f"--run={tmp_path}/x", "seed=1", "--out", f"{tmp_path}/y=1", "--title", "~ 3 days",
    ]  # fmt: skip
    command = commands.RankCommand("sfd_scale", ["train", "train/sfd_xl", "run=~/runs/x"])
    assert command.log_folder() == tmp_path / "runs/x/logs"
    monkeypatch.chdir(tmp_path)
    assert config.local_path("./~/x") == Path("./~/x")  # the way to such a folder


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://b/x", "https://host/x", "hf://datasets/a/b"])
def test_an_address_is_no_folder_of_this_machine(address: str) -> None:
    """Results went to a folder named `s3:`, and were lost with the machine."""
    for overrides in ([f"run={address}"], [f"data.path={address}"]):
        key = overrides[0].split("=")[0]
        with pytest.raises(config.ConfigError, match=rf"^{key}: '{address}'; allowed: a path of this machine"):
            config.load("train/sfd_xl", TrainRecipe, overrides)
    for arguments in (["train", "x", "--run", address], ["train", "x", f"--run={address}"]):
        with pytest.raises(ValueError, match=f"^--run: '{address}'; allowed: a path of this machine"):
            config.checked_arguments(arguments)
    assert config.load("train/sfd_xl", TrainRecipe, [f"data.remote={address}"]).data.remote == address


@pytest.mark.parametrize("arguments", [["--run", ""], ["--run="], ["--run", " "], ["", "x"], ["seed=1", ""]])
def test_an_empty_word_is_refused_and_is_not_the_current_folder(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^(--run|argument): ' ?'; allowed: a value \(is a variable of the shell"):
        config.checked_arguments(["train", "recipe", *arguments])
    with pytest.raises(config.ConfigError, match="^run: ''; allowed: a path; the current folder is `.`"):
        config.load("train/sfd_xl", TrainRecipe, ["run=''"])


def test_none_of_python_is_refused_where_null_is_meant() -> None:
    """It was a text: W&B's entity `None`, statistics in a file named None."""
    for key in ("wandb.entity", "data.stats", "checkpoint.keep_last", "published"):
        with pytest.raises(config.ConfigError, match=f"^{key}: 'None'; allowed: null, for no value"):
            config.load("train/sfd_xl", TrainRecipe, [f"{key}=None"])
        config.load("train/sfd_xl", TrainRecipe, [f"{key}=null"])


@pytest.mark.parametrize("word", ["run=2024", "run=007", "run=1e3", "run=no", "name=on", "name=1:30", "name=1_000"])
def test_a_text_that_yaml_reads_as_a_number_is_refused_with_the_way_to_write_it(word: str) -> None:
    key, _, text = word.partition("=")
    with pytest.raises(config.ConfigError, match=rf"^{key}: .*; allowed: a (path|text), in quotes, or YAML reads"):
        config.load("train/sfd_xl", TrainRecipe, [word])
    loaded = config.load("train/sfd_xl", TrainRecipe, [f'{key}="{text}"'])
    assert str(getattr(loaded, key)) == text
