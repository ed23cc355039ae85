"""Hang dump: when a run hangs, every rank writes the stacks of its threads and its last collectives.

If another rank does not join a collective, the collective fails after its timeout; NCCL then aborts the process. The
stacks are written before that. The files are in `logs/` of the run folder:

    stacks-rank-R.txt     stacks of all threads; also on demand: kill -USR2 PID
    collectives-rank-R    PyTorch's flight recorder; compare ranks by `torchfrtrace logs --prefix collectives-rank-`
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from sfd_scale.runtime import environment

logger = logging.getLogger(__name__)
RECORDED_COLLECTIVES = 2000
HANG_AFTER = 0.9  # of the timeout: a step that lasts longer counts as hung


class HangDump:
    """A context manager that records hangs. Enter it before the process group starts, which reads the settings once.

    Args:
        folder: of the files.
        timeout_s: of a collective.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rank = environment.rank()
        self.path, self.after_s = folder / f"stacks-rank-{self.rank}.txt", HANG_AFTER * timeout_s
        self._file = self.path.open("a", encoding="utf-8")
        if not dist.is_initialized():
            environment.set_variables(
                {
                    "TORCH_FR_BUFFER_SIZE": str(RECORDED_COLLECTIVES),
                    "TORCH_FR_DUMP_ON_TIMEOUT": "1",
                    "TORCH_FR_DUMP_TEMP_FILE": str(folder.resolve() / "collectives-rank-"),
                }
            )

    def __enter__(self) -> HangDump:
        self._file.write(f"started {datetime.now(UTC).isoformat(timespec='seconds')}, process {os.getpid()}\n")
        self._file.flush()
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        self.alive()
        return self

    def alive(self) -> None:
        """A step begins. The stacks are written if the next call does not come in time."""
        faulthandler.dump_traceback_later(self.after_s, file=self._file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        # NCCL's watchdog dumps the flight recorder and ends the process. gloo raises an error and dumps nothing.
        if isinstance(error, RuntimeError) and dist.is_initialized() and dist.get_world_size() > 1:
            c10d._dump_fr_trace_file(self.rank, includeCollectives=True, includeStackTraces=True)
            logger.warning("rank %d: the last collectives and the stacks are in %s", self.rank, self.path.parent)
