"""The start of the command line: seconds that a machine measures differ, so these tests look at imported modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.recipes import KINDS, load_any
from sfd_scale import config

ROOT = Path(__file__).parents[1]
# Prints the slow libraries that were imported when the command ended.
_RUN = """
import sys
from sfd_scale.__main__ import main
try:
    main()
finally:
    from sfd_scale.runtime.inert_imports import SLOW
    print("imported:", sorted(SLOW & set(sys.modules)))
"""
_DUMP = """
import json, sys
from sfd_scale.runtime.inert_imports import inert_imports
from sfd_scale import config
with inert_imports():
    from eval.recipes import KINDS
    kinds = {name: kind for name in config.recipe_names() if (kind := config.kind_of(name))}
    print(json.dumps({name: config.to_yaml(config.load(name, KINDS[kind])) for name, kind in kinds.items()}))
assert "torch" not in sys.modules and "sfd_scale.recipe" not in sys.modules
from sfd_scale import runtime
assert not hasattr(runtime, "device")  # no module of the block is left as an attribute of its package
import sfd_scale.recipe, torch
from sfd_scale import recipe
assert recipe is sfd_scale.recipe and torch.zeros(1).sum() == 0
"""


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "--help", "--version", "train --help", "eval generate --help", "show train/sfd_xl", "recipes XXL zero",
        "diff train/sfd_xl schedule.delta_t=0", "train train/sfd_xl sed=1", "eval generate eval/sfd_xl bach=1 --out x",
        "trian", "plan train/sfd_xll --gpus 8", "plan train/sfd_xl --gpus 8 --gpu h900", "doctor train/sfd_xll",
        "study study/fulll", "sample model.safetensors --guidance x",
    ],
)  # fmt: skip
def test_these_commands_import_no_slow_library(arguments: str) -> None:
    done = _run(_RUN, *arguments.split())
    assert "imported: []" in done.stdout, done.stderr


def test_recipes_read_with_inert_imports_are_those_read_with_torch() -> None:
    done = _run(_DUMP)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 80
    for name, text in found.items():
        assert text == config.to_yaml(load_any(name)), name
    assert {config.kind_of(name) for name in found} == set(KINDS)


def test_differences_are_dotted_keys_with_both_values() -> None:
    done = _run(_RUN, "diff", "train/sfd_xl", "schedule.delta_t=0", "model.size=B")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["model.size", "XL", "B"] in rows and ["schedule.delta_t", "0.3", "0.0"] in rows and len(rows) == 4


def test_the_list_of_recipes_is_filtered_by_words() -> None:
    rows = _run(_RUN, "recipes", "xxl", "ZERO2").stdout.splitlines()
    assert len(rows) == 3 and rows[1].startswith("train/sfd_xxl_zero2 ")
    assert "no recipe has these words" in _run(_RUN, "recipes", "xxl", "nothing").stderr


def test_a_key_without_its_section_is_suggested_with_it() -> None:
    for key, full in (("delta_t", "schedule.delta_t"), ("global_batch", "train.global_batch"), ("sed", "seed")):
        assert f"did you mean {full}?" in _run(_RUN, "train", "train/sfd_xl", f"{key}=1").stderr.replace("\n", " ")
    # `size` exists in several sections.
    assert "did you mean" not in _run(_RUN, "train", "train/sfd_xl", "width=1").stderr


def test_the_shell_completes_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_SFD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "sfd train train/sfd_xxl_z")
    monkeypatch.setenv("COMP_CWORD", "2")
    code = "from sfd_scale.__main__ import app; app(prog_name='sfd')"
    assert _run(code).stdout.split() == [f"train/sfd_xxl_zero{end}" for end in ("1", "2", "3", "3_offload")]
