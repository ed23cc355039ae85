"""A wheel holds the whole product. Its commands run in a fresh environment, outside of the checkout."""

from __future__ import annotations

import os
import re
import shlex
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)],
        check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel; it shares the other packages with this one."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "-q", "--no-deps", str(wheel)],
        check=True, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    (own,) = venv.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last, and its own .pth files (an editable install) are not read.
    (own / "shared.pth").write_text("\n".join(site.getsitepackages()))
    return venv / "bin"


def run(command: str, bin_folder: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in an environment. The first training compiles DeepSpeed's operators, which takes minutes."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "PATH": f"{bin_folder}:{environment['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "RANKS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(
        shlex.split(command), capture_output=True, text=True, cwd=folder, env=environment, timeout=900, check=False
    )


def test_the_wheel_holds_recipes_and_evaluation_and_claims_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sfd_scale"}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {f"sfd_scale/{name}" for name in recipes} <= set(names) and len(recipes) > 80
    files = [path for path in (ROOT / "eval").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {f"sfd_scale/{path.relative_to(ROOT).as_posix()}" for path in files} <= set(names)


def test_commands_of_the_readme_run_outside_the_checkout(bin_folder: Path, tmp_path: Path) -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    commands = [line.strip() for line in re.findall(r"^ {4}(sfd .*)$", text, re.MULTILINE)]
    assert len(commands) > 8
    for command in commands:
        done = run(command.split("  #")[0], bin_folder, tmp_path)
        # Without ImageNet and its weights a command ends in one sentence.
        assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
        if shlex.split(command)[1] in ("recipes", "show", "diff", "plan", "--version", "init"):
            assert done.returncode == 0 and done.stdout, f"{command}\n{done.stderr}"
        else:
            assert "No such command" not in done.stderr and "no such recipe" not in done.stderr, command


def test_the_evaluation_lies_in_the_namespace_of_the_package(bin_folder: Path, tmp_path: Path) -> None:
    assert run("sfd eval generate --help", bin_folder, tmp_path).returncode == 0
    assert run("python -m sfd_scale.eval score --help", bin_folder, tmp_path).returncode == 0
    assert "No module named" in run("python -c 'import eval'", bin_folder, tmp_path).stderr
    where = run("python -c 'import sfd_scale.eval as e; print(e.__file__)'", bin_folder, tmp_path).stdout
    assert Path(where).is_relative_to(bin_folder.parent)
    # A package of this name in the user's folder is another one.
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/__init__.py").write_text("raise SystemExit('the wrong package')")
    assert "the wrong package" not in run("python -m sfd_scale eval score --help", bin_folder, tmp_path).stderr


def test_data_and_training_run_from_the_wheel(bin_folder: Path, tmp_path: Path) -> None:
    done = run("sfd encode quickstart/images source.num_images=80 out=images", bin_folder, tmp_path)
    assert done.returncode == 0, done.stderr
    settings = "data.path=images train.steps=2 train.global_batch=16 --run run"
    for launch in ("sfd", "sfd launch --launcher torchrun"):
        done = run(f"{launch} train quickstart/vision {settings}", bin_folder, tmp_path)
        assert done.returncode == 0, done.stderr
    done = run("sfd export run --out run.safetensors", bin_folder, tmp_path)
    assert done.returncode == 0 and (tmp_path / "run.safetensors").is_file(), done.stderr


# An extra, a library that it brings, and what a command says or does without and with it.
EXTRAS = {
    "": ("torch", "sfd recipes quickstart", "quickstart/sfd"),
    "quickstart": ("sklearn", "sfd encode quickstart/images source.num_images=20 out=images", ""),
    "parquet": ("pyarrow.parquet", "python -c 'import sfd_scale.data.parquet'", ""),
    "tensorboard": ("torch.utils.tensorboard", "sfd recipes quickstart", "quickstart/sfd"),
    "float8": ("torchao.float8", "sfd recipes quickstart", "quickstart/sfd"),
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The locked versions without hashes, as constraints."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    out = tmp_path_factory.mktemp("locked") / "constraints.txt"
    out.write_text("\n".join(re.findall(r"^[\w.-]+==[^\s\\;]+", text, re.MULTILINE)))
    return out


@pytest.mark.parametrize("extra", list(EXTRAS))
def test_extras_in_fresh_environments(extra: str, wheel: Path, locked: Path, tmp_path: Path) -> None:
    """Nothing is shared with this environment but uv's cache of downloads."""
    library, command, says = EXTRAS[extra]
    uv, venv = [sys.executable, "-m", "uv", "-q"], tmp_path / "venv"
    (tmp_path / "override.txt").write_text("transformers>=5")
    subprocess.run([*uv, "venv", "--python", sys.executable, str(venv)], check=True)
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    subprocess.run(
        [*uv, "pip", "install", "--python", str(venv / "bin/python"), "--constraint", str(locked), "--override",
         str(tmp_path / "override.txt"), wanted],
        check=True,
    )  # fmt: skip
    assert run(f"python -c 'import {library}'", venv / "bin", tmp_path).returncode == 0
    done = run(command, venv / "bin", tmp_path)
    assert done.returncode == 0 and says in done.stdout, done.stderr
    if not extra:
        for other in ("sklearn", "pyarrow", "tensorboard", "torchao"):
            assert "No module named" in run(f"python -c 'import {other}'", venv / "bin", tmp_path).stderr, other
        refused = run("sfd encode quickstart/images source.num_images=20 out=images", venv / "bin", tmp_path)
        assert refused.returncode != 0 and "pip install 'sfd-scale[quickstart]'" in refused.stderr.replace("\n", " ")
