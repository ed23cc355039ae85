"""Every command of the pages parses, its recipe loads with its settings, and the cheap ones run. Words can be found:
messages of Troubleshooting stand in the source, and the field's phrases stand in the pages that explain them."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import eval.__main__ as harness
import sfd_scale.__main__ as package
from benchmarks import plan_pages
from eval.recipes import load_any
from eval.search.sweep import cells
from sfd_scale import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
APPS = {"sfd": package.app, "eval": harness.app}
# What a placeholder may stand for; a setting in the text is one of any of these.
EXAMPLES = {"train": "train/sfd_xxl_zero2", "encode": "data/encode_imagenet256", "generate": "eval/sfd_xl"}
SETTABLE = (
    "train/sfd_xl", "train/sfd_xxl_zero3", "data/encode_imagenet256", "data/convert_imagenet256", "eval/sfd_xl",
    "eval/sfd_xl_autoguidance", "quickstart/sfd", "quickstart/eval", "quickstart/semvae",
)  # fmt: skip
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # typer carries its own click
RUN = ("recipes", "show", "diff")
LAUNCHERS = (r"launchers/deepspeed\.sh", r"launchers/torchrun\.sh", r"sbatch( -\S+)* launchers/slurm\.sbatch")


@dataclass(frozen=True)
class Line:
    """A command as it stands in a page."""

    page: str
    text: str
    inline: bool = False  # in a sentence, where arguments may be left out

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def joined(text: str) -> str:
    """Commands over several lines as one line each."""
    return re.sub(r"\\\n\s*", "", text)


def lines(page: Path) -> Iterator[Line]:
    text = joined(page.read_text(encoding="utf-8"))
    indented = re.findall(r"^(?: {4}| {8})(\S.*)$", text, re.MULTILINE)
    fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"(?<!`)`((?:sfd|python -m eval|make) [^`]+)`(?!`)", text)
    for command in [*indented, *fenced]:
        yield Line(page.name, command.strip().removeprefix("$ "))
    for command in inline:
        if "·" not in command and "..." not in command:
            yield Line(page.name, command, inline=True)


def arguments(text: str) -> tuple[str, list[str]] | None:
    """Which of our command lines a line calls, and its arguments; None for any other line."""
    text = re.sub(r"^((export )?[A-Z_]+=\S+ )+", "", text)
    for launcher in LAUNCHERS:
        text = re.sub(rf"^{launcher}\s+--module eval\s+", "python -m eval ", text)
        text = re.sub(rf"^{launcher}\s+", "sfd ", text)
    for prefix, app in (("sfd ", "sfd"), ("python -m sfd_scale ", "sfd"), ("python -m eval ", "eval")):
        if text.startswith(prefix):
            words = shlex.split(text.removeprefix(prefix), comments=True)
            if words[:1] == ["launch"] and len(words) > 1:  # the words after the options of `launch` are a command
                words = words[3:] if words[1] == "--launcher" else words[1:]
            return ("eval", words[1:]) if words[:1] == ["eval"] and len(words) > 1 else (app, words)
    return None


COMMANDS = [line for page in PAGES for line in lines(page) if arguments(line.text) and "[" not in line.text]


def parsed(line: Line) -> tuple[str, dict[str, Any]]:
    """The command's name and parameters, by the parser that the user meets."""
    found = arguments(line.text)
    assert found is not None
    group: Any = typer.main.get_command(APPS[found[0]])
    if found[1] in (["--help"], ["--version"], ["--install-completion"]):
        return "help", {}
    try:
        with group.make_context(found[0], list(found[1]), resilient_parsing=True) as context:
            name, command, rest = group.resolve_command(context, list(found[1]))
        if command is None:
            raise AssertionError(f"{line}: no such command")
        # In a sentence, arguments may be missing; what is there must still be right.
        return name, command.make_context(name, rest, parent=context, resilient_parsing=line.inline).params
    except USAGE_ERROR as error:
        raise AssertionError(f"{line}: {error.format_message()}") from error


def test_there_are_commands_in_the_pages() -> None:
    assert len(COMMANDS) > 30
    assert {line.page for line in COMMANDS} >= {"README.md", "quickstart.md", "training.md", "data.md", "index.md"}


