"""Muon under any engine: momentum whose update is orthogonalised, matrix by matrix (K. Jordan, 2024; arXiv 2502.16982).

The matrices that a model names get Muon, all other parameters AdamW. The update is U = msign(momentum), the orthogonal
factor of its polar decomposition, approximated by a few polynomial iterations. An engine clips by the norm of the
gradient before, so that all engines clip alike.

DeepSpeed's own Muon is not used: under ZeRO it orthogonalises before it clips, it leaves fused matrices whole, and its
state is not in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sfd_scale.engines.engine import Fragment
from sfd_scale.engines.matrix_exchange import Matrix, MatrixExchange, Range
from sfd_scale.engines.optim import AdamWConfig, param_groups
from sfd_scale.models.layers import FusedMatrix
from sfd_scale.runtime import distributed
from sfd_scale.runtime.device import fast_bf16
from sfd_scale.runtime.settings import above, at_least

# Coefficients (a, b, c) of X ← aX + b(XXᵀ)X + c(XXᵀ)²X.
# Newton-Schulz with the quintic of K. Jordan's Muon: singular values end in about [0.7, 1.2].
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),)
# Polar Express (arXiv 2505.16932, algorithm 1 with its safety factor): the best quintic of each iteration for singular
# values in [0.001, 1]. The last row repeats.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the matrices of the blocks; AdamW for vectors, norms, embeddings and the first and last layers.

    lr: peak learning rate of the matrices. The schedule scales that of AdamW alike.
    weight_decay: decoupled, of the matrices.
    orthogonalization: newton_schulz, or polar_express, which converges faster at the same cost.
    scale: factor of the orthogonalised update of an (r, c) matrix. match_rms_adamw is 0.2·√max(r, c), which gives the
        update AdamW's usual RMS, so that AdamW's learning rates carry over (arXiv 2502.16982, section 2.2). original is
        √max(1, r/c) (K. Jordan).
    split: what is one matrix. matrices cuts fused layers into what they are: qkv into q, k and v, w12 into gate and up,
        adaLN into its six. heads cuts q, k and v further, by head. none orthogonalises fused layers whole.
    adamw: of all other parameters, with their own learning rate.
    """

    kind: Literal["muon"] = "muon"
    lr: float = 1e-4
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    orthogonalization: Literal["newton_schulz", "polar_express"] = "newton_schulz"
    iterations: int = 5
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    split: Literal["none", "matrices", "heads"] = "matrices"
    adamw: AdamWConfig = field(default_factory=AdamWConfig)

    def __post_init__(self) -> None:
        above(self, lr=0)
        at_least(self, weight_decay=0, iterations=1)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: {self.momentum}; allowed: in [0, 1)")

    @property
    def description(self) -> str:
        return (
            f"Muon, learning rate {self.lr:g}, momentum {self.momentum:g}; {self.adamw.description} for other weights"
        )


def refuse_offload(optimizer: AdamWConfig | MuonConfig, key: str, offloaded: bool) -> None:
    """Raises ValueError where an engine's setting `key` moves the state of Muon to the host."""
    if offloaded and isinstance(optimizer, MuonConfig):
        raise ValueError(f"engine.{key}: true; allowed with optimizer.kind adamw: Muon works on the GPU")


class HiddenMatrices(Protocol):
    """A model that says which of its parameters are matrices of hidden layers."""

    def hidden_matrices(self) -> dict[str, FusedMatrix]: ...


def matrices_of(model: nn.Module, config: MuonConfig) -> list[Matrix]:
    """The matrices that Muon orthogonalises, in the order of the model's parameters.

    Raises:
        ValueError: for a model that does not name its hidden matrices.
    """
    if not hasattr(model, "hidden_matrices"):
        raise ValueError(
            f"optimizer.kind: muon; {type(model).__name__} does not say which of its parameters are hidden matrices; "
            "allowed for this model: adamw"
        )
    fused = cast(HiddenMatrices, model).hidden_matrices()
    out = []
    for name, param in model.named_parameters():
        if name not in fused:
            continue
        rows, columns = param.shape
        parts = {"none": 1, "matrices": fused[name].matrices, "heads": fused[name].matrices * fused[name].heads}
        count = parts[config.split]
        assert rows % count == 0, name
        height = rows // count
        out += [Matrix(name, index * height * columns, height, columns) for index in range(count)]
    return out


def orthogonalize(x: Tensor, config: MuonConfig) -> Tensor:
    """The approximate orthogonal factor of each matrix, (B, r, c) → (B, r, c), in the dtype of `x`."""
    table = NEWTON_SCHULZ if config.orthogonalization == "newton_schulz" else POLAR_EXPRESS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller side is squared
    safety = 1.0 if table is NEWTON_SCHULZ else _SAFETY
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x / (norm * safety + 1e-7)).to(x.dtype)
    for index in range(config.iterations):
        a, b, c = table[min(index, len(table) - 1)]
        if table is POLAR_EXPRESS and index < len(table) - 1:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        squared = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def update_scale(config: MuonConfig, rows: int, columns: int) -> float:
    """The factor of an orthogonalised update; see MuonConfig.scale."""
    if config.scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def muon_groups(model: nn.Module, config: MuonConfig) -> list[dict[str, Any]]:
    """Parameter groups: the matrices first, then those of AdamW."""
    names = {matrix.name for matrix in matrices_of(model, config)}
    matrices = [param for name, param in model.named_parameters() if name in names]
    others = param_groups(model, config.adamw, lambda name: name not in names, config.adamw.lr / config.lr)
    return [{"params": matrices, "weight_decay": config.weight_decay, "lr_scale": 1.0, "orthogonalized": True}, *others]


