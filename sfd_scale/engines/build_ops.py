"""Compile DeepSpeed's extensions ahead of time: `python -m sfd_scale.engines.build_ops`.

DeepSpeed compiles them on first use, for minutes. Under a time limit such a build is cut off and starts again in the
next process, so `make` and CI run this first. What is compiled already is only loaded.
"""

from __future__ import annotations

import logging
import os
import sysconfig
import time

logger = logging.getLogger(__name__)

# The collectives of the CPU backend, and the Adam of offloaded optimizer states.
OPS = ("ShareMemCommBuilder", "CPUAdamBuilder")


def use_own_ninja() -> None:
    """Make torch's extension builder find the ninja of this environment first.

    Ninja versions hash a command differently, so two of them in turn (a system's, and this one when the environment is
    activated) would each find the other's build stale and compile again, minutes every time.
    """
    scripts = sysconfig.get_path("scripts")
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"


def build(max_jobs: int | None = None) -> dict[str, float]:
    """Compile and load each op this machine can use; returns the seconds each took, by name.

    Args:
        max_jobs: compiler processes at once; by default the CPUs this process may use.

    Raises:
        RuntimeError: from the compiler, if one is missing or fails.
    """
    os.environ.setdefault("MAX_JOBS", str(max_jobs or len(os.sched_getaffinity(0))))
    use_own_ninja()
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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build()
