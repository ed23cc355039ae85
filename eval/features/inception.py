"""ADM's Inception network, with torch-fidelity's port of its weights and the spatial features of sFID.

N images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval.features.config import INCEPTION_GRID
from eval.features.downloads import as_file
from eval.features.extractor import Features, check_images, checked
from sfd_scale.runtime.matmul import strict_float32


class InceptionFeatures:
    """Inception (arXiv 2105.05233, Sec. 2.2): pool 2048, spatial 17·17·7, logits without bias 1008.

    The spatial features are the first 7 channels of the 1x1 branch of Mixed_6d, in (row, column, channel) order.
    """

    def __init__(self, state: dict[str, Tensor], device: torch.device, fingerprint: str) -> None:
        self.fingerprint, self.device = fingerprint, device
        layers = ["2048", "logits_unbiased"]  # the constructor takes no tuple
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", layers, feature_extractor_weights_path=as_file(state)
        )
        self.network.to(device)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._tap)

    def _tap(self, module: Any, args: Any, output: Tensor) -> None:
        # (N, 192, 17, 17) → (N, 17, 17, 7): TensorFlow's order, which the stored mu_s and sigma_s have.
        self._spatial = output[:, : INCEPTION_GRID[2]].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        with strict_float32(self.device):
            pool, logits = self.network(images.to(self.device))
        spatial, self._spatial = self._spatial, None
        return checked(Features(pool, spatial, logits))
