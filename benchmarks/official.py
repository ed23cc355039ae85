"""The official code as one more peer, where a checkout of it is given (`--official PATH`).

What is used of it: `LightningDiT` of models/lightningdit.py, `create_transport` and `Sampler` of transport/, and
`ImgLatentDataset` of datasets/img_latent_dataset.py, with the settings of their runs of S/1. It runs as they ship it,
with their torch.compile decorators. A checkout is code: give one that you trust.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.peer import DELTA_T, NULL_LABEL, SEMANTIC, SIDE, TEXTURE, PeerTraining, Precision
from sfd_scale.models.lightningdit import SIZES


@contextlib.contextmanager
def _first_on_path(checkout: Path) -> Iterator[None]:
    """Imports find the checkout's own packages, whose names (`models`, `datasets`) are those of others too."""
    sys.path.insert(0, str(checkout))
    own = {path.name.removesuffix(".py") for path in checkout.iterdir()}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        sys.modules |= hidden
        sys.path.remove(str(checkout))


def load(checkout: Path, file: str, name: str) -> Any:
    """A class or function of a file of the checkout.

    Raises:
        ValueError: in one sentence, if the file or the name is not there, or something that the file imports.
    """
    if not (checkout / file).is_file():
        raise ValueError(f"--official {checkout}: no {file} in it; give the folder that holds train.py of their code")
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    with _first_on_path(checkout):
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"--official {checkout}: {file} cannot be imported ({error}); install that") from error
    if not hasattr(found, name):
        raise ValueError(f"--official {checkout}: {file} has no {name}; give a checkout of Semantic-First Diffusion")
    return getattr(found, name)


def model(checkout: Path, size: str, depth: int | None = None) -> nn.Module:
    """Their LightningDiT /1 on the composite latents of 256x256 images, with the alignment head."""
    layers, width, heads = SIZES[size]
    depth = depth or layers
    made: nn.Module = load(checkout, "models/lightningdit.py", "LightningDiT")(
        input_size=SIDE, patch_size=1, in_channels=TEXTURE + SEMANTIC, hidden_size=width, depth=depth, num_heads=heads,
        mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=NULL_LABEL, use_qknorm=True, use_swiglu=True, use_rope=True,
        use_rmsnorm=True, wo_shift=False, use_repa=True, repa_depth=min(2, depth), repa_projector_dim=2048,
        repa_dino_version="dinov2_vitb14", semantic_chans=SEMANTIC, semfirst_delta_t=DELTA_T,
    )  # fmt: skip
    return made


def _transport(checkout: Path) -> Any:
    return load(checkout, "transport/__init__.py", "create_transport")(
        path_type="Linear", prediction="velocity", use_cosine_loss=True, use_lognorm=True, semantic_weight=2.0,
        semantic_chans=SEMANTIC, semfirst_delta_t=DELTA_T, repa_weight=1.0, repa_mode="cos",
    )  # fmt: skip


def training_step(
    checkout: Path, size: str, precision: Precision, latents: Tensor, features: Tensor, labels: Tensor,
    depth: int | None = None,
) -> Callable[[], object]:  # fmt: skip
    """A step of their training loop, ready to be called for its loss: their losses, torch's AdamW, their EMA."""
    transport = _transport(checkout)

    def loss(model: nn.Module, latents: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        terms = transport.training_losses(model, latents, {"y": labels}, use_repa=True, feature_dino=features)
        total: Tensor = terms["cos_loss"].mean() + terms["loss"].mean() + terms["repa_loss"].mean()
        return total

    training = PeerTraining(model(checkout, size, depth), precision, loss=loss)
    return lambda: training.step(latents, features, labels)


def euler(checkout: Path, model: nn.Module, noise: Tensor, labels: Tensor, num_steps: int) -> Callable[[], Tensor]:
    """`num_steps` Euler steps of their sampler without guidance; their grid has one time more than steps."""
    sampler = load(checkout, "transport/__init__.py", "Sampler")(_transport(checkout))
    run = sampler.sample_ode_semantic_first(
        sampling_method="euler", num_steps=num_steps + 1, atol=1e-6, rtol=1e-3, timestep_shift=0.0,
        semfirst_delta_t=DELTA_T, semantic_chans=SEMANTIC,
    )  # fmt: skip
    model.eval()

    @torch.no_grad()
    def sample() -> Tensor:
        states: Tensor = run(noise, model.forward, y=labels)
        return states[-1]

    return sample


def batches(checkout: Path, folder: Path, size: int, workers: int) -> Iterator[Any]:
    """Endless batches of their data set over a folder of their files."""
    kind = load(checkout, "datasets/img_latent_dataset.py", "ImgLatentDataset")
    settings = {"data_dir": str(folder), "latent_norm": True, "latent_multiplier": 1.0}
    taken = inspect.signature(kind).parameters
    data = kind(**{name: value for name, value in settings.items() if name in taken})
    loader = DataLoader(data, size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader
