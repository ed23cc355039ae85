"""Public measurements of training throughput, for `benchmarks/plan_check.py`: models, settings and sources.

The language models are written anew here, as far as their cost needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.models.layers import RMSNorm, SwiGLU
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.planning.hardware import GPUS, Hardware
from sfd_scale.tokenizers.texture_vae import AutoencoderKLConfig, build


class LanguageModel(nn.Module):
    """A decoder for the cost of one: (N, T) token numbers → the loss of predicting them.

    Causal attention computes half of the pairs. So every query sees the first half of the keys.
    """

    def __init__(self, width: int, depth: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, llama: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([_Decoder(width, heads, kv_heads, hidden, llama) for _ in range(depth)])
        self.norm = RMSNorm(width) if llama else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if not llama:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class _Decoder(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, llama: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.llama = heads, kv_heads, llama
        features = width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * features, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm1, self.norm2 = (RMSNorm(width) if llama else nn.LayerNorm(width) for _ in range(2))
        if llama:
            self.mlp: nn.Module = SwiGLU(width, hidden)
        else:
            up, down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
            self.mlp = nn.Sequential(up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.llama:
            q, k = _rotated(q), _rotated(k)
        k, v = (t[:, :, : t.shape[2] // 2].repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


def _rotated(x: Tensor) -> Tensor:
    angles = torch.ones(x.shape[-2:])
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * angles + torch.cat([-second, first], dim=-1) * angles).to(x.dtype)


Inputs = Callable[[int], Sequence[Tensor]]


@dataclass(frozen=True)
class Model:
    """make: builds it. inputs: its arguments for a number of samples. unit: samples of a published figure's unit."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    unit: str
    per_sample: int  # units in one sample: tokens of a sequence, or one image


def _tokens(length: int) -> Inputs:
    return lambda samples: (torch.zeros(samples, length, dtype=torch.long),)


def mpt(name: str, width: int, depth: int, heads: int, length: int) -> Model:
    make = functools.partial(LanguageModel, width, depth, heads, heads, 4 * width, 50_368, False)
    return Model(f"MPT-{name}, {length} tokens", make, _tokens(length), "tokens/s", length)


def _llama() -> Model:
    make = functools.partial(LanguageModel, 4096, 32, 32, 8, 14_336, 128_256, True)
    return Model("Llama 3 8B, 8,192 tokens", make, _tokens(8192), "tokens/s", 8192)


def _gpt2() -> Model:
    make = functools.partial(LanguageModel, 768, 12, 12, 12, 3072, 50_304, False)
    return Model("GPT-2 124M, 1,024 tokens", make, _tokens(1024), "tokens/s", 1024)


def _image_model(name: str, channels: int, side: int, **config: Any) -> Model:
    settings = LightningDiTConfig(size="XL", **config)
    make = functools.partial(LightningDiT, settings, in_channels=channels, input_size=side, two_clocks=False)

    def inputs(samples: int) -> tuple[Tensor, ...]:
        t = torch.zeros(samples)
        return torch.zeros(samples, channels, side, side), t, t, torch.zeros(samples, dtype=torch.long)

    return Model(name, make, inputs, "images/s", 1)


DIT = _image_model(
    "DiT-XL/2", 4, 32, patch_size=2, norm="layernorm", mlp="gelu", rope=False, qk_norm=False, learn_sigma=True
)
LIGHTNINGDIT = _image_model("LightningDiT-XL/1", 32, 16)
LLAMA, GPT2 = _llama(), _gpt2()


def _sd_vae() -> nn.Module:
    """The encoder of Stable Diffusion's VAE, which early DiT code runs in every training step."""
    name = "stabilityai/sd-vae-ft-ema"
    config = AutoencoderKLConfig(hub=name, width=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=4)
    encoder: nn.Module = build(config).encoder
    return encoder


SD_VAE = Model("SD-VAE encoder", _sd_vae, lambda samples: (torch.zeros(samples, 3, 256, 256),), "images/s", 1)


def _mpt_1b(length: int) -> Model:
    return mpt("1b", 2048, 24, 16, length)


def _mpt_3b(length: int) -> Model:
    return mpt("3b", 2560, 32, 20, length)


def _mpt_7b(length: int) -> Model:
    return mpt("7b", 4096, 32, 32, length)


def _mpt_13b(length: int) -> Model:
    return mpt("13b", 5120, 40, 40, length)


# Published numbers of parameters, without learned positions, which these models lack.
LANGUAGE_MODELS = {LLAMA: 8.03e9, GPT2: 124.4e6 - 1024 * 768}


@dataclass(frozen=True)
class Case:
    """A published throughput of one GPU.

    fits: the constants of the time model may be fitted to it; the others are held out.
    encoder: a frozen network that runs forward beside the model, with TF32 convolutions.
    """

    model: Model
    gpu: str
    hardware: Hardware
    ranks: int
    micro_batch: int
    accumulation: int
    engine: FSDPConfig
    published: float
    source: str
    fits: bool = False
    precision: str = "bf16"
    fused_attention: bool = True
    encoder: Model | None = None
    note: str = ""


