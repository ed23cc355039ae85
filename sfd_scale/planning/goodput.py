"""Time lost to checkpoints and failures."""

from __future__ import annotations

from dataclasses import dataclass

from sfd_scale.planning.efficiency import Quantity

# 419 unexpected interruptions in 54 days of 16,384 H100.
GPU_MTBF_HOURS = Quantity(50_700, "h", "measured elsewhere", "Llama 3 (arXiv 2407.21783, section 3.3.4)")


@dataclass(frozen=True)
class Goodput:
    """Shares of the wall-clock time.

    useful: of steps that no failure undid. saving: of steps that wait for a checkpoint. lost: of failures.
    hours_between_failures: of the whole run.
    """

    useful: float
    saving: float
    lost: float
    hours_between_failures: float


def goodput(
    *, ranks: int, save_every_s: float, save_s: float, restart_s: float, gpu_mtbf_hours: float = GPU_MTBF_HOURS.value
) -> Goodput:
    """Goodput of a run that saves every `save_every_s` seconds of training and waits `save_s` for each save.

    A failure loses half an interval on average, and the restart (Young 1974; Daly 2006).
    """
    saving = save_s / (save_every_s + save_s)
    failures_per_s = ranks / (gpu_mtbf_hours * 3600)
    lost_per_s = failures_per_s * ((save_every_s + save_s) / 2 + restart_s)
    lost = lost_per_s / (1 + lost_per_s)
    return Goodput((1 - saving) * (1 - lost), saving * (1 - lost), lost, gpu_mtbf_hours / ranks)
