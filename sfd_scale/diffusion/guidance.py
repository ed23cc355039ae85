"""Classifier-free guidance, AutoGuidance and Internal Guidance: `guided` turns models into one velocity function.

All extrapolate from a worse velocity through a better one, with one scale for texture and one for semantics. With an
interval (arXiv 2404.07724), a part is guided only within a range of its own clock.

N batch · C channels · H, W latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfd_scale.diffusion.conditioning import Conditioning
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import Clocks, SemanticFirstSchedule
from sfd_scale.runtime.settings import at_least

Velocity = Callable[[Tensor, Clocks, Tensor], Tensor]
"""(x (N, C, H, W), clocks (N,), labels (N,)) → dx/dt (N, C, H, W)."""

IntervalMode = Literal["none", "both", "texture", "semantic"]


FlowOutput = tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]
"""Velocity (N, C, H, W), alignment projection, and the internal velocity (N, C, H, W) of models that have one."""


class FlowModel(Protocol):
    """A model that predicts the velocity, such as LightningDiT. Guidance does not use the alignment projection."""

    def __call__(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor, /) -> FlowOutput: ...


@dataclass(frozen=True, kw_only=True)
class NoGuidance:
    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """`interval_mode` names the parts that are guided only from `interval_start` of their own clock on."""

    scale_texture: float = 1.5
    scale_semantic: float = 1.5
    interval_start: float = 0.0
    interval_mode: IntervalMode = "none"

    def __post_init__(self) -> None:
        at_least(self, scale_texture=0, scale_semantic=0)
        if self.scale_texture == 1 and self.scale_semantic == 1:
            raise ValueError(
                "scale_texture: 1.0, and scale_semantic too: no guidance; allowed: another value, or guidance kind none"
            )
        if not 0 <= self.interval_start < 1:
            raise ValueError(f"interval_start: {self.interval_start}; allowed: from 0 to below 1")
        if self.interval_start > 0 and self.interval_mode == "none":
            raise ValueError(
                f"interval_start: {self.interval_start} has no effect with interval_mode none; allowed: 0, or "
                "interval_mode both, texture or semantic"
            )

    @property
    def interval(self) -> tuple[float, float]:
        """The times of a part's own clock between which guidance acts on it."""
        return self.interval_start, math.inf


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance(_Scales):
    """CFG: the worse velocity is the model's own at the null label (arXiv 2207.12598)."""

    kind: Literal["cfg"] = "cfg"


@dataclass(frozen=True, kw_only=True)
class AutoGuidance(_Scales):
    """The worse velocity is a guidance model's, smaller and less trained, at the same label (arXiv 2406.02507)."""

    kind: Literal["autoguidance"] = "autoguidance"


@dataclass(frozen=True, kw_only=True)
class InternalGuidance(_Scales):
    """The worse velocity is the model's own, read at a shallower depth: Internal Guidance (arXiv 2512.24176).

    It costs no evaluation, and no second model. The model needs `internal_depth`. RAEv2 (arXiv 2605.18324) has the same
    idea with the alignment head of its latents. `interval_end` ends the guidance of the parts that `interval_mode`
    names: the paper guides at high and middle noise.
    """

    kind: Literal["internal"] = "internal"
    interval_end: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.interval_start < self.interval_end <= 1:
            raise ValueError(f"interval_end: {self.interval_end}; allowed: above interval_start, up to 1")
        if self.interval_end < 1 and self.interval_mode == "none":
            raise ValueError(
                f"interval_end: {self.interval_end} has no effect with interval_mode none; allowed: 1, or "
                "interval_mode both, texture or semantic"
            )

    @property
    def interval(self) -> tuple[float, float]:
        return self.interval_start, math.inf if self.interval_end == 1 else self.interval_end


GuidanceConfig = NoGuidance | ClassifierFreeGuidance | AutoGuidance | InternalGuidance


