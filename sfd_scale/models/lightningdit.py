"""LightningDiT (arXiv 2501.01423) with the two timestep embedders of SFD (arXiv 2512.04926).

State-dict keys are those of the official code. The model knows no ranks, devices or guidance. Engines wrap, checkpoint
and compile `model.blocks`.

N batch · C channels · H, W latent grid · T tokens · D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfd_scale.diffusion.conditioning import ClassLabels, Conditioning
from sfd_scale.diffusion.guidance import FlowOutput
from sfd_scale.models import fused_backward
from sfd_scale.models.alignment import AlignmentConfig, alignment_head
from sfd_scale.models.attention import Attention
from sfd_scale.models.layers import (
    FusedMatrix,
    GeluMlp,
    LayerNorm,
    MlpKind,
    PatchEmbed,
    RMSNorm,
    RMSNormBySample,
    SwiGLU,
    TimestepEmbedder,
    condition_embedder,
    mlp_hidden,
    modulate,
    per_token,
    sincos_position,
    unpatchify,
)
from sfd_scale.models.rope import FixedBuffers, RotaryEmbedding2D
from sfd_scale.runtime import seeding

MAX_DEPTH = 10_000  # a recipe may come from outside, in an export


class Size(NamedTuple):
    depth: int
    width: int
    heads: int


SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "XXL": Size(24, 1536, 24),  # 1p0B in the official code
    "1p6B": Size(28, 1792, 28),
}


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig:
    """A named `size`, or depth, width and heads. Channels, grid and clocks come with the recipe's latents.

    internal_depth: a second output layer reads a velocity from the tokens after this many blocks, for Internal Guidance
        (arXiv 2512.24176); null: none.
    """

    kind: Literal["lightningdit"] = "lightningdit"
    size: Literal["S", "B", "L", "XL", "XXL", "1p6B"] | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch_size: int = 1
    num_classes: int = 1000
    alignment: AlignmentConfig | None = None
    # The defaults are the published architecture. Other values give variants of the official code, and DiT's blocks.
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    mlp: MlpKind = "swiglu"
    mlp_ratio: float = 4.0
    rope: bool = True
    qk_norm: bool = True
    shift: bool = True  # adaLN shifts beside its scales and gates
    learn_sigma: bool = False  # twice the output channels; the second half is not used
    internal_depth: int | None = None

    def __post_init__(self) -> None:
        explicit = (self.depth, self.width, self.heads)
        if (None in explicit) if self.size is None else explicit != (None, None, None):
            raise ValueError(f"size: {self.size} with depth, width, heads {explicit}; allowed: a size, or all three")
        depth, width, heads = self.dimensions
        counts = {"depth": depth, "width": width, "heads": heads}
        counts |= {"patch_size": self.patch_size, "num_classes": self.num_classes}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: {count}; allowed: 1 and up")
        if depth > MAX_DEPTH:
            raise ValueError(f"depth: {depth}; allowed: 1 to {MAX_DEPTH:,}")
        # Sines and cosines of two axes for positions, and for rotary ones in each head.
        if width % heads or width % 4 or (self.rope and (width // heads) % 4):
            allowed = "a multiple of 4 times the heads" if self.rope else "a multiple of 4 and of the heads"
            raise ValueError(f"width: {width} with {heads} heads; allowed: {allowed}")
        if not 0 < self.mlp_ratio < math.inf or self.mlp_hidden < 1:
            raise ValueError(f"mlp_ratio: {self.mlp_ratio}; allowed: above 0, for one hidden feature and up")
        if self.alignment is not None and not 1 <= self.alignment.depth <= depth:
            raise ValueError(f"alignment.depth: {self.alignment.depth}; allowed: 1 to the model's depth {depth}")
        if self.internal_depth is not None and not 1 <= self.internal_depth < depth:
            raise ValueError(f"internal_depth: {self.internal_depth}; allowed: 1 to below the model's depth {depth}")

    @property
    def dimensions(self) -> Size:
        if self.size is not None:
            return SIZES[self.size]
        assert self.depth is not None
        assert self.width is not None
        assert self.heads is not None
        return Size(self.depth, self.width, self.heads)

    @property
    def conditioning(self) -> Conditioning:
        return ClassLabels(self.num_classes)

    @property
    def description(self) -> str:
        depth, width, heads = self.dimensions
        name = f" {self.size}/{self.patch_size}" if self.size else ""
        return f"{self.kind}{name}, depth {depth}, width {width}, {heads} heads"

    @property
    def mlp_hidden(self) -> int:
        return mlp_hidden(self.mlp, self.dimensions.width, self.mlp_ratio)


class Block(nn.Module):
    """Attention and MLP, each normed, modulated by the condition and gated (adaLN-zero, arXiv 2212.09748).

    The residual stream is float32 in any precision, as under autocast in the official training. Matmuls are in the
    dtype of the weights. The condition has this dtype.
    """

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        _, width, heads = config.dimensions
        # The compiler sums the gradient of norm1's weight together with the rows of its backward. Of norm2 it does not.
        self.norm1 = _norm(config, width)
        self.norm2 = RMSNormBySample(width) if config.norm == "rmsnorm" else _norm(config, width)
        self.attn = Attention(width, heads, qk_norm=config.norm if config.qk_norm else "none")
        self.mlp = (SwiGLU if config.mlp == "swiglu" else GeluMlp)(width, config.mlp_hidden)
        self.shift = config.shift
        count = 6 if config.shift else 4
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))
        self.fused_weights = {"adaLN_modulation.1.weight": FusedMatrix(count)}

    def forward(self, x: Tensor, c: Tensor, rope: RotaryEmbedding2D | None) -> Tensor:
        """Tokens (N, T, D), condition of the samples (N, D) or of each token (N, T, D) → tokens."""
        modulation = per_token(self.adaLN_modulation(c))
        if rope is not None and self._fuses_backward(x, c):
            return self._with_fused_backward(x, modulation, c.dtype, rope)
        shift_attn: Tensor | None = None
        shift_mlp: Tensor | None = None
        if self.shift:
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        else:
            scale_attn, gate_attn, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn).to(c.dtype), rope)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp).to(c.dtype))

    def _fuses_backward(self, x: Tensor, c: Tensor) -> bool:
        fits = self.shift and isinstance(self.norm1, RMSNorm) and self.attn.fits_fused_backward
        return fits and fused_backward.applies(x, c, self.attn.num_heads)

    def _with_fused_backward(
        self, x: Tensor, modulation: Tensor, dtype: torch.dtype, rope: RotaryEmbedding2D
    ) -> Tensor:  # fmt: skip
        """The same outputs, and gradients by our kernels."""
        norm1, norm2 = self.norm1, self.norm2
        assert isinstance(norm1, RMSNorm) and isinstance(norm2, RMSNorm)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x, h = fused_backward.modulated_norm(x, norm1.weight, shift_attn, scale_attn, norm1.eps, dtype)
        y = self.attn.with_fused_backward(h, rope)
        x, h = fused_backward.gated_modulated_norm(
            x, y, self.attn.proj.bias, norm2.weight, gate_attn, shift_mlp, scale_mlp, norm2.eps
        )
        return x + gate_mlp * self.mlp(h)


class FinalLayer(nn.Module):
    """Norm, modulation and the projection to patches: (N, T, D) → (N, T, p·p·C)."""

    def __init__(self, config: LightningDiTConfig, out_channels: int) -> None:
        super().__init__()
        width = config.dimensions.width
        self.norm_final = _norm(config, width)
        self.linear = nn.Linear(width, config.patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = per_token(self.adaLN_modulation(c)).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale).to(c.dtype))


def _norm(config: LightningDiTConfig, width: int) -> nn.Module:
    return RMSNorm(width) if config.norm == "rmsnorm" else LayerNorm(width, eps=1e-6, elementwise_affine=False)


class Encoded(NamedTuple):
    """The output of the trunk."""

    tokens: Tensor  # (N, T, D) float32
    time: Tensor  # (N, D), the embedded times
    condition: Tensor  # (N, D), the embedded times plus the embedded conditions
    projected: Tensor | None  # (N, T, dim) float32, the tokens of the alignment head
    internal: Tensor | None  # (N, T, D) float32, the tokens after `internal_depth` blocks


class Trunk(FixedBuffers):
    """The embedders and blocks of LightningDiT. A model adds the layers that turn tokens into a velocity.

    Args:
        in_channels, input_size: C and the side of the latent grid.
        two_clocks: an embedder of half width for each part's time, concatenated [semantic, texture]; otherwise one
            embedder of full width, which reads the texture time.
    """

    pos_embed: Tensor
    repa_projector: nn.Sequential | None  # the model makes it after its other layers, in the order of official files

    def __init__(self, config: LightningDiTConfig, *, in_channels: int, input_size: int, two_clocks: bool) -> None:
        super().__init__()
        if input_size % config.patch_size:
            raise ValueError(f"model.patch_size: {config.patch_size} does not divide the latent side {input_size}")
        self.trunk, self.in_channels, self.input_size = config, in_channels, input_size
        depth, width, heads = config.dimensions
        self.side = side = input_size // config.patch_size
        self.x_embedder = PatchEmbed(config.patch_size, in_channels, width)
        if two_clocks:
            self.t_embedder_sem = TimestepEmbedder(width // 2)
            self.t_embedder_tex = TimestepEmbedder(width // 2)
        else:
            self.t_embedder = TimestepEmbedder(width)
        self.two_clocks = two_clocks
        self.y_embedder = condition_embedder(config.conditioning, width)
        self.register_buffer("pos_embed", sincos_position(width, side))
        self.feat_rope = RotaryEmbedding2D(width // heads, side) if config.rope else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(depth)])

    def encode(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> Encoded:
        """Latents, times and conditions through the trunk's blocks; the arguments are those of the model."""
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        tokens = tokens.float() + self.pos_embed  # (N, T, D)
        time = self.embed_time(t_texture, t_semantic)
        # An engine may keep label rows in float32. Blocks take their dtype from the condition.
        condition = (time + self.y_embedder(y)).to(time.dtype)  # (N, D)
        projected: Tensor | None = None
        internal: Tensor | None = None
        aligned = None if self.trunk.alignment is None else self.trunk.alignment.depth
        for index, block in enumerate(islice(self.blocks, self.trunk.dimensions.depth), start=1):
            tokens = block(tokens, condition, self.feat_rope)
            if index == aligned and self.repa_projector is not None:
                projected = self.repa_projector(tokens.to(condition.dtype)).float()
            if index == self.trunk.internal_depth:
                internal = tokens
        return Encoded(tokens, time, condition, projected, internal)

    def embed_time(self, t_texture: Tensor, t_semantic: Tensor) -> Tensor:
        """(N,) times → (N, D)."""
        if not self.two_clocks:
            return self.t_embedder(t_texture)
        return torch.cat([self.t_embedder_sem(t_semantic), self.t_embedder_tex(t_texture)], dim=1)

    def hidden_matrices(self) -> dict[str, FusedMatrix]:
        """The weights of hidden layers by name, for optimizers that treat matrices as such: those of the blocks, and
        the middle layer of the alignment head. Embedders, the final layer and the ends of the head are left out."""
        layers = (Attention, SwiGLU, GeluMlp, Block)
        found = {
            f"{prefix}.{name}": matrix
            for prefix, layer in self.named_modules()
            if isinstance(layer, layers)
            for name, matrix in layer.fused_weights.items()
        }
        return found if self.repa_projector is None else found | {"repa_projector.2.weight": FusedMatrix()}

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Xavier-uniform linears with zero bias; N(0, 0.02) for labels and the timestep MLP; zero for adaLN and the
        output layer (arXiv 2212.09748). Each parameter has a generator of its own, (seed, "init:" + name)."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed))
        # A construction on the meta device leaves them empty.
        self.pos_embed.copy_(sincos_position(self.trunk.dimensions.width, self.side))
        if self.feat_rope is not None:
            self.feat_rope.reset()


