"""Whether a launcher started this process. It needs no torch, so that the command line starts without it."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, srun) started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ
