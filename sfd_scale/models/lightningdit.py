"""LightningDiT (arXiv 2501.01423) with a clock for each part of the latent (arXiv 2512.04926).

N batch · C channels · H, W latent grid · P patch side · T tokens (H/P · W/P) · D width · F feature channels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfd_scale import seeding
from sfd_scale.models.alignment import AlignmentConfig, alignment_head
from sfd_scale.models.attention import AttentionBackend
from sfd_scale.models.layers import (
    FREQUENCIES,
    Attention,
    FinalLayer,
    LabelEmbedder,
    MlpKind,
    NormKind,
    PatchEmbedder,
    TimeEmbedder,
    make_mlp,
    mlp_hidden,
    modulate,
    token_norm,
)
from sfd_scale.models.rope import FixedBuffers, RotaryEmbedding, Rotation, sincos_table


class Dimensions(NamedTuple):
    depth: int
    width: int
    heads: int


SizeName = Literal["S", "B", "L", "XL", "XXL", "1p6B"]
SIZES: dict[str, Dimensions] = {
    "S": Dimensions(12, 384, 6),
    "B": Dimensions(12, 768, 12),
    "L": Dimensions(24, 1024, 16),
    "XL": Dimensions(28, 1152, 16),
    "XXL": Dimensions(24, 1536, 24),
    "1p6B": Dimensions(28, 1792, 28),
}


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig:
    """A named `size`, or none and depth, width and heads instead.

    two_clocks: texture and semantics have a time each; otherwise one time embedder takes the texture's.
    alignment: the REPA head, or none. norm, mlp, rotary, qk_norm, modulation and learn_sigma are the forms that the
        authors' code knows; their published weights have the values set here.
    """

    kind: Literal["lightningdit"] = "lightningdit"
    size: SizeName | None = "XL"
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch_size: int = 1
    in_channels: int = 48
    input_size: int = 16
    num_classes: int = 1000
    two_clocks: bool = True
    alignment: AlignmentConfig | None = AlignmentConfig()
    norm: NormKind = "rms"
    mlp: MlpKind = "swiglu"
    rotary: bool = True
    qk_norm: bool = True
    modulation: Literal["shift_scale", "scale"] = "shift_scale"
    learn_sigma: bool = False
    attention: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        explicit = (self.depth, self.width, self.heads)
        if self.size is not None and explicit != (None, None, None):
            raise ValueError(f"size: {self.size}, beside depth, width or heads; allowed: one of both (size: null)")
        if self.size is None and None in explicit:
            raise ValueError(f"size: null; allowed: {', '.join(SIZES)}, or depth, width and heads together")
        for name in ("depth", "width", "heads", "patch_size", "in_channels", "input_size", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; allowed: 1 and up")
        depth, width, heads = self.dimensions
        # Four channels of a head form the pairs of one frequency by row and by column.
        step = heads * (4 if self.rotary else 1)
        if width % step or width % 4:
            raise ValueError(f"width: {width}; allowed: a multiple of 4 and of {step} with {heads} heads")
        if self.input_size % self.patch_size:
            raise ValueError(f"patch_size: {self.patch_size}; allowed: divisors of input_size {self.input_size}")
        if self.alignment is not None and self.alignment.depth > depth:
            raise ValueError(f"alignment.depth: {self.alignment.depth}; allowed: 1 to {depth}, the depth of the model")

    @property
    def dimensions(self) -> Dimensions:
        if self.size is not None:
            return SIZES[self.size]
        assert self.depth is not None and self.width is not None and self.heads is not None
        return Dimensions(self.depth, self.width, self.heads)

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels that the last layer makes; learn_sigma's second half is not used."""
        return self.in_channels * (2 if self.learn_sigma else 1)