class LightningDiT(Trunk):
    """Predicts the velocity of a latent at given times, under a condition; see Trunk."""

    def __init__(self, config: LightningDiTConfig, *, in_channels: int, input_size: int, two_clocks: bool) -> None:
        super().__init__(config, in_channels=in_channels, input_size=input_size, two_clocks=two_clocks)
        self.config = config
        self.final_layer = FinalLayer(config, self.out_channels)
        self.internal_layer = None if config.internal_depth is None else FinalLayer(config, self.out_channels)
        width = config.dimensions.width
        self.repa_projector = None if config.alignment is None else alignment_head(width, config.alignment)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.config.learn_sigma else 1)

    def forward(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> FlowOutput:
        """Velocity and alignment projection.

        Args:
            x: (N, C, H, W), cast to the dtype of the weights. t_texture, t_semantic: (N,) in [0, 1], always float32.
                y: the condition, (N,) int64 for class labels.

        Returns:
            Velocity (N, C, H, W) and the tokens of the alignment head (N, T, dim), float32; None without such a head.
            With `internal_depth`, also the velocity that the internal layer reads there (N, C, H, W).
        """
        encoded = self.encode(x, t_texture, t_semantic, y)
        velocity = self._velocity(self.final_layer, encoded.tokens, encoded.condition)
        if self.internal_layer is None or encoded.internal is None:
            return velocity, encoded.projected
        return velocity, encoded.projected, self._velocity(self.internal_layer, encoded.internal, encoded.condition)

    def _velocity(self, layer: FinalLayer, tokens: Tensor, condition: Tensor) -> Tensor:
        out = unpatchify(layer(tokens, condition), self.config.patch_size, self.out_channels)
        # learn_sigma: the second half of the channels is a variance. Flow matching has none.
        return (out.chunk(2, dim=1)[0] if self.config.learn_sigma else out).float()


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The start value of one parameter, in its full shape, float32 on the CPU."""
    generator = seeding.generator(seed, f"init:{name}")
    value = torch.empty(shape)
    if "norm" in name.split(".")[-2] and name.endswith("weight"):
        return value.fill_(1.0)
    zero = ("final_layer.linear", "internal_layer.linear")
    if name.endswith("bias") or "adaLN_modulation" in name or name.startswith(zero):
        return value.zero_()
    if name.startswith(("y_embedder", "t_embedder")):
        return nn.init.normal_(value, std=0.02, generator=generator)
    return nn.init.xavier_uniform_(value.flatten(1), generator=generator).view(shape)


def parameter_count(
    config: LightningDiTConfig, *, in_channels: int = 48, input_size: int = 16, two_clocks: bool = True
) -> int:
    """Number of parameters, with the fixed positional embedding, as in the paper. Builds on the meta device."""
    with torch.device("meta"):
        model = LightningDiT(config, in_channels=in_channels, input_size=input_size, two_clocks=two_clocks)
    return sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()
