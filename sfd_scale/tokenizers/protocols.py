"""What the tokenizers have in common: their protocols, pixel ranges, identities, reconstruction quality.

N batch · C latent channels · D feature channels · H, W image · h, w latent grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sfd_scale.runtime.matmul import allow_tf32, no_tf32

M = TypeVar("M", bound=nn.Module)
Precision = Literal["fp32", "tf32", "bf16"]
"""The log-variance of a codec without one, where a tensor has to hold it: the lower bound of posteriors."""


class Posterior(NamedTuple):
    """A posterior: mean (N, C, h, w) and log-variance of that shape, or None where the codec is deterministic."""

    mean: Tensor
    logvar: Tensor | None


class TextureCodec(Protocol):
    """Images to latents and back."""

    @property
    def channels(self) -> int: ...

    @property
    def downsample(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, images: Tensor) -> Posterior:
        """(N, 3, H, W) uint8 → moments (N, C, H/downsample, W/downsample) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, 3, H, W) uint8."""
        ...

    def to(self, device: torch.device) -> Self: ...


class VisionEncoder(Protocol):
    """Images to features, frozen."""

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def grid(self, image_size: int) -> int:
        """Side of the feature grid for an image side."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, D, h, w) float32."""
        ...

    def to(self, device: torch.device) -> Self: ...


class SemanticCodec(Protocol):
    """Features to latents and back."""

    @property
    def dim(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, features: Tensor) -> Posterior:
        """(N, D, h, w) → moments (N, C, h, w) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, D, h, w) float32."""
        ...

    def to(self, device: torch.device) -> Self: ...


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Where encoders run: in float32, with TF32 products on a GPU as the authors', or with products in bfloat16 and
    weights, norms and sums as they are."""
    products = {"fp32": no_tf32, "tf32": allow_tf32, "bf16": nullcontext}[precision]
    with products(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


def from_uint8(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[−1, 1] → uint8 by floor(127.5·x + 128), the rule of DiT and of the authors.

    Raises:
        FloatingPointError: for pixels that are not finite, which uint8 cannot show.
    """
    if not bool(images.isfinite().all()):
        raise FloatingPointError("decoded images are not finite: the latents or the codec's weights are broken")
    return (images.float() * 127.5 + 128).clamp(0, 255).floor().to(torch.uint8)


def fingerprint(kind: str, state: Mapping[str, Tensor], settings: str = "") -> str:
    """`kind:` and a SHA-256 over settings and over names, shapes and values: equal exactly for equal codecs."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(state):
        value = state[name].detach().float().contiguous().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return f"{kind}:{digest.hexdigest()}"


class Frozen(Generic[M]):
    """A trained network that is only called: without dropout, without gradients."""

    def __init__(self, model: M) -> None:
        self.model: M = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Self:
        self.model.to(device)
        return self


def with_weights(make: Callable[[], M], state: Mapping[str, Tensor], path: Path) -> M:
    """The model of `make` with all its weights, which are those of the file `path`.

    Raises:
        ValueError: that names the file, if they do not fit.
    """
    try:
        model = make()
        model.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"weights: {path}: {error}") from error
    return model


def read_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: that names the file, if it is missing or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"weights: {path}; allowed: an existing safetensors file of {what}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights: {path} cannot be read as safetensors of {what}: {error}") from error


def psnr(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images in dB (10·log10(255² / mean square)), one value an image: (N,)."""
    square = (images.double() - reconstructed.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / square)
