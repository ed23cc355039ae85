"""The official code as one more peer, from a checkout (`--official PATH`).

The benchmarks call `LightningDiT` of models/lightningdit.py, `create_transport` and `Sampler` of transport/, and
`ImgLatentDataset` of datasets/img_latent_dataset.py, with the settings of the official S/1 runs. The code runs
unchanged, with its torch.compile decorators. A checkout is executed: use one that you trust.
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
    """Import packages of the checkout, although other packages have the same names (`models`, `datasets`)."""
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
    """A class or function from a file of the checkout.

    Raises:
        ValueError: if the file, the name, or a package that the file imports is missing.
    """
    if not (checkout / file).is_file():
        raise ValueError(f"--official {checkout}: {file} is missing; give the folder with the official train.py")
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    with _first_on_path(checkout):
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"--official {checkout}: {file} cannot be imported ({error}); install that package"
            ) from error
    if not hasattr(found, name):
        raise ValueError(f"--official {checkout}: {file} has no {name}; give a checkout of Semantic-First Diffusion")
    return getattr(found, name)


def model(checkout: Path, size: str, depth: int | None = None) -> nn.Module:
    """The official LightningDiT /1 for composite latents of 256x256 images, with the alignment head."""
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
    """A function that does one official training step and returns the loss: official losses and EMA, torch's AdamW."""
    transport = _transport(checkout)

    def loss(model: nn.Module, latents: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        terms = transport.training_losses(model, latents, {"y": labels}, use_repa=True, feature_dino=features)
        total: Tensor = terms["cos_loss"].mean() + terms["loss"].mean() + terms["repa_loss"].mean()
        return total

    training = PeerTraining(model(checkout, size, depth), precision, loss=loss)
    return lambda: training.step(latents, features, labels)


def euler(checkout: Path, model: nn.Module, noise: Tensor, labels: Tensor, num_steps: int) -> Callable[[], Tensor]:
    """A function that does `num_steps` Euler steps of the official sampler without guidance.

    The official num_steps counts the points of the grid: one more than the steps.
    """
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
    """Endless batches of the official data set, from a folder of official latent files."""
    kind = load(checkout, "datasets/img_latent_dataset.py", "ImgLatentDataset")
    settings = {"data_dir": str(folder), "latent_norm": True, "latent_multiplier": 1.0}
    parameters = inspect.signature(kind).parameters
    data = kind(**{name: value for name, value in settings.items() if name in parameters})
    loader = DataLoader(data, size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader
