"""Compile DeepSpeed's extensions ahead of time: `python -m sfd_scale.engines.build_ops`.

DeepSpeed compiles them on first use, for minutes. Under a time limit such a build is cut off and starts again in the
next process, so `make` and CI run this first. What is compiled already is only loaded.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import time
from pathlib import Path

logger = logging.getLogger(__name__)

# The collectives of the CPU backend, and the Adam of offloaded optimizer states.
OPS = ("ShareMemCommBuilder", "CPUAdamBuilder")


def use_own_builds() -> None:
    """Make torch's extension builder use the ninja of this environment, and a folder of builds inside it.

    Torch shares one folder of builds in the home between all environments. Two in turn, with other include paths or
    another ninja, would each find the other's build stale and compile again, minutes every time.
    """
    scripts = sysconfig.get_path("scripts")
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))


def build(max_jobs: int | None = None) -> dict[str, float]:
    """Compile and load each op this machine can use; returns the seconds each took, by name.

    Args:
        max_jobs: compiler processes at once; by default the CPUs this process may use.

    Raises:
        RuntimeError: from the compiler, if one is missing or fails.
    """
    os.environ.setdefault("MAX_JOBS", str(max_jobs or len(os.sched_getaffinity(0))))
    use_own_builds()
    from deepspeed.accelerator import get_accelerator  # reads MAX_JOBS

    seconds = {}
    for name in OPS:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible(verbose=False):
            logger.info("%s: not used on this machine", name)
            continue
        started = time.monotonic()
        builder.load(verbose=False)
        seconds[builder.NAME] = time.monotonic() - started
        logger.info("%s: ready after %.0f s", builder.NAME, seconds[builder.NAME])
    return seconds


def missing() -> list[str]:
    """The ops of this machine that the first run would have to compile, by name."""
    use_own_builds()
    from deepspeed.accelerator import get_accelerator

    names = []
    for name in OPS:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible(verbose=False):
            continue
        if not list(Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob(f"{builder.NAME}.so")):
            names.append(builder.NAME)
    return names


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build()
