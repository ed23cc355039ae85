"""A small file of `sfd export` and an evaluation of it, for tests of the commands of the evaluation harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typer.testing import CliRunner

from eval.__main__ import app
from sfd_scale import checkpoint, config, export
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.recipe import TrainRecipe
from sfd_scale.tokenizers.patch_pca import PatchPCA, PatchPCAConfig, PatchPCAFitConfig
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig


def run_eval(*words: Any) -> str:
    """Run a command of `python -m eval` in this process. Returns what it prints; raises what it raises."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def pixels(count: int, seed: int) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear") + 0.05 * seed
    return (255 * large.clamp(0, 1)).to(torch.uint8)


def write_npz(path: Path, images: Tensor, **extra: Any) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **extra)
    return path


def write_export(folder: Path, model: str = "depth: 1", objective: str = "alignment_weight: 0.0") -> Path:
    """A file as `sfd export` writes it, of an untrained model over a texture codec fitted to a few images.

    Args:
        model, objective: settings of both, in YAML.
    """
    images = [pixels(40, seed).repeat(1, 1, 2, 2) for seed in range(2)]
    codec = PatchPCA.fit(images, PatchPCAFitConfig(channels=12, patch=4))
    codec.save(folder / "texture.safetensors")
    text = f"""
kind: train
name: tiny
latents: {{texture_channels: 12, semantic_channels: 4, size: 8}}
model: {{kind: lightningdit, size: null, {model}, width: 32, heads: 2, num_classes: 5, alignment: null}}
objective: {{kind: semantic_first, {objective}}}
data: {{path: {folder}}}
train: {{steps: 1, global_batch: 2}}
tokenizer: {{texture: {{kind: patch_pca, weights: {folder / "texture.safetensors"}}}}}
"""
    (folder / "train.yaml").write_text(text)
    recipe = config.load(folder / "train.yaml", TrainRecipe)
    stats = LatentStats(torch.zeros(16).double(), torch.full((16,), 0.5).double())
    note = {
        "recipe": config.to_dict(recipe), "recipe_digest": config.digest(recipe), "step": 0,
        "stats": {"mean": stats.mean.tolist(), "std": stats.std.tolist()}, "stats_hash": stats.hash,
        "tokenizers": {"texture": PatchPCA.load(PatchPCAConfig(weights=folder / "texture.safetensors")).fingerprint},
    }  # fmt: skip
    out = folder / "model.safetensors"
    net = export.make_model(recipe)
    with torch.no_grad():
        # Untrained it has a velocity of zero, with any guidance and any number of steps.
        for name, weight in net.named_parameters():
            if "adaLN" in name or name.endswith(("_layer.linear.weight", "_layer.linear.bias")):
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    checkpoint.save_weights(net.state_dict(), out, {export.EXPORT_KEY: json.dumps(note)})
    return out


def write_eval_recipe(folder: Path, exported: Path) -> Path:
    """An evaluation of that model by a classifier's features."""
    net = SmallConvNet(SmallConvNetConfig(num_classes=5, image_size=32))
    net.init_weights(0)
    checkpoint.save_weights(net.state_dict(), folder / "classifier.safetensors", {})
    write_npz(folder / "reference.npz", pixels(60, 0).repeat(1, 1, 2, 2))
    (folder / "eval.yaml").write_text(f"""
kind: eval
name: tiny
checkpoint: {exported}
num_samples: 24
batch: 8
sampler: {{kind: euler, num_steps: 2}}
guidance: {{kind: cfg, scale_texture: 1.5}}
extractor: {{kind: convnet, weights: {folder / "classifier.safetensors"}}}
reference: {{kind: npz, path: {folder / "reference.npz"}}}
cache: {folder / "cache"}
metrics: {{is_split: 12, kid_subsets: 2, kid_size: 20}}
""")
    return folder / "eval.yaml"
