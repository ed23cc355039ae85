"""`sfd doctor`: checks whether this machine can run the project, and says what to change."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from sfd_scale import config
from sfd_scale.data import workers
from sfd_scale.engines import build_ops
from sfd_scale.launch.agent import gpu_count
from sfd_scale.models import attention
from sfd_scale.runtime import environment, network
from sfd_scale.runtime.caches import extensions_folder
from sfd_scale.runtime.device import fast_bf16, has_bf16

GIB = 2**30
DRIVER = 580  # the oldest branch of the driver that runs CUDA 13, the CUDA of the locked torch
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. text: what was found, and what to do unless the level is ok."""

    level: Level
    subject: str
    text: str


def versions() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")
    try:
        requirements = [Requirement(text) for text in declared_requirements()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("error", "sfd-scale", "not installed; run `pip install -e .` in the checkout")
        return
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    yield from (finding for finding in map(check_package, needed) if finding.level != "ok")
    shown = ("torch", "deepspeed", "mosaicml-streaming")
    listed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown if _installed(name))
    yield Finding("ok", "packages", f"{listed}; {len(needed)} required")


def declared_requirements() -> list[str]:
    """The dependencies in pyproject.toml: of the checkout, which an older installation does not know, or of the wheel.

    Raises:
        PackageNotFoundError: without a checkout, if sfd-scale is not installed.
    """
    file = None if config.CHECKOUT is None else config.CHECKOUT / "pyproject.toml"
    if file is None or not file.is_file():
        return importlib.metadata.requires("sfd-scale") or []
    with file.open("rb") as opened:
        declared: list[str] = tomllib.load(opened)["project"]["dependencies"]
    return declared


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_package(needed: Requirement) -> Finding:
    """Whether an installed package meets a requirement."""
    if not _installed(needed.name):
        return Finding("error", needed.name, f"not installed; run `pip install '{needed}'`")
    found = importlib.metadata.version(needed.name)
    if needed.specifier.contains(found, prereleases=True):
        return Finding("ok", needed.name, found)
    return Finding("error", needed.name, f"{found}, but {needed.specifier} is needed; run `pip install '{needed}'`")


def accelerator() -> Iterator[Finding]:
    present = gpu_count()
    if not torch.cuda.is_available():
        if present:
            cause = f"{present} GPUs, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them"
            yield Finding("error", "accelerator", f"{cause}; {_driver_advice()}")
        else:
            yield Finding("warning", "accelerator", "no GPU; set DS_ACCELERATOR=cpu, and train small models only")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        text = f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
        yield Finding("ok", f"cuda:{index}", text)


def driver_release(path: Path = Path("/proc/driver/nvidia/version")) -> int | None:
    """The branch of the NVIDIA driver of this machine, such as 580; None without one."""
    found = re.search(r"\s(\d{3,})\.\d+", path.read_text(encoding="utf-8")) if path.is_file() else None
    return None if found is None else int(found[1])


def _driver_advice() -> str:
    release = driver_release()
    if release is not None and release < DRIVER:
        return f"its driver is r{release}, and CUDA 13 needs r{DRIVER} or newer"
    return f"CUDA 13 needs a driver of branch r{DRIVER} or newer"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> Iterator[Finding]:
    device = _device()
    if device.type == "cpu" and not fast_bf16(device):
        yield Finding("ok", "bf16", "slower than float32 on this CPU; bf16 matmuls are computed in float32 and rounded")
    elif has_bf16(device):
        yield Finding("ok", "bf16", f"supported by the {device.type}")
    else:
        yield Finding("error", "bf16", "not supported by this GPU; set engine.precision=fp32, or use an A100 or newer")


def attention_kernels() -> Iterator[Finding]:
    device, able, unable = _device(), [], []
    for name in get_args(attention.AttentionBackend):
        try:
            attention.activate(name, device)
            able.append(name)
        except ValueError as error:
            unable.append(str(error).partition("(")[2].partition(")")[0])
    chosen = attention.activate("auto", device)
    runs = attention.kernel_name(device, torch.bfloat16, 64)
    yield Finding("ok", "attention", f"auto uses {chosen} ({runs}); available: {', '.join(able)}")
    if device.type == "cuda" and not {"flash3", "flash4"} & set(able):
        yield Finding("ok", "attention", f"without flash-attention 3 and 4 ({'; '.join(unable)})")


def gloo() -> Iterator[Finding]:
    """Checks gloo: two processes of this host compute a sum."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    child = os.fork()
    if child == 0:
        os._exit(0 if _adds(1, port) else 1)
    mine = _adds(0, port)
    if mine and _exit_code(child, within_s=60) == 0:
        yield Finding("ok", "gloo", "two processes of this host reach each other")
    else:
        yield Finding(
            "error", "gloo", "two processes of this host do not reach each other; check the loopback interface"
        )
    name = socket.gethostname()
    try:
        loopback = network.is_loopback(name)
    except ValueError:
        loopback = True
    if loopback:
        found = "does not resolve to a network address; our launchers do not need it, other tools may"
        yield Finding("ok", "host name", f"{name} {found}")


def _exit_code(child: int, within_s: float) -> int:
    """The exit code of a forked process, which is killed if it does not end in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _adds(rank: int, port: int) -> bool:
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=20)
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
        value = torch.tensor([1.0 + rank])
        dist.all_reduce(value)
        dist.destroy_process_group()
    except (RuntimeError, ValueError):  # the finding reports the failure
        return False
    return value.item() == 3.0


