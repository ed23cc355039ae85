"""Compile DeepSpeed's C++ extensions ahead of time: `python -m sfd_scale.engines.build_ops`.

DeepSpeed compiles them on first use, which takes minutes. A time limit would stop the build, and the next process would
start it again; so `make` and CI build first. Extensions that are compiled already are only loaded.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence

from filelock import FileLock, Timeout

from sfd_scale.runtime import environment
from sfd_scale.runtime.caches import extensions_folder
from sfd_scale.runtime.limits import BUILD, limit_s

logger = logging.getLogger(__name__)

# Collectives on the CPU, and Adam for offloaded optimizer states.
OPS = ("ShareMemCommBuilder", "CPUAdamBuilder")
_TICK_S = 10.0  # between two lines of progress


def use_own_builds() -> None:
    """Let torch's extension builder use this environment's ninja and build folder.

    By default, all environments share one build folder in the home directory. Two environments with different include
    paths or ninjas would each find the other's build stale and compile again, minutes every time.

    Raises:
        ValueError: if TORCH_EXTENSIONS_DIR cannot be written.
    """
    scripts = sysconfig.get_path("scripts")
    path = environment.text("PATH") or os.defpath
    if path.split(os.pathsep)[0] != scripts:
        environment.set_variables({"PATH": f"{scripts}{os.pathsep}{path}"})
    environment.set_variables({"TORCH_EXTENSIONS_DIR": str(extensions_folder())})


@contextlib.contextmanager
def quiet_builders() -> Iterator[None]:
    """Without the notes of DeepSpeed and torch about extensions that are only loaded: they ask for no action."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def progress_of(names: Sequence[str]) -> Iterator[None]:
    """Log the seconds of a compilation, which takes minutes and prints nothing. Without names, nothing is compiled."""
    if not names:
        yield
        return
    name = ", ".join(names)
    done, started = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(_TICK_S):
            logger.info("%s: compiling, %.0f s; it takes one to three minutes", name, time.monotonic() - started)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wait_for_builds() -> None:
    """Wait until no other process compiles an extension, which torch would wait for without a limit.

    Raises:
        TimeoutError: after SFD_BUILD_TIMEOUT.
    """
    for lock in sorted(extensions_folder().glob("*/lock")):
        try:
            with FileLock(lock, timeout=limit_s(BUILD)):
                pass
        except Timeout:
            raise TimeoutError(
                f"{lock.parent}: another process has been compiling it for {limit_s(BUILD)} s; end that process, or "
                f"raise {BUILD}"
            ) from None


def build(max_jobs: int | None = None) -> dict[str, float]:
    """Compile and load each extension that this machine can use; returns seconds by name.

    Args:
        max_jobs: parallel compiler processes; by default one per CPU of this process.

    Raises:
        RuntimeError: if there is no compiler, or it fails.
    """
    environment.set_default("MAX_JOBS", str(max_jobs or len(os.sched_getaffinity(0))))
    use_own_builds()
    wait_for_builds()
    from deepspeed.accelerator import get_accelerator  # reads MAX_JOBS

    seconds = {}
    for name in OPS:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible(verbose=False):
            logger.info("%s: not used on this machine", name)
            continue
        started = time.monotonic()
        with progress_of([builder.NAME]), quiet_builders():
            builder.load(verbose=False)
        seconds[builder.NAME] = time.monotonic() - started
        logger.info("%s: ready after %.0f s", builder.NAME, seconds[builder.NAME])
    return seconds


def missing() -> list[str]:
    """Names of the extensions that the first run on this machine would have to compile."""
    use_own_builds()
    from deepspeed.accelerator import get_accelerator

    names = []
    for name in OPS:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible(verbose=False):
            continue
        if not list(extensions_folder().rglob(f"{builder.NAME}.so")):
            names.append(builder.NAME)
    return names


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build()
