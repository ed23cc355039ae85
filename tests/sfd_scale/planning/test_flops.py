"""FLOPs of a training step: against torch's counter on the whole model, and against arithmetic by hand."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfd_scale import build, config
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.ddt import DDT, DDTConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.planning.flops import training_flops
from sfd_scale.recipe import TrainRecipe
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig

TINY = LightningDiTConfig(depth=3, width=64, heads=4, num_classes=10, alignment=AlignmentConfig())
DECOUPLED = DDTConfig(depth=3, width=64, heads=4, head_depth=2, head_width=96, head_heads=4, num_classes=10)
VARIANT = LightningDiTConfig(depth=2, width=96, heads=4, patch_size=2, mlp="gelu", shift=False, learn_sigma=True)


def latents(channels: int, side: int) -> tuple[Tensor, ...]:
    return torch.zeros(1, channels, side, side), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: LightningDiT(TINY, in_channels=12, input_size=8, two_clocks=True), lambda: latents(12, 8)),
        (lambda: LightningDiT(VARIANT, in_channels=5, input_size=8, two_clocks=False), lambda: latents(5, 8)),
        (lambda: DDT(DECOUPLED, in_channels=12, input_size=8, two_clocks=True), lambda: latents(12, 8)),
        (
            lambda: SemanticVAE(SemanticVAEConfig(input_dim=24, bottleneck_dim=4, hidden_dim=32, heads=2, blocks=3)),
            lambda: (torch.zeros(1, 9, 24), torch.zeros(1, 9, 4)),
        ),
        (
            lambda: SmallConvNet(SmallConvNetConfig(widths=(16, 24, 24, 24))),
            lambda: (torch.zeros(1, 3, 32, 32, dtype=torch.uint8),),
        ),
    ],
)
def test_a_training_step_is_three_times_the_forward_pass_that_torch_counts(
    make: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]]
) -> None:
    with FlopCounterMode(display=False) as counter:
        make()(*inputs())
    assert training_flops(make, inputs) == 3 * counter.get_total_flops() > 0


class Windows(nn.Module):
    """A model whose blocks have equal parameters and differ in a plain setting; the second is not like the first."""

    class Block(nn.Module):
        def __init__(self, repeats: int) -> None:
            super().__init__()
            self.repeats, self.linear = repeats, nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(self.repeats):
                x = self.linear(x)
            return x, x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(n) for n in (1, 5, 1, 5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return x


def test_only_equal_blocks_are_counted_once() -> None:
    assert training_flops(Windows, lambda: (torch.zeros(4, 8),)) == 3 * 2 * 4 * 8 * 8 * (1 + 5 + 1 + 5 + 5)


# Multiply-adds of the published architecture, 48 channels on 16 × 16, times two, times three.
@pytest.mark.parametrize(
    ("recipe", "flops"),
    [
        ("train/sfd_b", 149_359_755_264),
        ("train/sfd_xl", 724_291_731_456),
        ("train/sfd_xxl", 1_088_660_963_328),
    ],
)
def test_the_flops_of_the_published_models(recipe: str, flops: int) -> None:
    started = time.process_time()
    assert build.flops(config.load(recipe, TrainRecipe)) == flops
    assert time.process_time() - started < 8