def nccl() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        return
    cards = [torch.ones(1, device=f"cuda:{index}") for index in range(torch.cuda.device_count())]
    try:
        torch.cuda.nccl.all_reduce(cards)
        right = all(card.item() == len(cards) for card in cards)
    except RuntimeError as error:
        yield Finding("error", "nccl", f"{error}; run again with NCCL_DEBUG=INFO")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    if right:
        yield Finding("ok", "nccl", f"{version}, the sum over {len(cards)} GPUs is right")
    else:
        yield Finding("error", "nccl", f"{version}, a wrong sum over {len(cards)} GPUs; try NCCL_P2P_DISABLE=1")


def limits() -> Iterator[Finding]:
    shared = workers.memory_problem(GIB // 8), workers.memory_problem(GIB)
    level: Level = "error" if shared[0] else "warning" if shared[1] else "ok"
    yield Finding(level, "shared memory", shared[0] or shared[1] or f"at least 1 GiB free in {workers.SHARED_MEMORY}")
    socket_ = workers.socket_problem()
    yield Finding("error" if socket_ else "ok", "TMPDIR", socket_ or f"{tempfile.gettempdir()} has room for sockets")
    files = workers.files_problem(256), workers.files_problem(4000)
    level = "error" if files[0] else "warning" if files[1] else "ok"
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Finding(level, "open files", files[0] or files[1] or str(most))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        yield Finding("warning", "locked memory", f"{locked} bytes, too few for InfiniBand; ulimit -l unlimited")


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    level: Level = "error" if free < GIB else "warning" if free < 50 * GIB else "ok"
    advice = "" if level == "ok" else "; a checkpoint has 16 bytes per parameter: put --run on a larger file system"
    yield Finding(level, "disk", f"{free / GIB:.0f} GiB free in {Path.cwd()}{advice}")
    if not os.access(Path.cwd(), os.W_OK):
        yield Finding("error", "disk", f"{Path.cwd()} is not writable; change to another folder")


def extensions() -> Iterator[Finding]:
    missing = build_ops.missing()
    if not missing:
        yield Finding("ok", "DeepSpeed ops", "compiled")
        return
    tools = [name for name in ("c++", "ninja") if not shutil.which(name)]
    if tools:
        yield Finding(
            "error", "DeepSpeed ops", f"{', '.join(missing)} not compiled, and {', '.join(tools)} missing; install them"
        )
    else:
        text = f"{', '.join(missing)} not compiled; run `python -m sfd_scale.engines.build_ops` once; it takes minutes"
        yield Finding("warning", "DeepSpeed ops", text)


def caches() -> Iterator[Finding]:
    """Checks the folders that libraries write to: compiled extensions, and what they download and compile."""
    folder, installed = extensions_folder(), Path(sys.prefix) / "torch_extensions"
    if environment.text("TORCH_EXTENSIONS_DIR") is None and folder != installed:
        text = f"{installed} cannot be written; extensions go to {folder}; set TORCH_EXTENSIONS_DIR to keep them"
        yield Finding("warning", "caches", text)
    cache = Path(environment.text("XDG_CACHE_HOME") or Path.home() / ".cache")
    if cache.is_relative_to(tempfile.gettempdir()):
        yield Finding("warning", "caches", f"{cache}, a folder for temporary files; set XDG_CACHE_HOME to keep them")
    else:
        yield Finding("ok", "caches", str(cache))


def tools() -> Iterator[Finding]:
    missing = [name for name in ("ssh", "pdsh") if not shutil.which(name)]
    if missing:
        text = f"no {', '.join(missing)}; needed for HOSTFILE launches; or use launchers/torchrun.sh on every node"
        yield Finding("warning", "several nodes", text)
    else:
        yield Finding("ok", "several nodes", "ssh and pdsh are installed")


# gloo comes first, because it forks; a process that has used CUDA must not fork.
CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    gloo, versions, accelerator, precision, attention_kernels, nccl, limits, disk, caches, extensions, tools,
)  # fmt: skip


def examine() -> list[Finding]:
    """Run all checks in the order of `CHECKS`. An exception in a check becomes a finding."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check()
        except (RuntimeError, OSError, ImportError) as error:
            found.append(Finding("error", check.__name__.replace("_", " "), f"{type(error).__name__}: {error}"))
    return found


if __name__ == "__main__":
    from sfd_scale.__main__ import main

    main("doctor")
