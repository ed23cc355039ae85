"""Targets of the alignment loss (REPA, arXiv 2410.06940, Sec. 3) that the data does not store, but training computes.

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
    """The features of the batch's images, by a frozen vision encoder. Costs one forward pass of it per batch."""

    def __init__(self, tokenizer: FeatureTokenizer) -> None:
        assert tokenizer.vision is not None
        self.tokenizer, self.dim = tokenizer, tokenizer.vision.dim

    def __call__(self, batch: LatentBatch) -> Tensor:
        """(N, D, h, w) float32."""
        assert batch.images is not None  # the dataloader reads them for this objective
        return self.tokenizer.features(batch.images)


class DecodedFeatures:
    """An approximation of the features: the semantic codec decodes the semantic part of the latents."""

    def __init__(self, semantic: SemanticCodec, layout: LatentLayout, stats: LatentStats) -> None:
        self.semantic, self.layout, self.stats, self.dim = semantic, layout, stats, semantic.dim

    @torch.no_grad()
    def __call__(self, batch: LatentBatch) -> Tensor:
        """(N, D, h, w) float32."""
        _, semantic = self.layout.split(self.stats.denormalize(batch.latents))
        return self.semantic.decode(semantic).float()