@dataclass(frozen=True)
class LocatedFragment:
    """A fragment as a range of a tensor that the optimizer updates.

    step: number of the call of `Muon.step`, among the calls of one update, that updates the tensor. ZeRO makes a call
        for each flat tensor.
    """

    fragment: Fragment
    tensor: Tensor
    offset: int
    step: int

    def grad(self) -> Tensor:
        """The gradient of the fragment, (n,), a view where the engine's memory allows it."""
        whole = self.tensor.grad
        if whole is None:
            return torch.zeros_like(self.fragment.param)
        local = whole.to_local() if isinstance(whole, DTensor) else whole
        return local.detach().reshape(-1)[self.offset : self.offset + self.fragment.param.numel()]


class _Call:
    """What one call of `Muon.step` updates: this rank's fragments, and their way to the owners of the matrices."""

    def __init__(self, located: Sequence[LocatedFragment], matrices: Sequence[Matrix]) -> None:
        self.located = list(located)
        here = {name for names in distributed.all_gather_object([s.fragment.name for s in located]) for name in names}
        ranges = [Range(s.fragment.name, s.fragment.start, s.fragment.stop) for s in located]
        self.exchange = MatrixExchange([matrix for matrix in matrices if matrix.name in here], ranges)


class Muon(torch.optim.AdamW):
    """Muon over the shards of an engine, and torch's fused AdamW for the other parameter groups.

    After construction, `bind` tells it where the matrices lie. `exp_avg` is the momentum; matrices have no second
    moment, so that their optimizer state is 4 bytes a weight, with the master weights 8.
    """

    def __init__(self, model: nn.Module, config: MuonConfig) -> None:
        self.config, self.matrices = config, matrices_of(model, config)
        adamw = config.adamw
        super().__init__(muon_groups(model, config), lr=config.lr, betas=adamw.betas, eps=adamw.eps, fused=True)
        self._calls: dict[int, _Call] = {}
        self._call_of: dict[int, int] = {}

    def bind(self, tensors: Sequence[tuple[Tensor, int]], located: Sequence[LocatedFragment]) -> None:
        """All ranks call this once the engine has sharded the model.

        Args:
            tensors: the tensors that the optimizer updates, each with the number of the call that updates it.
            located: the fragments of this rank.
        """
        self._call_of = {id(tensor): number for tensor, number in tensors}
        names = {matrix.name for matrix in self.matrices}
        for number in sorted({number for _, number in tensors}):
            own = [s for s in located if s.step == number and s.fragment.name in names]
            self._calls[number] = _Call(own, self.matrices)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        every = self.param_groups
        matrices = [group for group in every if group.get("orthogonalized") and group["params"]]
        started = [(group, call, self._start(call)) for group in matrices for call in self._calls_of(group)]
        self.param_groups = [group for group in every if not group.get("orthogonalized")]
        try:
            super().step()  # while the first matrices are on their way
        finally:
            self.param_groups = every
        for group, call, updates in started:
            self._finish(group, call, updates)

    def _calls_of(self, group: dict[str, Any]) -> list[_Call]:
        return [self._calls[number] for number in sorted({self._call_of[id(tensor)] for tensor in group["params"]})]

    def _dtype(self, call: _Call) -> torch.dtype:
        device = call.located[0].fragment.param.device if call.located else distributed.device()
        return torch.bfloat16 if device.type == "cuda" and fast_bf16(device) else torch.float32

    def _start(self, call: _Call) -> list[Tensor]:
        """Update the momentum, and send the first matrices; returns what is to be orthogonalised."""
        grads, momenta = [s.grad() for s in call.located], [s.fragment.exp_avg for s in call.located]
        updates = momenta
        if call.located:
            torch._foreach_lerp_(momenta, grads, 1.0 - self.config.momentum)
            if self.config.nesterov:
                updates = list(torch._foreach_lerp(grads, momenta, self.config.momentum))
        call.exchange.start(updates, self._dtype(call))
        return updates

    def _finish(self, group: dict[str, Any], call: _Call, updates: list[Tensor]) -> None:
        params = [item.fragment.param for item in call.located]
        if group["weight_decay"] and params:
            torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        for pieces, results in call.exchange.run(updates, self._dtype(call), self._orthogonalized):
            if pieces:
                targets = [params[piece.of][piece.start : piece.stop] for piece in pieces]
                torch._foreach_add_(targets, [result.float() for result in results], alpha=-group["lr"])

    def _orthogonalized(self, matrices: list[Tensor]) -> list[Tensor]:
        """Matrices of one shape in one batch."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, matrix in enumerate(matrices):
            by_shape.setdefault(tuple(matrix.shape), []).append(index)
        out = list(matrices)
        for (rows, columns), indices in by_shape.items():
            scale = update_scale(self.config, rows, columns)
            batch = orthogonalize(torch.stack([matrices[index] for index in indices]), self.config) * scale
            for index, result in zip(indices, batch, strict=True):
                out[index] = result
        return out
