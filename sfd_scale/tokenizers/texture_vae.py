"""The texture VAE: diffusers' AutoencoderKL with the architecture of "SD-VAE f16d32" and VA-VAE (arXiv 2112.10752,
2501.01423).

Pretrained weights are a diffusers folder, a safetensors file, or a checkpoint of the latent diffusion code (LDM), whose
names are converted.

N batch · C latent channels · H, W image · h, w latent grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from sfd_scale.runtime.limits import download
from sfd_scale.runtime.settings import at_least
from sfd_scale.runtime.weight_files import read_weights
from sfd_scale.tokenizers.protocols import Frozen, Posterior, fingerprint, from_uint8, to_uint8

# The weights of the autoencoder in an LDM checkpoint, which also contains discriminators and frozen networks.
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Either `weights` or `hub` is needed.

    weights: a diffusers folder, or a file. A folder has its own architecture; a file has the one that is set here.
    hub: the same on the Hugging Face hub, as owner/repository or owner/repository/file.
    multipliers: one per level, of `width`. Every level but the first halves the grid. The last level has attention
        after its residual blocks.
    """

    kind: Literal["autoencoder_kl"] = "autoencoder_kl"
    weights: Path | None = None
    hub: str | None = None
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 32

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.hub is None):
            raise ValueError("weights: set either weights, a path, or hub, a name on the hub")
        if self.hub is not None and self.hub.count("/") < 1:
            raise ValueError(f"hub: {self.hub!r}; allowed: owner/repository, or owner/repository/file")
        at_least(self, width=1, res_blocks=1, latent_channels=1)
        if self.width % 32:
            raise ValueError(f"width: {self.width}; allowed: multiples of 32, the number of groups of its norms")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers: {self.multipliers}; allowed: one or more whole numbers, 1 and up")


class AutoencoderKLCodec(Frozen[Any]):
    """A frozen AutoencoderKL. Latents are posterior means without a scaling factor."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.channels: int = model.config.latent_channels
        self.downsample = 2 ** (len(model.config.block_out_channels) - 1)
        self.fingerprint = fingerprint("autoencoder_kl", model.state_dict())

    @classmethod
    def load(cls, config: AutoencoderKLConfig) -> Self:
        """Build the model and load all its weights.

        Raises:
            ValueError: if a file cannot be downloaded or read, or does not fit; the message names it.
        """
        weights = _from_hub(config.hub) if config.hub is not None else config.weights
        assert weights is not None
        if weights.is_dir():
            return cls(_from_folder(weights))
        state = read_weights(weights, _PARTS)
        model = build(config)
        try:
            if any(name.startswith("encoder.down.") for name in state):
                state = from_ldm(state, model.state_dict())
            model.load_state_dict(state)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"weights: {weights} do not fit tokenizer.texture: {error}") from error
        return cls(model)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """(N, 3, H, W) uint8 → posterior (N, C, h, w) float32."""
        posterior = self.model.encode(from_uint8(images)).latent_dist
        return Posterior(posterior.mean, posterior.logvar)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) → (N, 3, H, W) uint8."""
        return to_uint8(self.model.decode(latents.float()).sample)


def _from_hub(name: str) -> Path:
    """Path in the hub's cache of a downloaded file, or of a repository's folder with the files that diffusers needs."""
    import huggingface_hub

    owner, repository, *file = name.split("/")

    def get() -> str:
        if file:
            return huggingface_hub.hf_hub_download(f"{owner}/{repository}", "/".join(file))
        wanted = ["config.json", "diffusion_pytorch_model.safetensors"]
        return huggingface_hub.snapshot_download(f"{owner}/{repository}", allow_patterns=wanted)

    try:
        return Path(download(f"hub: {name}", get))
    except TimeoutError as error:
        raise ValueError(str(error)) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"hub: {name} cannot be downloaded ({error}); set weights to a local copy") from error


def _from_folder(folder: Path) -> Any:
    import diffusers

    try:
        return diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"weights: {folder} is not a folder of a diffusers AutoencoderKL: {error}") from error


def build(config: AutoencoderKLConfig) -> Any:
    """diffusers' model with random weights. The last level has attention, as LDM's `attn_resolutions: [16]`."""
    import diffusers

    plain = len(config.multipliers) - 1
    return diffusers.AutoencoderKL(
        down_block_types=(*["DownEncoderBlock2D"] * plain, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * plain),
        block_out_channels=tuple(config.width * factor for factor in config.multipliers),
        layers_per_block=config.res_blocks,
        latent_channels=config.latent_channels,
        scaling_factor=1.0,
    )


# Regular expressions from diffusers' names to LDM's, applied in this order.
_RENAMES = [
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.attentions\.", r"down.\1.attn."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.attentions\.", r"up.\1.attn."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"group_norm\.", "norm."),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0\.", "proj_out."),
]


def ldm_name(name: str, levels: int) -> str:
    """LDM's name of a diffusers weight. LDM counts the decoder's levels from the image, diffusers from the latent."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"(decoder\.up\.)(\d+)", lambda found: f"{found[1]}{levels - 1 - int(found[2])}", name)


def from_ldm(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename LDM's weights to diffusers' names, and turn the 1x1 convolutions of attention into linear layers.

    Raises:
        ValueError: if weights are missing or unexpected.
    """
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    names = {ours: ldm_name(ours, levels) for ours in wanted}
    missing, left = [n for n in names.values() if n not in state], sorted(state.keys() - set(names.values()))
    if missing or left:
        raise ValueError(f"missing: {', '.join(missing[:8]) or 'none'}; unexpected: {', '.join(left[:8]) or 'none'}")
    return {
        ours: state[theirs].flatten(1) if ".attn" in theirs and state[theirs].ndim == 4 else state[theirs]
        for ours, theirs in names.items()
    }
