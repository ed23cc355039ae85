"""Guidance as a function of velocities: models in, one velocity function out.

Both kinds extrapolate from a worse velocity through the better one, with a scale for each part of the latent, and
only from `interval_start` of a part's own clock on, if the part obeys the interval.

N batch · C channels · H, W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import Clocks, SemanticFirstSchedule
from sfd_scale.runtime.settings import at_least

Velocity = Callable[[Tensor, Clocks, Tensor], Tensor]
"""(x (N, C, H, W), clocks (N,), labels (N,)) → dx/dt (N, C, H, W)."""

IntervalMode = Literal["none", "both", "texture", "semantic"]


class FlowModel(Protocol):
    """What guidance asks of a model; LightningDiT is one."""

    def __call__(
        self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor, /
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, kw_only=True)
class NoGuidance:
    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """`interval_mode` says which parts take the conditional velocity until their own clock is at `interval_start`."""

    scale_texture: float = 1.5
    scale_semantic: float = 1.5
    interval_start: float = 0.0
    interval_mode: IntervalMode = "none"

    def __post_init__(self) -> None:
        at_least(self, scale_texture=0, scale_semantic=0)
        if self.scale_texture == 1 and self.scale_semantic == 1:
            raise ValueError(
                "scale_texture: 1.0, as is scale_semantic, which guides nothing; allowed: another value, or kind: none"
            )
        if not 0 <= self.interval_start < 1:
            raise ValueError(f"interval_start: {self.interval_start}; allowed: from 0 to below 1")
        if self.interval_start > 0 and self.interval_mode == "none":
            raise ValueError(
                f"interval_start: {self.interval_start} has no effect with interval_mode none; allowed: 0, or "
                "interval_mode both, texture or semantic"
            )


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance(_Scales):
    """The worse velocity is that of the null label (arXiv 2207.12598)."""

    kind: Literal["cfg"] = "cfg"


@dataclass(frozen=True, kw_only=True)
class AutoGuidance(_Scales):
    """The worse velocity is that of a smaller, less trained model, at the same label (arXiv 2406.02507)."""

    kind: Literal["autoguidance"] = "autoguidance"


GuidanceConfig = NoGuidance | ClassifierFreeGuidance | AutoGuidance


def guided(
    model: FlowModel,
    config: GuidanceConfig,
    layout: LatentLayout,
    *,
    guide: FlowModel | None = None,
    null_label: int | None = None,
) -> Velocity:
    """The velocity function of `model` under `config` (arXiv 2512.04926).

    The second evaluation is made only for the samples whose velocity it changes.

    Args:
        guide: the worse model; AutoGuidance needs one, nothing else takes one.
        null_label: the label that means no class (num_classes); CFG needs it.

    Raises:
        ValueError: for a guide that is missing or would be ignored, or a missing null label.
    """
    if isinstance(config, AutoGuidance) != (guide is not None):
        raise ValueError(
            "guidance: kind autoguidance needs a guide model"
            if guide is None
            else f"guidance: kind {config.kind} ignores the guide model that was given; set kind: autoguidance"
        )
    match config:
        case NoGuidance():
            return lambda x, t, y: _evaluate(model, x, t, y)
        case ClassifierFreeGuidance():
            if null_label is None:
                raise ValueError("guidance: kind cfg needs the null label (num_classes) of a model with label dropout")
            return _classifier_free(model, config, layout, null_label)
        case AutoGuidance():
            assert guide is not None
            return _autoguidance(model, config, layout, guide)


def interval_discontinuities(config: GuidanceConfig, schedule: SemanticFirstSchedule) -> tuple[float, ...]:
    """Global times at which guidance sets in, so that the velocity field jumps (arXiv 2404.07724)."""
    if isinstance(config, NoGuidance) or config.interval_start == 0:
        return ()
    semantic, texture = schedule.inverse_clock(config.interval_start)
    return tuple(
        time for part, time in (("semantic", semantic), ("texture", texture)) if config.interval_mode in (part, "both")
    )


def guides(config: GuidanceConfig, t: Clocks) -> bool:
    """Whether guidance changes the velocity at any of the times (N,)."""
    if isinstance(config, NoGuidance):
        return False
    rows = _acting(config, t)[1]
    return rows is None or len(rows) > 0


def _evaluate(model: FlowModel, x: Tensor, t: Clocks, y: Tensor) -> Tensor:
    """The model's velocity in the dtype of x: extrapolation multiplies the rounding of a 16-bit one."""
    return model(x, t.texture, t.semantic, y)[0].to(x.dtype)


def _classifier_free(
    model: FlowModel, config: ClassifierFreeGuidance, layout: LatentLayout, null_label: int
) -> Velocity:
    def velocity(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        acts, rows = _acting(config, t)
        # One batch: the conditional velocity of every sample, then the null-label one of those where it matters.
        both, times, null = (_and_rows(part, rows) for part in (x, torch.stack([t.texture, t.semantic], 1), y))
        null[len(x) :] = null_label
        v = _evaluate(model, both, Clocks(times[:, 0], times[:, 1]), null)
        return _combine(v[: len(x)], v[len(x) :], rows, acts, config, layout)

    return velocity


def _autoguidance(model: FlowModel, config: AutoGuidance, layout: LatentLayout, guide: FlowModel) -> Velocity:
    def velocity(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        acts, rows = _acting(config, t)
        good = _evaluate(model, x, t, y)
        if rows is None:
            bad = _evaluate(guide, x, t, y)
        elif len(rows) == 0:
            return good
        else:
            bad = _evaluate(guide, x[rows], Clocks(t.texture[rows], t.semantic[rows]), y[rows])
        return _combine(good, bad, rows, acts, config, layout)

    return velocity


def _and_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """All values, and those of some samples once more."""
    return torch.cat([values, values if rows is None else values[rows]])


def _acting(config: _Scales, t: Clocks) -> tuple[Clocks, Tensor | None]:
    """Where guidance changes each part's velocity ((N,) bool each), and the samples it changes at all (int64).

    None stands for all samples, where no interval has a say: to look at the times, the host would wait for the device.
    """
    bounded = {part: config.interval_mode in (part, "both") for part in ("texture", "semantic")}

    def acts(part: str, time: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return torch.zeros_like(time, dtype=torch.bool)
        return time >= config.interval_start if bounded[part] else torch.ones_like(time, dtype=torch.bool)

    both = Clocks(acts("texture", t.texture, config.scale_texture), acts("semantic", t.semantic, config.scale_semantic))
    scales = (("texture", config.scale_texture), ("semantic", config.scale_semantic))
    if any(scale != 1 and not bounded[part] for part, scale in scales):
        return both, None
    return both, (both.texture | both.semantic).nonzero().flatten()


def _combine(
    good: Tensor, bad: Tensor, rows: Tensor | None, acts: Clocks, config: _Scales, layout: LatentLayout
) -> Tensor:
    """bad + w·(good − bad) on the parts and samples where guidance acts, else good (arXiv 2207.12598, Eq. 6)."""
    if rows is not None and len(rows) == 0:
        return good
    near, texture, semantic = (part if rows is None else part[rows] for part in (good, acts.texture, acts.semantic))
    scale = layout.per_channel(config.scale_texture, config.scale_semantic, like=near)
    where = layout.per_channel(texture, semantic, like=near).bool()
    mixed = torch.where(where, bad + scale * (near - bad), near)
    return mixed if rows is None else good.index_copy(0, rows, mixed)