class Block(nn.Module):
    """Attention and MLP, each normed before, modulated and gated by the condition (adaLN-zero)."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        _, width, heads = config.dimensions
        self.shifted = config.modulation == "shift_scale"
        self.norm1 = token_norm(config.norm, width)
        self.norm2 = token_norm(config.norm, width)
        self.attn = Attention(width, heads, config.norm if config.qk_norm else None, config.attention)
        self.mlp = make_mlp(config.mlp, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if self.shifted else 4) * width))

    def forward(self, x: Tensor, c: Tensor, rotation: Rotation | None) -> Tensor:
        """x (N, T, D), c (N, D) → (N, T, D)."""
        shift1: Tensor | None = None
        shift2: Tensor | None = None
        if self.shifted:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        else:
            scale1, gate1, scale2, gate2 = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rotation)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class LightningDiT(FixedBuffers):
    """Velocity of the composite latent. `blocks` is what engines wrap, compile and checkpoint one by one."""

    pos_embed: Tensor

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        self.config = config
        depth, width, heads = config.dimensions
        self.register_buffer("pos_embed", sincos_table(config.grid, width))
        self.x_embedder = PatchEmbedder(config.in_channels, config.patch_size, width)
        if config.two_clocks:
            self.t_embedder_sem = TimeEmbedder(width // 2)
            self.t_embedder_tex = TimeEmbedder(width // 2)
        else:
            self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.feat_rope = RotaryEmbedding(config.grid, width // heads) if config.rotary else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(depth)])
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.out_channels, config.norm)
        self.repa_projector = None if config.alignment is None else alignment_head(width, config.alignment)

    def forward(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The velocity at x, and tokens projected to the vision encoder's features if there is an alignment head.

        Args:
            x: (N, C, H, W); cast to the dtype of the weights.
            t_texture, t_semantic: (N,) in [0, 1], 0 is noise; float32, since bfloat16 has only 256 times.
            y: (N,) int64; num_classes is the null class.

        Returns:
            velocity (N, C, H, W) float32, and (N, T, F) float32 or None.
        """
        dtype = self.x_embedder.proj.weight.dtype
        tokens = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)  # (N, T, D)
        condition = self._time(t_texture, t_semantic, dtype) + self.y_embedder(y)
        rotation = None if self.feat_rope is None else self.feat_rope()
        aligned = None if self.config.alignment is None else self.config.alignment.depth
        projected: Tensor | None = None
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, condition, rotation)
            if number == aligned and self.repa_projector is not None:
                projected = self.repa_projector(tokens).float()
        out = self._to_grid(self.final_layer(tokens, condition))
        return out[:, : self.config.in_channels].float(), projected

    def _time(self, t_texture: Tensor, t_semantic: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.config.two_clocks:
            return self.t_embedder(t_texture, dtype)
        return torch.cat([self.t_embedder_sem(t_semantic, dtype), self.t_embedder_tex(t_texture, dtype)], dim=1)

    def _to_grid(self, tokens: Tensor) -> Tensor:
        """(N, T, P·P·C) → (N, C, H, W)."""
        patch, grid = self.config.patch_size, self.config.grid
        pixels = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))  # (N, G, G, P, P, C)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer; each parameter from its own generator, so that no order matters."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed))
        self.pos_embed.copy_(sincos_table(self.config.grid, self.config.dimensions.width))
        if self.feat_rope is not None:
            self.feat_rope.reset()


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The start value of one parameter in its full shape, float32 on the CPU (arXiv 2212.09748, Sec. 3.2).

    adaLN and the output start at zero, so that each block starts as the identity; label and time embedders are
    N(0, 0.02); other matrices are Xavier-uniform.
    """
    value = torch.zeros(shape)
    if "norm" in name and name.endswith("weight"):
        return value.fill_(1)
    if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
        return value
    draws = seeding.generator(seed, f"init:{name}")
    if name.startswith(("t_embedder", "y_embedder")):
        return value.normal_(0, 0.02, generator=draws)
    bound = (6 / (shape[0] + shape[1:].numel())) ** 0.5
    return value.uniform_(-bound, bound, generator=draws)


# ------------------------------------------------------------------------------------------------- counts


def parameter_count(config: LightningDiTConfig) -> int:
    """Numbers in the weights, with the fixed positional embedding, as the authors count them."""
    with torch.device("meta"):
        model = LightningDiT(config)
    return sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()


def flops_per_sample(config: LightningDiTConfig, training: bool) -> int:
    """Floating point operations of the matrix products for one sample, for model FLOPs utilisation.

    A product of an (a, b) by a (b, c) matrix counts 2abc; the backward pass counts twice the forward pass, and what
    activation checkpointing repeats is not counted (arXiv 2204.02311, App. B).
    """
    depth, width, _ = config.dimensions
    tokens = config.grid**2
    patch = config.patch_size**2
    hidden = mlp_hidden(config.mlp, width)
    mlp = (3 if config.mlp == "swiglu" else 2) * width * hidden
    block = tokens * (4 * width**2 + mlp) + 2 * tokens**2 * width
    block += (6 if config.modulation == "shift_scale" else 4) * width**2
    ends = tokens * width * patch * (config.in_channels + config.out_channels) + 2 * width**2
    clock = width // 2 if config.two_clocks else width
    ends += (width // clock) * (FREQUENCIES * clock + clock**2)
    if config.alignment is not None:
        hidden, dim = config.alignment.hidden, config.alignment.dim
        ends += tokens * (width * hidden + hidden**2 + hidden * dim)
    return 2 * (depth * block + ends) * (3 if training else 1)


def without_alignment(config: LightningDiTConfig) -> LightningDiTConfig:
    """The same model for sampling, which has no use for the alignment head."""
    return dataclasses.replace(config, alignment=None)
