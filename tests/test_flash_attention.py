"""flash-attention 2 compiles for the locked PyTorch as launchers/flash_attention.sh builds it; no GPU is needed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launchers/flash_attention.sh"
# Heads of 64 (XXL) in bf16. The file names of that package say sm80: the source serves all GPUs from there on.
KERNELS = ("flash_fwd_hdim64_bf16_sm80", "flash_bwd_hdim64_bf16_sm80")


def run(*words: object, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bash", SCRIPT, *map(str, words)], env=given, capture_output=True, text=True, timeout=timeout
    )


def test_the_script_refuses_what_it_does_not_know_and_says_what_it_needs(tmp_path: Path) -> None:
    unknown = run("--fetsh", timeout=20)
    assert unknown.returncode == 2 and "usage: launchers/flash_attention.sh" in unknown.stderr
    bare = run(timeout=20, CUDA_HOME=str(tmp_path), PATH="/usr/bin:/bin")
    assert bare.returncode == 1 and "nvcc: not found" in bare.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("flash-attention")
    done = run("--fetch", folder, timeout=300)
    assert done.returncode == 0, done.stderr
    yield folder


def install_cuda(folder: Path, *names: str) -> Path:
    """Install packages of the CUDA release of the locked PyTorch; returns their folder."""
    cuda = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert cuda is not None
    packages = [f"{name}=={cuda[1]}.*" for name in names]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", folder, *packages], check=True)
    return folder / "nvidia/cu13"


@pytest.mark.full
def test_its_binding_is_right_for_the_locked_torch_by_the_changed_flag(source: Path, tmp_path: Path) -> None:
    assert "-std=c++17" not in (source / "setup.py").read_text()
    # PyTorch's own packages have the headers of the runtime, but not those of its host compiler.
    headers = install_cuda(tmp_path, "nvidia-cuda-crt") / "include"
    done = run("--syntax", source, timeout=900, CPATH=str(headers))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.full
def test_a_forward_and_a_backward_kernel_compile_for_hopper(source: Path, tmp_path: Path) -> None:
    names = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
    nvcc = install_cuda(tmp_path, *names) / "bin/nvcc"
    done = run("--kernels", source, *KERNELS, timeout=3600, NVCC=str(nvcc))
    assert done.returncode == 0, done.stderr[-2000:]
    for name in KERNELS:
        # An object file with machine code of that GPU.
        assert b"sm_90" in (source / f"{name}.o").read_bytes()