def guided(
    model: FlowModel,
    config: GuidanceConfig,
    layout: LatentLayout,
    *,
    guide: FlowModel | None = None,
    conditioning: Conditioning | None = None,
    internal: bool = False,
) -> Velocity:
    """The guided velocity function of `model` (arXiv 2512.04926).

    The worse velocity is evaluated only for samples whose velocity it changes.

    Args:
        guide: the guidance model; only for AutoGuidance, which needs it.
        conditioning: of a model trained with dropped conditions; CFG needs it.
        internal: whether the model gives an internal velocity; Internal Guidance needs it.

    Raises:
        ValueError: if the guidance model or the null label is missing, or the guidance model would be ignored.
    """
    if isinstance(config, AutoGuidance) != (guide is not None):
        raise ValueError(
            "guidance: kind autoguidance needs a guidance model; set guide to its checkpoint"
            if guide is None
            else f"guidance: kind {config.kind} ignores the guidance model; allowed with guide: kind autoguidance"
        )
    match config:
        case NoGuidance():
            return lambda x, t, y: _evaluate(model, x, t, y)
        case ClassifierFreeGuidance():
            if conditioning is None:
                raise ValueError("guidance: kind cfg needs the null condition of a model trained with label dropout")
            return _classifier_free(model, config, layout, conditioning)
        case AutoGuidance():
            assert guide is not None
            return _autoguidance(model, config, layout, guide)
        case InternalGuidance():
            if not internal:
                raise ValueError(
                    "guidance: kind internal needs a model with an internal layer; allowed: a model trained with "
                    "model.internal_depth, or another kind"
                )
            return _internal(model, config, layout)


def interval_discontinuities(config: GuidanceConfig, schedule: SemanticFirstSchedule) -> tuple[float, ...]:
    """Global times at which guidance starts or ends: the velocity is discontinuous there (arXiv 2404.07724)."""
    if isinstance(config, NoGuidance):
        return ()
    return tuple(
        time
        for end in config.interval
        if 0 < end < math.inf
        for part, time in zip(("semantic", "texture"), schedule.inverse_clock(end), strict=True)
        if config.interval_mode in (part, "both")
    )


def guides(config: GuidanceConfig, t: Clocks) -> bool:
    """Whether guidance changes the velocity at any of the times, (N,) per clock."""
    if isinstance(config, NoGuidance):
        return False
    rows = _acting(config, t)[1]
    return rows is None or len(rows) > 0


def _evaluate(model: FlowModel, x: Tensor, t: Clocks, y: Tensor) -> Tensor:
    """The model's velocity in the dtype of x: extrapolating in bf16 would amplify its rounding."""
    return model(x, t.texture, t.semantic, y)[0].to(x.dtype)


def _classifier_free(
    model: FlowModel, config: ClassifierFreeGuidance, layout: LatentLayout, conditioning: Conditioning
) -> Velocity:
    def velocity(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        acts, rows = _acting(config, t)
        # One batch: the conditional velocity of every sample, then the null-label velocity of the guided samples.
        both, times, null = (_and_rows(part, rows) for part in (x, torch.stack([t.texture, t.semantic], 1), y))
        null[len(x) :] = conditioning.null_like(null[len(x) :])
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


def _internal(model: FlowModel, config: InternalGuidance, layout: LatentLayout) -> Velocity:
    def velocity(x: Tensor, t: Clocks, y: Tensor) -> Tensor:
        acts, rows = _acting(config, t)
        output = model(x, t.texture, t.semantic, y)
        assert len(output) == 3
        good, bad = output[0].to(x.dtype), output[2].to(x.dtype)
        return _combine(good, bad if rows is None else bad[rows], rows, acts, config, layout)

    return velocity


def _and_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """All values, followed by the values of `rows` again (of all samples if None)."""
    return torch.cat([values, values if rows is None else values[rows]])


def _acting(config: _Scales, t: Clocks) -> tuple[Clocks, Tensor | None]:
    """Masks of where guidance changes each part's velocity, (N,) bool, and the indices of the guided samples, int64.

    The indices are None if a part without an interval is guided: all samples are, and the host need not wait for the
    device to read the times.
    """
    bounded = {part: config.interval_mode in (part, "both") for part in ("texture", "semantic")}

    def acts(part: str, time: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return torch.zeros_like(time, dtype=torch.bool)
        start, end = config.interval
        return (time >= start) & (time < end) if bounded[part] else torch.ones_like(time, dtype=torch.bool)

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
