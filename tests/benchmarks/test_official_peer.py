"""The official code as a peer: a checkout is loaded, called in its own conventions, and leaves no module behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import official, peer
from benchmarks.loader import write_theirs
from benchmarks.train_step import batch_of, randomize

# A stand-in for the official checkout: its files, classes and arguments, with the arithmetic of the baseline.
MODEL = """
from torch import nn
from models.swiglu import ALIGNED
from benchmarks.peer import Peer

class LightningDiT(nn.Module):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, num_classes,
                 class_dropout_prob, use_qknorm, use_swiglu, use_rope, use_rmsnorm, wo_shift, use_repa, repa_depth,
                 repa_projector_dim, repa_dino_version, semantic_chans, semfirst_delta_t):
        super().__init__()
        assert (input_size, in_channels, hidden_size, num_heads, ALIGNED) == (16, 48, 384, 6, True)
        self.net = Peer("S", depth=depth)

    def forward(self, x, t, y):
        velocity, projected = self.net(x, t[0], t[1], y)
        return (velocity, projected) if self.training else velocity
"""
TRANSPORT = """
import torch
from benchmarks.peer import peer_loss

class Transport:
    def __init__(self, semantic_weight, semfirst_delta_t):
        assert (semantic_weight, semfirst_delta_t) == (2.0, 0.3)

    def training_losses(self, model, x1, model_kwargs, use_repa, feature_dino):
        def two_clocks(x, texture, semantic, y):
            return model(x, (texture, semantic), y)

        u = torch.full((len(x1),), 0.5)
        total = peer_loss(two_clocks, x1, feature_dino, model_kwargs["y"], torch.zeros_like(x1), u)
        return {"loss": total.expand(len(x1)), "cos_loss": torch.zeros(len(x1)), "repa_loss": torch.zeros(len(x1))}

def create_transport(path_type, prediction, use_cosine_loss, use_lognorm, semantic_weight, semantic_chans,
                     semfirst_delta_t, repa_weight, repa_mode):
    return Transport(semantic_weight, semfirst_delta_t)

class Sampler:
    def __init__(self, transport):
        self.transport = transport

    def sample_ode_semantic_first(self, sampling_method, num_steps, atol, rtol, timestep_shift, semfirst_delta_t,
                                  semantic_chans):
        times = torch.linspace(0, 1 + semfirst_delta_t, num_steps)

        def run(x, model, y):
            states = [x]
            for now, following in zip(times[:-1], times[1:]):
                clocks = ((now - semfirst_delta_t).clamp(min=0).expand(len(x)), now.clamp(max=1).expand(len(x)))
                velocity = model(x, clocks, y)
                velocity[:, :-semantic_chans] *= float(now >= semfirst_delta_t)
                velocity[:, -semantic_chans:] *= float(now <= 1)
                x = x + (following - now) * velocity
                states.append(x)
            return torch.stack(states)

        return run
"""
DATA = """
from glob import glob
from safetensors import safe_open
from torch.utils.data import Dataset

class ImgLatentDataset(Dataset):
    def __init__(self, data_dir, latent_norm=True, latent_multiplier=0.2):
        assert latent_norm and latent_multiplier == 1.0
        (self.file,) = glob(f"{data_dir}/*.safetensors")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with safe_open(self.file, framework="pt") as file:
            return file.get_slice("latents")[index], file.get_slice("labels")[index : index + 1][0]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {
        "models/__init__.py": "", "models/swiglu.py": "ALIGNED = True", "models/lightningdit.py": MODEL,
        "transport/__init__.py": TRANSPORT, "datasets/img_latent_dataset.py": DATA, "train.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_training_step_and_euler_call_the_official_code(checkout: Path) -> None:
    batch = batch_of(1)
    assert batch.features is not None
    step = official.training_step(checkout, "S", "fp32", batch.latents, batch.features, batch.labels, depth=1)
    first = step()
    assert step() < first  # type: ignore[operator]  the draws of the stand-in are fixed, so a step of AdamW is seen

    model, same = official.model(checkout, "S", depth=1), peer.Peer("S", depth=1)
    randomize(same)
    model.net.load_state_dict(same.state_dict())  # type: ignore[union-attr, operator]
    x = official.euler(checkout, model, batch.latents, batch.labels, num_steps=3)()
    expected = peer.euler(peer.field(same, batch.labels), batch.latents, 3)[-1]
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert str(checkout) not in sys.path and "transport" not in sys.modules


def test_the_official_data_set_reads_official_files(checkout: Path, tmp_path: Path) -> None:
    write_theirs(tmp_path / "data", 8)
    latents, labels = next(official.batches(checkout, tmp_path / "data", 4, 0))
    assert latents.shape == (4, 32, 16, 16) and labels.shape == (4,)


def test_a_folder_of_other_code_is_an_error(checkout: Path) -> None:
    (checkout / "datasets" / "img_latent_dataset.py").unlink()
    with pytest.raises(ValueError, match=r"datasets/img_latent_dataset\.py is missing; give the folder"):
        official.load(checkout, "datasets/img_latent_dataset.py", "ImgLatentDataset")
    with pytest.raises(ValueError, match=r"models/lightningdit\.py has no DiT; give a checkout"):
        official.load(checkout, "models/lightningdit.py", "DiT")
    (checkout / "models" / "swiglu.py").write_text("import no_such_package")
    with pytest.raises(ValueError, match=r"cannot be imported \(No module named 'no_such_package'\); install"):
        official.load(checkout, "models/lightningdit.py", "LightningDiT")
    assert str(checkout) not in sys.path and "models" not in sys.modules