@pytest.mark.parametrize(
    "text", ["sfd trian train/sfd_xl", "sfd export x --output y", "python -m eval score eval/sfd_xl"]
)
def test_a_wrong_command_is_found(text: str) -> None:
    with pytest.raises(AssertionError, match="sfd|eval"):
        parsed(Line("a page", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse_and_their_recipes_load(page: Path) -> None:
    for line in (line for line in COMMANDS if line.page == page.name):
        name, params = parsed(line)
        recipe, overrides = params.get("recipe"), params.get("overrides") or []
        if recipe is None or (str(recipe).isupper() and name not in EXAMPLES):
            continue
        recipe = EXAMPLES[name] if str(recipe).isupper() else str(recipe)
        try:
            cells(recipe, params["grid"]) if name == "sweep" else load_any(recipe, overrides)
        except ValueError as error:
            raise AssertionError(f"{line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_exist(page: Path) -> None:
    for text in re.findall(r"(?<!`)`([a-z_]+(?:\.[a-z_]+)*=[^`]+)`(?!`)", page.read_text(encoding="utf-8")):
        settings = shlex.split(text)
        if text == "key=value":
            continue
        errors = []
        for recipe in SETTABLE:
            try:
                load_any(recipe, settings)
                break
            except config.ConfigError as error:
                errors.append(str(error))
        else:
            raise AssertionError(f"{page.name}: `{text}`: {errors[0]}")


def test_the_cheap_commands_run() -> None:
    done = set()
    for line in COMMANDS:
        found = arguments(line.text)
        assert found is not None
        if found[1][0] in RUN and not any(word.isupper() for word in found[1]) and tuple(found[1]) not in done:
            result = CliRunner().invoke(APPS[found[0]], found[1])
            assert result.exit_code == 0, f"{line}: {result.output}"
            done.add(tuple(found[1]))
    assert {words[0] for words in done} == set(RUN)


def test_examples_of_plans_are_what_the_command_prints() -> None:
    found = {page.name: list(plan_pages.examples(page.read_text(encoding="utf-8"))) for page in plan_pages.PAGES}
    assert len(found["scale.md"]) >= 2
    for command, text in itertools.chain.from_iterable(found.values()):
        assert plan_pages.output(command) == text, f"{command}: run `python -m benchmarks.plan_pages`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in lines(page):
        if line.text.startswith("make "):
            assert line.text.split()[1] in targets, f"{line}: no such target"
    for name in re.findall(r"`((?:launchers|recipes|tests|eval|sfd_scale|benchmarks)/[\w/-]*(?:\.\w+|/))`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name} does not exist"


def test_pages_are_in_the_navigation_and_exist() -> None:
    entries = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    named = set(entries)
    assert len(named) == len(entries)
    assert all((ROOT / "docs" / name).is_file() for name in named)
    assert {"index.md", "quickstart.md", "training.md", "architecture.md", "troubleshooting.md"} <= named


def long_lines(text: str) -> list[str]:
    """Lines of more than 100 characters, without tables that a command writes and lines that cannot be broken."""
    text = re.sub(r"<!-- (?!end\b).*? -->\n.*?<!-- .*?end.*? -->", "", text, flags=re.DOTALL)
    unbreakable = re.compile(r"\s*(?:!?\[[^\]]*\])?\S+")  # one word, or one link with its text
    return [line for line in text.splitlines() if len(line) > 100 and not unbreakable.fullmatch(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_have_at_most_100_characters(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []


def test_a_long_line_is_found_and_a_link_or_a_table_of_a_command_is_not_one() -> None:
    words = "word " * 21
    table = f"<!-- table: sfd plan -->\n\n| {words} |\n\n<!-- end of table -->\n"
    assert long_lines(f"{table}[a link](https://{'x' * 100})\n{words}\n") == [words]


PHRASES = {
    "training.md": (
        "flow matching", "gradient accumulation", "learning-rate schedule", "mixed precision", "throughput", "resume",
        "loss spike", "silent data corruption", "pretrained", "checkpoint", "EMA", "official checkpoints",
    ),
    "engines.md": ("mixed precision", "activation checkpointing", "torch.compile", "FSDP2", "ZeRO", "HSDP", "matmul"),
    "evaluation.md": ("classifier-free guidance", "AutoGuidance", "FID", "sampler", "Inception"),
    "data.md": ("pretrained weights", "MDS", "throughput", "TF32 matmul", "object stores"),
    "troubleshooting.md": ("out of memory", "NaN", "hangs", "throughput", "silent data corruption"),
    "parity.md": ("official code", "autocast"),
}  # fmt: skip


@pytest.mark.parametrize("page", PHRASES)
def test_the_phrases_that_users_search_for_are_in_the_page_that_explains_them(page: str) -> None:
    text = re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text(encoding="utf-8")).lower()
    assert [phrase for phrase in PHRASES[page] if phrase.lower() not in text] == []


def messages() -> list[str]:
    """Every text of the source, with … for what is filled in."""
    found = []
    for file in [*(ROOT / "sfd_scale").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


OF_LIBRARIES = ("CUDA out of memory",)


def test_the_messages_of_troubleshooting_are_those_of_the_source() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    section = page[page.index("## Error messages") : page.index("## The loss is NaN")]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell) if name not in OF_LIBRARIES]
    assert len(named) > 20
    texts = messages()
    patterns = {name: re.compile(".*".join(map(re.escape, name.split("…")))) for name in named}
    missing = [name for name, pattern in patterns.items() if not any(pattern.search(text) for text in texts)]
    assert missing == []


def test_the_new_modules_of_the_migration_page_exist() -> None:
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", (ROOT / "docs/migration.md").read_text(encoding="utf-8"), re.MULTILINE)
    old, new = (re.findall(r"`((?:sfd_scale|eval)(?:\.\w+)+)`", " ".join(cells)) for cells in zip(*rows, strict=True))
    assert len(old) > 30 and len(new) > 30
    assert [name for name in new if find_spec(name) is None] == []
