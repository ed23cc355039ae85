"""Profiles a few training steps with torch.profiler: a trace, and a table of the slowest kernels."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sfd_scale.runtime import distributed

logger = logging.getLogger(__name__)
TABLE_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """steps: the first and last step to profile, counted from 0, such as 10..15; null profiles nothing."""

    steps: str | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            found = re.fullmatch(r"(\d+)\.\.(\d+)", self.steps)
            if found is None or int(found[1]) > int(found[2]):
                raise ValueError(f"steps: {self.steps!r}; allowed: FIRST..LAST, such as 10..15")

    @property
    def window(self) -> range:
        first, last = (0, -1) if self.steps is None else map(int, self.steps.split(".."))
        return range(first, last + 1)


class StepProfiler:
    """Profiles rank 0 and writes `trace-10-15.json.gz` and `kernels-10-15.txt` to `folder`.

    Open the trace in Perfetto (ui.perfetto.dev) or chrome://tracing.
    """

    def __init__(self, config: ProfileConfig, folder: Path, device: torch.device) -> None:
        self.window, self.folder, self.device = config.window, folder, device
        self._profile: profile | None = None
        self._first = self._last = 0

    def before_step(self, step: int) -> None:
        """Start at the first step of the window, stop after the last. After a resume, profile the rest."""
        if step not in self.window:
            self.close()
        elif self._profile is None and distributed.is_main():
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile, self._first = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True), step
            self._profile.start()
        if self._profile is not None:
            self._last = step

    def close(self) -> None:
        """Stop, and write the files if any step was profiled."""
        if self._profile is None:
            return
        self._profile.stop()
        name = f"{self._first}-{self._last}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / f"trace-{name}.json.gz"))
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=80)
        (self.folder / f"kernels-{name}.txt").write_text(f"{table}\n", encoding="utf-8")
        self._profile = None
        logger.info("profile of steps %s: %s", name, self.folder)
