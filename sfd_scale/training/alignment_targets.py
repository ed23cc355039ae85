"""Alignment features that are not stored: made from images, or from the semantic latents (arXiv 2410.06940, Sec. 3).

N batch · C latent channels · D feature channels · h, w grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfd_scale.data.batches import LatentBatch
from sfd_scale.diffusion.latents import LatentLayout, LatentStats
from sfd_scale.tokenizers.composite import FeatureTokenizer
from sfd_scale.tokenizers.protocols import SemanticCodec


class OnlineFeatures:
    """The frozen vision encoder on the images of a batch: the true features, for a forward pass of it a step."""

    def __init__(self, tokenizer: FeatureTokenizer) -> None:
        assert tokenizer.vision is not None
        self.tokenizer, self.dim = tokenizer, tokenizer.vision.dim

    def __call__(self, batch: LatentBatch) -> Tensor:
        """(N, D, h, w) float32."""
        assert batch.images is not None  # the reader was asked for them
        return self.tokenizer.features(batch.images)


class DecodedFeatures:
    """The semantic codec's reconstruction from the semantic part of the latents: as close as it is, for no storage."""

    def __init__(self, semantic: SemanticCodec, layout: LatentLayout, stats: LatentStats) -> None:
        self.semantic, self.layout, self.stats, self.dim = semantic, layout, stats, semantic.dim

    @torch.no_grad()
    def __call__(self, batch: LatentBatch) -> Tensor:
        """(N, D, h, w) float32."""
        _, semantic = self.layout.split(self.stats.denormalize(batch.latents))
        return self.semantic.decode(semantic).float()
