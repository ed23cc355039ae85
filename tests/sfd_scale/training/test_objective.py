"""Objectives: their draws, their terms, and what they refuse."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfd_scale.data.batches import FeatureBatch, ImageBatch, LatentBatch
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.runtime import seeding
from sfd_scale.training.classification import ClassificationConfig, ClassificationObjective
from sfd_scale.training.objective import LossTerms
from sfd_scale.training.semantic_first import FlowDraw, SemanticFirstConfig, SemanticFirstObjective
from sfd_scale.training.semantic_vae import SemanticVAELossConfig, SemanticVAEObjective, gaussian_kl
from tests.helpers.golden_arrays import arrays, check, settings

LAYOUT = LatentLayout(texture_channels=2, semantic_channels=1, size=2)
PLAIN = SemanticFirstConfig(alignment_weight=0.0)


def latents(count: int, features: bool = False) -> LatentBatch:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, *LAYOUT.shape, generator=draw)
    keys = torch.stack([torch.full((count,), 3), torch.arange(count) + 100], 1)
    return LatentBatch(x, torch.arange(count) % 10, keys, torch.randn(count, 5, 2, 2) if features else None)


def objective(config: SemanticFirstConfig = PLAIN, delta_t: float = 0.3, seed: int = 0) -> SemanticFirstObjective:
    return SemanticFirstObjective(
        config, LAYOUT, SemanticFirstSchedule(delta_t=delta_t), conditioning=ClassLabels(10), seed=seed
    )


def still(x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, None]:
    return torch.zeros_like(x), None


# ---------------------------------------------------------------------------------------- semantic first


def test_draws_belong_to_the_sample_not_to_its_batch() -> None:
    batch = latents(6)
    whole, part = objective().draw(batch), objective().draw(batch.slice(2, 4))
    for name in ("noise", "g", "condition"):
        assert torch.equal(getattr(whole, name)[2:4], getattr(part, name)), name
    other = objective(seed=1).draw(batch)
    assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.g, other.g)
    later = LatentBatch(batch.latents, batch.labels, batch.keys + torch.tensor([1, 0]))
    assert not torch.equal(whole.g, objective().draw(later).g)


def test_draws_have_their_laws() -> None:
    batch = LatentBatch(
        torch.zeros(4000, *LAYOUT.shape), torch.zeros(4000, dtype=torch.long), torch.arange(8000).reshape(4000, 2)
    )
    draw = objective().draw(batch)
    logit = torch.logit((draw.g / 1.3).double())
    # Five standard errors: the logit of the time is standard normal, so is the noise; a tenth of the labels drop.
    assert abs(logit.mean()) < 0.08 and abs(logit.std() - 1) < 0.06
    assert abs(draw.noise.mean()) < 0.025 and abs(draw.noise.std() - 1) < 0.02
    assert abs((draw.condition == 10).float().mean() - 0.1) < 0.024
    assert objective(SemanticFirstConfig(label_dropout=0.0, alignment_weight=0.0)).draw(batch).condition.max() == 0


def test_terms_are_those_of_the_formula() -> None:
    """A model that predicts nothing: the loss is the size of the target, the cosine term 1."""
    batch = latents(6)
    result = objective()(still, batch)
    draw = objective().draw(batch)
    square = (batch.latents - draw.noise).square()
    texture, semantic = LAYOUT.split(square)
    assert result.terms["velocity_texture"].item() == pytest.approx(texture.mean().item(), rel=1e-5)
    assert result.terms["velocity_semantic"].item() == pytest.approx(semantic.mean().item(), rel=1e-5)
    weighted = (texture.sum() + 2 * semantic.sum()) / square.numel()
    assert result.terms["velocity"].item() == pytest.approx(weighted.item(), rel=1e-5)
    assert result.terms["cosine"].item() == 1
    assert result.terms["loss"].item() == pytest.approx(weighted.item() + 1, rel=1e-5) == result.total.item()
    assert "alignment" not in result.terms
    assert result.per_sample is not None and result.per_sample.mean().item() == pytest.approx(result.total.item())
    assert result.clock is not None and torch.equal(result.clock, draw.g / 1.3)


def test_the_model_gets_each_part_at_its_own_time() -> None:
    seen: dict[str, Tensor] = {}

    def model(x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, None]:
        seen.update(x=x, texture=t_texture, semantic=t_semantic, y=y)
        return torch.zeros_like(x), None

    batch = latents(3)
    draw = FlowDraw(torch.ones_like(batch.latents), torch.tensor([0.2, 0.7, 1.2]), torch.tensor([1, 10, 2]))
    objective().loss(model, batch, draw)
    torch.testing.assert_close(seen["texture"], torch.tensor([0.0, 0.4, 0.9]))
    torch.testing.assert_close(seen["semantic"], torch.tensor([0.2, 0.7, 1.0]))
    texture, semantic = LAYOUT.split(seen["x"])
    data_texture, data_semantic = LAYOUT.split(batch.latents)
    assert (texture[0] == 1).all()
    torch.testing.assert_close(texture[1], 0.4 * data_texture[1] + 0.6)
    torch.testing.assert_close(semantic[1], 0.7 * data_semantic[1] + 0.3)
    torch.testing.assert_close(semantic[2], data_semantic[2])
    assert torch.equal(seen["y"], draw.condition)


def test_without_lead_both_times_are_the_same() -> None:
    times: list[Tensor] = []

    def model(x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, None]:
        times.extend([t_texture, t_semantic])
        return torch.zeros_like(x), None

    objective(delta_t=0.0)(model, latents(4))
    assert torch.equal(times[0], times[1]) and times[0].unique().numel() == 4


def test_alignment_is_weighted_and_counted() -> None:
    batch = latents(3, features=True)
    assert batch.features is not None
    opposite = -batch.features.flatten(2).transpose(1, 2)

    def model(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), opposite.bfloat16()

    result = objective(SemanticFirstConfig(alignment_weight=0.5))(model, batch)
    assert result.terms["alignment"].item() == pytest.approx(2, abs=1e-5)
    plain = objective()(still, batch).terms["loss"].item()
    assert result.terms["loss"].item() == pytest.approx(plain + 0.5 * 2, abs=1e-5)


def test_only_the_total_carries_a_gradient() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    result = objective()(lambda x, *rest: ((weight * x).bfloat16(), None), latents(3))
    assert result.total.dtype == torch.float32
    assert not any(term.requires_grad for term in result.terms.values())
    assert result.per_sample is not None and not result.per_sample.requires_grad
    result.total.backward()
    assert weight.grad is not None and weight.grad != 0


def test_missing_alignment_is_said_not_skipped() -> None:
    config = SemanticFirstConfig(alignment_weight=1.0)
    with pytest.raises(ValueError, match="no alignment features; encode it with store.features=shards"):
        objective(config)(still, latents(2))
    with pytest.raises(ValueError, match="no alignment head; set model.alignment"):
        objective(config)(still, latents(2, features=True))


def test_latents_without_semantics_train() -> None:
    layout = LatentLayout(texture_channels=3, semantic_channels=0, size=2)
    alone = SemanticFirstObjective(
        PLAIN, layout, SemanticFirstSchedule(delta_t=0.0), conditioning=ClassLabels(10), seed=0
    )
    result = alone(still, latents(2))
    assert result.total.isfinite() and "velocity_semantic" not in result.terms


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticFirstConfig(semantic_weight=-1.0), "semantic_weight: -1.0"),
        (lambda: SemanticFirstConfig(label_dropout=1.0), "label_dropout: 1.0"),
        (lambda: SemanticVAELossConfig(kl_weight=float("nan")), "kl_weight: nan"),
        (lambda: ClassificationConfig(label_smoothing=1.0), "label_smoothing: 1.0"),
        (lambda: ClassificationConfig(translate=-1), "translate: -1"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------ semantic VAE


def test_golden_kl() -> None:
    golden = arrays("out_semvae")
    check(gaussian_kl(golden["mean"], golden["logvar"]), "out_semvae", "kl")


def test_golden_vae_losses() -> None:
    authors, golden = settings["semvae"], arrays("out_semvae")
    config = SemanticVAEConfig(
        input_dim=authors["input_dim"],
        bottleneck_dim=authors["bottleneck_dim"],
        hidden_dim=authors["hidden_dim"],
        heads=authors["transformer_heads"],
        blocks=authors["transformer_blocks"],
    )
    model, tokens = SemanticVAE(config), arrays("inputs")["sv_x"]
    model.load_state_dict(arrays("weights_semvae"))
    objective = SemanticVAEObjective(SemanticVAELossConfig(), Grid(), latent_channels=config.bottleneck_dim, seed=0)
    terms = objective.loss(model(tokens, golden["eps_seed3"])[0], tokens, *model.posterior(tokens)).terms
    ours = torch.stack([terms[name] for name in ("mse", "cosine", "kl", "loss")])
    assert ((ours - golden["train_losses"][[0, 2, 3, 4]]) / ours).abs().max() <= 1e-5
    check(ours, "out_semvae", "train_losses", of=lambda losses: losses[[0, 2, 3, 4]])


class Grid:
    """A vision encoder: the image itself, in three channels."""

    def grid(self, image_size: int) -> int:
        return image_size

    def features(self, images: Tensor) -> Tensor:
        return images.float()


KEYS = [(0, 0), (0, 1), (0, 2)]


def images(count: int, size: int = 2) -> ImageBatch:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0))
    keys = torch.stack([torch.zeros(count, dtype=torch.long), torch.arange(count)], 1)
    return ImageBatch(pixels.to(torch.uint8), torch.arange(count) % 3, keys)


def vae_loss(model: Any, **fields: Any) -> LossTerms:
    vae = SemanticVAEObjective(SemanticVAELossConfig(**fields), Grid(), latent_channels=1, seed=0)
    return vae(model, images(2))


def test_the_vae_sees_tokens_and_noise_of_its_samples() -> None:
    seen: list[Tensor] = []

    def model(tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.extend([tokens, noise])
        zero = torch.zeros_like(noise)
        return tokens + 1, zero + 2, zero

    result = vae_loss(model)
    assert torch.equal(seen[0][:, 1], images(2).images[:, :, 0, 1].float()), "tokens run along rows"
    assert seen[1].shape == (2, 4, 1) and not torch.equal(seen[1][0], seen[1][1])
    assert result.terms["mse"].item() == pytest.approx(1) and result.terms["kl"].item() == pytest.approx(4 * 2)


@pytest.mark.parametrize("stored", [False, True])
def test_the_noise_of_the_vae_is_drawn_ahead_with_the_same_values(stored: bool) -> None:
    batch: Any = images(3)
    if stored:
        batch = FeatureBatch(batch.images.half(), batch.labels, batch.keys)
    vae = SemanticVAEObjective(SemanticVAELossConfig(), None if stored else Grid(), latent_channels=2, seed=4)
    seen: list[Tensor] = []

    def model(tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(noise)
        return tokens, torch.zeros_like(noise), torch.zeros_like(noise)

    ahead = vae.prepare(batch)
    assert ahead.noise is not None and torch.equal(ahead.noise, seeding.normal(4, "posterior", KEYS, (4, 2)))
    for each in (batch, ahead):
        vae(model, each.to(torch.device("cpu")))
    assert torch.equal(*seen) and torch.equal(seen[0], ahead.noise)
    vae(model, dataclasses.replace(ahead, noise=ahead.noise + 1))
    assert torch.equal(seen[2], ahead.noise + 1), "what was drawn ahead is used"


def test_the_vae_compares_over_tokens_or_over_features() -> None:
    """A reconstruction that scales each feature channel differently keeps its direction over the tokens only."""
    scale = torch.tensor([1.0, 3.0, 9.0])

    def model(tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tokens * scale, torch.zeros_like(noise), torch.zeros_like(noise)

    assert vae_loss(model).terms["cosine"].item() == pytest.approx(0, abs=1e-6)
    assert vae_loss(model, cosine_over="features").terms["cosine"].item() > 0.05


# ---------------------------------------------------------------------------------------- classification


def test_classification_is_smoothed_cross_entropy() -> None:
    batch = images(3)
    logits = torch.tensor([[4.0, 0, 0], [0, 4, 0], [4, 0, 0]])
    classify = ClassificationObjective(ClassificationConfig(label_smoothing=0.3), seed=0)
    result = classify(lambda pixels: SimpleNamespace(logits=logits), batch)
    log_p = logits.log_softmax(1)
    targets = torch.full((3, 3), 0.1) + 0.7 * torch.eye(3)
    assert result.total.item() == pytest.approx(-(targets * log_p).sum(1).mean().item(), rel=1e-5)
    assert result.measures["accuracy"].item() == pytest.approx(2 / 3)


def test_images_are_changed_ahead_with_the_same_values() -> None:
    settings = ClassificationConfig(translate=1, pretext="rotation")
    classify, seen = ClassificationObjective(settings, seed=3), list[Tensor]()

    def model(pixels: Tensor) -> SimpleNamespace:
        seen.append(pixels)
        return SimpleNamespace(logits=torch.eye(4)[pixels.flatten(1).float().sum(1).long() % 4])

    batch = images(12, size=4)
    ahead = classify.prepare(batch)
    assert ahead.augmented and not torch.equal(ahead.images, batch.images) and ahead.labels.unique().numel() > 1
    results = [classify(model, each).total for each in (batch, ahead, ahead.slice(0, 12))]
    assert torch.equal(seen[0], seen[1]) and results[0] == results[1] == results[2]


def test_translation_moves_whole_images_by_their_own_draw() -> None:
    batch = images(40, size=6)
    move = ClassificationObjective(ClassificationConfig(translate=1), seed=0)
    moved = move.augment(batch)
    assert moved.dtype == torch.uint8 and moved.shape == batch.images.shape
    inner = batch.images[:, :, 1:5, 1:5]
    found = {
        (dy, dx): sum(torch.equal(moved[i, :, 1 - dy : 5 - dy, 1 - dx : 5 - dx], inner[i]) for i in range(40))
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert sum(found.values()) == 40 and all(found.values())
    assert torch.equal(move.augment(batch.slice(7, 9)), moved[7:9])
