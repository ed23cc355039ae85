"""Protocols of the parts of a tokenizer, and shared functions: pixel ranges, fingerprints, weight files, PSNR.

N batch · C latent channels · D feature channels · H, W image · h, w latent grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from sfd_scale.runtime import weight_files
from sfd_scale.runtime.matmul import allow_tf32, no_tf32

M = TypeVar("M", bound=nn.Module)
Precision = Literal["fp32", "tf32", "bf16"]
"""Precision of encoding; see `in_precision`."""


class Posterior(NamedTuple):
    """The posterior of a codec: mean (N, C, h, w), and log-variance of that shape, None if it is deterministic."""

    mean: Tensor
    logvar: Tensor | None


class TextureCodec(Protocol):
    """Encodes images to latents and decodes them."""

    @property
    def channels(self) -> int: ...

    @property
    def downsample(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, images: Tensor) -> Posterior:
        """(N, 3, H, W) uint8 → posterior (N, C, H/downsample, W/downsample) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, 3, H, W) uint8."""
        ...

    def to(self, device: torch.device) -> Self: ...


class VisionEncoder(Protocol):
    """A frozen network that computes features of images."""

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def grid(self, image_size: int) -> int:
        """Height and width of the feature grid of square images of `image_size`."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, D, h, w) float32."""
        ...

    def to(self, device: torch.device) -> Self: ...


class SemanticCodec(Protocol):
    """Encodes features to latents and decodes them."""

    @property
    def dim(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, features: Tensor) -> Posterior:
        """(N, D, h, w) → posterior (N, C, h, w) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, D, h, w) float32."""
        ...

    def to(self, device: torch.device) -> Self: ...


@contextmanager
def in_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run encoders in float32, in float32 with TF32 matmuls on GPUs as the official code, or under bf16 autocast.

    Under autocast only matmuls are in bf16; weights, norms and sums stay float32.
    """
    matmuls = {"fp32": no_tf32, "tf32": allow_tf32, "bf16": nullcontext}[precision]
    with matmuls(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


def from_uint8(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1], of the same shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[−1, 1] → uint8 by floor(127.5·x + 128), the rule of DiT and of the official code.

    Raises:
        FloatingPointError: for pixels that are not finite.
    """
    if not bool(images.isfinite().all()):
        raise FloatingPointError("decoded images are not finite; check the latents and the weights of the codec")
    return (images.float() * 127.5 + 128).clamp(0, 255).floor().to(torch.uint8)


def fingerprint(kind: str, state: Mapping[str, Tensor], settings: str = "") -> str:
    """Identity of a codec: `kind:` and a SHA-256 over its settings and the names, shapes and values of its weights."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(state):
        value = state[name].detach().float().contiguous().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return f"{kind}:{digest.hexdigest()}"


class Frozen(Generic[M]):
    """A pretrained network in eval mode, without gradients."""

    def __init__(self, model: M) -> None:
        self.model: M = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Self:
        self.model.to(device)
        return self


def with_weights(make: Callable[[], M], state: Mapping[str, Tensor], path: Path) -> M:
    """The model of `make` with the weights `state`, which were read from `path`.

    Raises:
        ValueError: if the weights do not fit the model; the message names the file.
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
        ValueError: if the file is missing or cannot be read; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"weights: {path}; allowed: an existing safetensors file of {what}")
    try:
        return weight_files.read_safetensors(path)
    except ValueError as error:
        raise ValueError(f"weights: {error}; allowed: a file of {what}") from error


def psnr(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images in dB (10·log10(255² / mean square)), one per image: (N,)."""
    square = (images.double() - reconstructed.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / square)
