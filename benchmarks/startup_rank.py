"""One rank of the start-up benchmark: an unchanged `sfd train`, with a time stamp at the end of each part of its start.

`launchers/deepspeed.sh --module benchmarks.startup_rank train RECIPE ...` runs it; rank 0 writes the file SFD_STAMPS.
"""

from __future__ import annotations

import time

_stamps = {"rank": time.time()}  # before any slow import

# ruff: noqa: E402
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _stamp_after(owner: Any, name: str, stamp: str) -> None:
    """Stamp the time at which the first call of a function returns."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def stamped(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        _stamps.setdefault(stamp, time.time())
        return out

    setattr(owner, name, stamped)


def main() -> None:
    from sfd_scale import __main__, build, train
    from sfd_scale.runtime import distributed, environment
    from sfd_scale.tasks.diffusion import DiffusionTask
    from sfd_scale.training.trainer import Trainer

    _stamps["imports"] = time.time()
    _stamp_after(distributed, "init", "group")
    _stamp_after(DiffusionTask, "make_loader", "data")
    _stamp_after(build, "make_engine", "engine")
    _stamp_after(train, "MetricsWriter", "metrics")
    _stamp_after(Trainer, "train_step", "step")
    try:
        __main__.main()
    finally:
        if environment.rank() == 0:
            Path(environment.snapshot()["SFD_STAMPS"]).write_text(json.dumps(_stamps), encoding="utf-8")


if __name__ == "__main__":
    main()