EAGER = FSDPConfig(reshard_after_forward=True)
COMPILED = replace(EAGER, compile=True)
BLOCK = replace(EAGER, activation_checkpointing="block")
SELECTIVE = replace(EAGER, activation_checkpointing="selective")
DDP = FSDPConfig(sharding="replicate", reshard_after_forward=False)
_MPT = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
_TITAN = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
_TITAN_NOTE = "its selective checkpointing repeats every second matmul, ours none; 500 W GPUs"
H100, H800, A100, A100_40 = (GPUS[name] for name in ("h100", "h800", "a100", "a100-40g"))
TITAN_H100 = replace(H100, bandwidth=2.4e12, memory=96e9)
ROCE = replace(A100_40, network=25e9)  # 1,600 Gb/s for a node

CASES = (
    Case(_mpt_1b(2048), "H100", H100, 8, 14, 1, EAGER, 45_455, _MPT, fits=True),
    Case(_mpt_1b(2048), "H100", H100, 64, 20, 1, EAGER, 44_402, _MPT),
    Case(_mpt_3b(1024), "H100", H100, 8, 20, 6, EAGER, 27_046, _MPT, fits=True),
    Case(_mpt_3b(2048), "H100", H100, 64, 6, 3, EAGER, 22_525, _MPT),
    Case(_mpt_7b(1024), "H100", H100, 8, 64, 2, BLOCK, 10_203, _MPT, fits=True),
    Case(_mpt_7b(2048), "H100", H100, 8, 6, 1, EAGER, 10_643, _MPT),
    Case(_mpt_13b(2048), "H100", H100, 8, 2, 1, EAGER, 4_792, _MPT, fits=True),
    Case(_mpt_13b(2048), "H100", H100, 64, 2, 1, EAGER, 4_800, _MPT),
    Case(_mpt_1b(512), "A100", A100, 8, 56, 4, EAGER, 23_148, _MPT, fits=True),
    Case(mpt("350m", 1024, 24, 16, 1024), "A100", A100, 8, 64, 2, EAGER, 64_813, _MPT),
    Case(_mpt_7b(1024), "A100", A100, 8, 64, 2, BLOCK, 4_357, _MPT, fits=True),
    Case(_mpt_7b(2048), "A100", A100, 8, 6, 2, EAGER, 4_641, _MPT),
    Case(_mpt_13b(2048), "A100 40 GB", ROCE, 16, 10, 1, BLOCK, 1_993, _MPT, fits=True),
    Case(_mpt_3b(2048), "A100 40 GB", ROCE, 128, 6, 1, EAGER, 9_538, _MPT),
    Case(LLAMA, "H100, 2.4 TB/s", TITAN_H100, 8, 2, 1, SELECTIVE, 5_762, _TITAN, fits=True, note=_TITAN_NOTE),
    Case(LLAMA, "H100, 2.4 TB/s", TITAN_H100, 8, 2, 1, replace(SELECTIVE, compile=True), 6_667, _TITAN,
         note=_TITAN_NOTE),
    Case(LLAMA, "H100, 2.4 TB/s", TITAN_H100, 128, 2, 1, replace(SELECTIVE, compile=True), 6_514, _TITAN,
         note=_TITAN_NOTE),
    Case(GPT2, "A100", A100, 8, 12, 5, replace(DDP, compile=True), 5 * 12 * 1024 / 0.562,
         "github.com/karpathy/nanoGPT, issue 110"),
    Case(DIT, "H800", H800, 8, 128, 1, DDP, 1.3 * 128, "github.com/NUS-HPC-AI-Lab/VideoSys, table of DiT's speed",
         fits=True, encoder=SD_VAE, note="the step encodes images by the VAE in fp32"),
    Case(DIT, "H800", H800, 8, 128, 1, DDP, 175.0, "Open-Sora, docs/acceleration.md (OpenDiT)", encoder=SD_VAE,
         note="the step encodes images by the VAE in fp32"),
    Case(DIT, "A100", A100, 1, 128, 1, replace(DDP, activation_checkpointing="block"), 0.84 * 128,
         "github.com/chuanyangjin/fast-DiT, README", fits=True),
    Case(DIT, "A100, TF32", A100, 8, 32, 1, replace(DDP, precision="fp32"), 0.81 * 32,
         "github.com/facebookresearch/DiT, issue 22", precision="tf32", fused_attention=False, encoder=SD_VAE,
         note="attention without a fused kernel; the step encodes images by the VAE"),
    Case(LIGHTNINGDIT, "H800", H800, 8, 128, 1, DDP, 285.0, "LightningDiT (arXiv 2501.01423), from its training time"),
    Case(LIGHTNINGDIT, "H800", H800, 8, 128, 1, DDP, 165.0, "LightningDiT, its training log",
         note="1.7 times slower than the other figure of the same code"),
)  # fmt: skip
