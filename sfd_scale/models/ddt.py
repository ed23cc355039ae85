"""DDT, the Decoupled Diffusion Transformer (arXiv 2504.05741), over the trunk of LightningDiT.

The trunk is the condition encoder. It reads the noisy latent, the times and the condition. The head is the velocity
decoder. It reads the noisy latent again. The output of the trunk modulates its blocks, token by token. The head may be
wider than the trunk and shallow, as in RAE (arXiv 2510.11690).

N batch · C channels · H, W latent grid · T tokens · D width of the trunk · V width of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.diffusion.conditioning import Conditioning
from sfd_scale.models.alignment import AlignmentConfig, alignment_head
from sfd_scale.models.layers import PatchEmbed, sincos_position, unpatchify
from sfd_scale.models.lightningdit import Block, FinalLayer, LightningDiTConfig, Trunk
from sfd_scale.models.rope import RotaryEmbedding2D


@dataclass(frozen=True, kw_only=True)
class DDTConfig:
    """A trunk by its `size`, or by depth, width and heads, and a head. `alignment.depth` counts blocks of the trunk."""

    kind: Literal["ddt"] = "ddt"
    size: Literal["S", "B", "L", "XL", "XXL", "1p6B"] | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    head_depth: int = 2
    head_width: int = 2048
    head_heads: int = 16
    patch_size: int = 1
    num_classes: int = 1000
    alignment: AlignmentConfig | None = None

    def __post_init__(self) -> None:
        _ = self.trunk  # its own checks
        try:
            _ = self.head
        except ValueError as error:
            raise ValueError(f"head_{error}") from error

    @property
    def trunk(self) -> LightningDiTConfig:
        return LightningDiTConfig(
            size=self.size, depth=self.depth, width=self.width, heads=self.heads, patch_size=self.patch_size,
            num_classes=self.num_classes, alignment=self.alignment,
        )  # fmt: skip

    @property
    def internal_depth(self) -> None:
        """No internal layer: Internal Guidance is an option of LightningDiT."""

    @property
    def head(self) -> LightningDiTConfig:
        return LightningDiTConfig(
            depth=self.head_depth, width=self.head_width, heads=self.head_heads, patch_size=self.patch_size
        )

    @property
    def conditioning(self) -> Conditioning:
        return self.trunk.conditioning

    @property
    def description(self) -> str:
        trunk = self.trunk.description.removeprefix(self.trunk.kind)
        return (
            f"{self.kind}{trunk}; velocity head of depth {self.head_depth}, width {self.head_width}, "
            f"{self.head_heads} heads"
        )


class DDT(Trunk):
    """Predicts the velocity of a latent at given times, under a condition; arguments as for LightningDiT.

    `blocks` has the trunk's blocks and then the head's, so that engines wrap, checkpoint and compile all of them.
    """

    head_pos_embed: Tensor

    def __init__(self, config: DDTConfig, *, in_channels: int, input_size: int, two_clocks: bool) -> None:
        trunk, head = config.trunk, config.head
        super().__init__(trunk, in_channels=in_channels, input_size=input_size, two_clocks=two_clocks)
        self.config = config
        depth, width, heads = head.dimensions
        self.blocks.extend(Block(head) for _ in range(depth))
        self.head_embedder = PatchEmbed(config.patch_size, in_channels, width)
        self.condition_proj = nn.Linear(trunk.dimensions.width, width)
        self.register_buffer("head_pos_embed", sincos_position(width, self.side))
        self.head_rope = RotaryEmbedding2D(width // heads, self.side)
        self.final_layer = FinalLayer(head, in_channels)
        trunk_width = trunk.dimensions.width
        self.repa_projector = None if config.alignment is None else alignment_head(trunk_width, config.alignment)

    def forward(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Velocity (N, C, H, W) and alignment projection (N, T, dim), or None; see LightningDiT.forward."""
        encoded = self.encode(x, t_texture, t_semantic, y)
        dtype = encoded.time.dtype
        # The head reads the times and the trunk's tokens. It knows the condition only through the tokens.
        seen = functional.silu((encoded.tokens + encoded.time[:, None]).to(dtype))  # (N, T, D)
        condition = self.condition_proj(seen)  # (N, T, V)
        tokens = self.head_embedder(x.to(dtype)).float() + self.head_pos_embed  # (N, T, V)
        for block in islice(self.blocks, self.trunk.dimensions.depth, None):
            tokens = block(tokens, condition, self.head_rope)
        out = self.final_layer(tokens, condition)
        return unpatchify(out, self.config.patch_size, self.in_channels).float(), encoded.projected

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """As for LightningDiT; the trunk has the same start values."""
        super().init_weights(seed)
        self.head_pos_embed.copy_(sincos_position(self.config.head_width, self.side))
        self.head_rope.reset()
