"""DDT: its forward pass against a plain implementation, and one run through engines, export, sampling and planning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sfd_scale import config, official, train
from sfd_scale import plan as plans
from sfd_scale.diffusion.fixed_step import FixedStepConfig
from sfd_scale.diffusion.guidance import ClassifierFreeGuidance, NoGuidance, guided
from sfd_scale.diffusion.sampler import Sampler
from sfd_scale.export import export
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.attention import head_dims
from sfd_scale.models.ddt import DDT, DDTConfig
from sfd_scale.models.layers import sincos_position
from sfd_scale.models.lightningdit import LightningDiT
from sfd_scale.recipe import TrainRecipe
from sfd_scale.sample import load_for_sampling
from tests.helpers.encoded import LAYOUT, encode_digits, tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.small_run import lines

CONFIG = DDTConfig(
    depth=2, width=24, heads=2, head_depth=2, head_width=32, head_heads=4, patch_size=2, num_classes=5,
    alignment=AlignmentConfig(depth=2, hidden=20, dim=7),
)  # fmt: skip
SHAPE = {"in_channels": 6, "input_size": 8, "two_clocks": True}


def random_model(config: DDTConfig = CONFIG) -> DDT:
    """A model whose gates and output are not zero, as they are before training."""
    model = DDT(config, **SHAPE)  # type: ignore[arg-type]
    model.init_weights(0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def inputs(count: int = 3) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(2)
    times = torch.rand(2, count, generator=draw)
    return torch.randn(count, 6, 8, 8, generator=draw), times[0], times[1], torch.arange(count)


# ------------------------------------------------------------------------- a plain implementation of the paper


class Plain:
    """DDT written again from arXiv 2504.05741, on the weights of a model: explicit sums in place of its layers."""

    def __init__(self, model: DDT) -> None:
        self.w = {name: value.double() for name, value in model.state_dict().items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def time(self, name: str, t: Tensor) -> Tensor:
        angles = t.double()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
        sinusoids = torch.cat([angles.cos(), angles.sin()], 1)
        return self.linear(f"{name}.mlp.2", functional.silu(self.linear(f"{name}.mlp.0", sinusoids)))

    def patches(self, name: str, x: Tensor) -> Tensor:
        kernel = self.w[f"{name}.proj.weight"]
        grid = functional.conv2d(x.double(), kernel, self.w[f"{name}.proj.bias"], stride=kernel.shape[-1])
        return grid.flatten(2).transpose(1, 2)

    def rotated(self, x: Tensor) -> Tensor:
        """(N, T, A, F): the first half of the features turns by the row, the second by the column."""
        side, half = math.isqrt(x.shape[1]), x.shape[3] // 2
        out = torch.empty_like(x)
        for token in range(side**2):
            for axis, position in enumerate(divmod(token, side)):
                for pair in range(half // 2):
                    angle = position / 10_000 ** (2 * pair / half)
                    at = axis * half + 2 * pair
                    a, b = x[:, token, :, at], x[:, token, :, at + 1]
                    out[:, token, :, at] = a * math.cos(angle) - b * math.sin(angle)
                    out[:, token, :, at + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def block(self, name: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
        """Tokens x and a condition c of each token, (N, T, D) each."""
        parts = self.linear(f"{name}.adaLN_modulation.1", functional.silu(c)).chunk(6, dim=-1)
        h = self.norm(f"{name}.norm1", x) * (1 + parts[1]) + parts[0]
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in self.linear(f"{name}.attn.qkv", h).chunk(3, dim=-1))
        q = self.rotated(self.norm(f"{name}.attn.q_norm", q))
        k = self.rotated(self.norm(f"{name}.attn.k_norm", k))
        scores = torch.einsum("nqaf,nkaf->naqk", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("naqk,nkaf->nqaf", scores.softmax(-1), v).flatten(2)
        x = x + parts[2] * self.linear(f"{name}.attn.proj", mixed)
        h = self.norm(f"{name}.norm2", x) * (1 + parts[4]) + parts[3]
        gate, value = self.linear(f"{name}.mlp.w12", h).chunk(2, dim=-1)
        return x + parts[5] * self.linear(f"{name}.mlp.w3", functional.silu(gate) * value)

    def __call__(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        time = torch.cat([self.time("t_embedder_sem", t_semantic), self.time("t_embedder_tex", t_texture)], 1)
        c = time + self.w["y_embedder.embedding_table.weight"][y]
        tokens = self.patches("x_embedder", x) + sincos_position(24, 4).double()
        each = c[:, None].expand_as(tokens)
        for index in range(2):
            tokens = self.block(f"blocks.{index}", tokens, each, heads=2)
        projected = tokens
        for layer in (0, 2):
            projected = functional.silu(self.linear(f"repa_projector.{layer}", projected))
        condition = self.linear("condition_proj", functional.silu(tokens + time[:, None]))
        noisy = self.patches("head_embedder", x) + sincos_position(32, 4).double()
        for index in range(2, 4):
            noisy = self.block(f"blocks.{index}", noisy, condition, heads=4)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", functional.silu(condition)).chunk(2, dim=-1)
        out = self.linear("final_layer.linear", self.norm("final_layer.norm_final", noisy) * (1 + scale) + shift)
        pixels = out.unflatten(1, (4, 4)).unflatten(3, (2, 2, 6))  # (N, h, w, p, q, C)
        velocity = torch.einsum("nhwpqc->nchpwq", pixels).reshape(len(x), 6, 8, 8)
        return velocity, self.linear("repa_projector.4", projected)


def test_the_forward_pass_is_that_of_a_plain_implementation() -> None:
    model = random_model()
    with torch.no_grad():
        velocity, projected = model(*inputs())
    expected, features = Plain(model)(*inputs())
    assert projected is not None and velocity.std() > 0.1
    torch.testing.assert_close(velocity.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projected.double(), features, rtol=1e-4, atol=1e-5)


def test_the_head_sees_the_label_only_through_the_encoder() -> None:
    model, (x, t, s, y) = random_model(), inputs()
    with torch.no_grad():
        before = model(x, t, s, y)[0]
        # With the encoder's output closed off, labels change nothing, while times and the latent still do.
        for block in model.blocks[:2]:
            block.adaLN_modulation[1].weight.zero_()  # type: ignore[union-attr]
        same, other = model(x, t, s, y)[0], model(x, t, s, y.roll(1))[0]
        assert torch.equal(same, other) and not torch.equal(same, before)
        assert not torch.equal(model(x, t, 1 - s, y)[0], same)


def test_start_values_of_the_trunk_are_those_of_lightningdit() -> None:
    with torch.device("meta"):
        model = DDT(CONFIG, **SHAPE)  # type: ignore[arg-type]
    model.to_empty(device="cpu").init_weights(3)
    trunk = LightningDiT(CONFIG.trunk, **SHAPE)  # type: ignore[arg-type]
    trunk.init_weights(3)
    own = model.state_dict()
    shared = {name: value for name, value in trunk.state_dict().items() if not name.startswith("final_layer")}
    assert len(shared) > 30 and all(torch.equal(own[name], value) for name, value in shared.items())
    assert all(value.isfinite().all() for value in own.values())
    for index in (2, 3):
        assert not own[f"blocks.{index}.adaLN_modulation.1.weight"].any()
    assert not model(*inputs())[0].any(), "a velocity of zero before training"
    assert head_dims(model) == (12, 8) and len(model.blocks) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_depth": 0}, r"^head_depth: 0; allowed: 1 and up"),
        ({"head_heads": 5}, r"^head_width: 32 with 5 heads; allowed: a multiple of 4 times the heads"),
        ({"width": 23}, r"^width: 23 with 2 heads"),
        ({"size": "B"}, r"^size: B with depth, width, heads \(2, 24, 2\); allowed: a size, or all three"),
        ({"alignment": AlignmentConfig(depth=3)}, r"^alignment\.depth: 3; allowed: 1 to the model's depth 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    settings = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        DDTConfig(**settings | changes)


# --------------------------------------------------------------------------------------------- a whole run

STEPS = 4
ENGINES = {
    "zero1": ["engine.zero_stage=1", "engine.precision=bf16"],
    "zero3": ["engine.zero_stage=3", "engine.precision=bf16", "engine.persistent_elements=100"],
    "fsdp": ["engine.kind=fsdp", "engine.precision=bf16", "engine.grad_clip=1.0"],
}


def settings(folder: Path, steps: int, *more: str) -> list[str]:
    """Overrides of quickstart/sfd_ddt: tiny data, and few steps under a constant learning rate."""
    return [
        f"data.path={folder / 'data'}", "latents.texture_channels=6", "latents.semantic_channels=3", "latents.size=8",
        "model.alignment.dim=6", "lr.kind=constant",
        f"tokenizer.texture={{kind: patch_pca, weights: {folder / 'codec.safetensors'}}}",
        "train.global_batch=8", "train.log_every=1", f"train.steps={steps}", "checkpoint.every=2",
        "checkpoint.keep_last=5", "wandb.mode=disabled", *more,
    ]  # fmt: skip


def trained(folder: str) -> None:
    """ZeRO-1 without a stop; FSDP2 that stops half way and goes on under ZeRO-1, and another that does under ZeRO-3."""
    root = Path(folder)

    def go(name: str, engine: str, steps: int, *more: str) -> None:
        recipe = config.load("quickstart/sfd_ddt", TrainRecipe, settings(root, steps, *ENGINES[engine], *more))
        assert train.train(recipe, root / name)

    go("zero1", "zero1", STEPS, "metrics.peak=measured")
    for resumed in ("zero1", "zero3"):
        go(f"fsdp-{resumed}", "fsdp", STEPS // 2)
        go(f"fsdp-{resumed}", resumed, STEPS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ddt")
    encode_digits(root / "data", 24, features="shards")
    tokenizer().texture.save(root / "codec.safetensors")  # type: ignore[attr-defined]
    run_ranks(trained, 2, str(root), timeout=500.0)
    return root


def test_a_checkpoint_of_one_engine_goes_on_under_another(runs: Path) -> None:
    whole = [row["loss"] for row in lines(runs / "zero1/metrics.jsonl")]
    assert len(whole) == STEPS and whole[-1] < whole[0]
    for name in ("fsdp-zero1", "fsdp-zero3"):
        rows = lines(runs / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert [row["loss"] for row in rows] == pytest.approx(whole, rel=2e-3), name


def test_flops_mfu_attention_and_memory_are_reported(runs: Path) -> None:
    rows = lines(runs / "zero1/metrics.jsonl")
    assert all(0 < row["mfu"] < 1 for row in rows[1:])
    facts = json.loads((runs / "zero1/environment.json").read_text())["run"]
    assert facts["model"].startswith("ddt, depth 3, width 128, 4 heads; velocity head of depth 1, width 192, 6 heads")
    assert "G per sample" in facts["FLOPs"] and "attention" in facts and "GiB per rank" in facts["planned memory"]


def test_an_export_is_sampled_with_guidance(runs: Path) -> None:
    file = export(runs / "fsdp-zero3", runs / "weights.safetensors")
    loaded = load_for_sampling(file, torch.device("cpu"))
    assert isinstance(loaded.model, DDT) and loaded.layout == LAYOUT and loaded.null_trained
    images = []
    for guidance in (NoGuidance(), ClassifierFreeGuidance(scale_texture=3.0, scale_semantic=3.0)):
        velocity = guided(loaded.model, guidance, loaded.layout, conditioning=loaded.conditioning)
        sampler = Sampler(
            velocity, loaded.layout, loaded.schedule, FixedStepConfig(num_steps=4), loaded.stats, loaded.decode, 0, 4,
            torch.device("cpu"),
        )  # fmt: skip
        images.append(sampler.draw(range(4), loaded.conditioning.in_turn(4)).latents)
        assert sampler.images(range(4), loaded.conditioning.in_turn(4)).images.shape == (4, 3, 32, 32)
    assert all(latents.isfinite().all() for latents in images) and not torch.equal(*images)
    with pytest.raises(
        ValueError, match=r"model\.kind: 'ddt'; allowed: 'lightningdit', the model of the official code"
    ):
        official.export_official(file, runs / "weights.pt")
    with pytest.raises(ValueError, match=r"model\.kind: 'ddt'; allowed: 'lightningdit'"):
        official.export_official(runs / "zero1", runs / "weights.pt")


def test_a_plan_counts_both_widths(runs: Path) -> None:
    recipe = config.load("quickstart/sfd_ddt", TrainRecipe, settings(runs, 4))
    machine = plans.make_machine("h100", None, gpus_per_node=8, network=None)
    (made,) = plans.make(["quickstart/sfd_ddt"], settings(runs, 4), [2], machine)
    work = made.job
    model = recipe.task.make_model()
    assert work.footprint.parameters == sum(parameter.numel() for parameter in model.parameters())
    sizes = [sum(math.prod(shape) for shape in block) for block in work.footprint.blocks]
    assert len(sizes) == 4 and sizes[0] == sizes[2] < sizes[3]
