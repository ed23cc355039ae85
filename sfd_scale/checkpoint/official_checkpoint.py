"""Checkpoint files of the official code: torch pickles with model, ema, opt and config, or some of these.

A bare state_dict, the form in which DiT (arXiv 2212.09748) is published, is read as a file with `ema` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.layers import MlpKind, mlp_hidden, sincos_position
from sfd_scale.models.lightningdit import SIZES, LightningDiT, LightningDiTConfig, Size
from sfd_scale.models.rope import RotaryEmbedding2D
from sfd_scale.runtime.files import atomically
from sfd_scale.runtime.torch_file import LazyTensor, TorchFile, plain
from sfd_scale.runtime.weight_files import State, read_weights, strip_prefixes


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The contents of a file; None for what it lacks.

    Names of weights have no prefixes. `opt` is the state_dict of AdamW, `config` plain nested data.
    """

    model: State | None
    ema: State | None
    opt: dict[str, Any] | None
    config: dict[str, Any] | None

    @property
    def weights(self) -> State:
        """The EMA weights, from which the official code samples; without them, the raw weights."""
        state = self.model if self.ema is None else self.ema
        assert state is not None
        return state


def read_official(path: Path, optimizer: bool = False) -> OfficialCheckpoint:
    """Read an official file without executing its pickle.

    Args:
        optimizer: read the optimizer state, too.

    Raises:
        ValueError: naming the file, if it is a Git LFS pointer, truncated, or holds no weights.
    """
    file = TorchFile(path)
    content = file.content
    if isinstance(content, dict) and content and all(isinstance(value, LazyTensor) for value in content.values()):
        return OfficialCheckpoint(None, _state(file, content), None, None)
    if not isinstance(content, dict) or not ({"model", "ema"} & content.keys()):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds neither model nor ema, but: {found[:200]}")
    parts = {name: _state(file, content[name]) for name in ("model", "ema") if content.get(name)}
    if not parts:
        raise ValueError(f"{path} holds no weights: model and ema are empty")
    opt = file.load(content["opt"]) if optimizer and "opt" in content else None
    config = plain(content["config"]) if "config" in content else None
    return OfficialCheckpoint(parts.get("model"), parts.get("ema"), opt, config if isinstance(config, dict) else None)


def _state(file: TorchFile, value: Any) -> State:
    """Read a set of weights.

    Raises:
        ValueError: if it holds anything but tensors.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{file.path}: {type(value).__name__} where a set of weights should be")
    for name, item in value.items():
        if not isinstance(name, str) or not isinstance(item, LazyTensor):
            raise ValueError(f"{file.path}: {name} is no tensor, but {getattr(item, 'name', type(item).__name__)}")
    return file.load(strip_prefixes(value))


def write_official(
    path: Path,
    *,
    ema: State | None = None,
    model: State | None = None,
    opt: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write a file that the official code loads. Weights are written in float32 and contiguous.

    Raises:
        ValueError: if neither `ema` nor `model` is given.
    """
    if ema is None and model is None:
        raise ValueError("ema and model: none; allowed: at least one of them")
    parts = {"model": model, "ema": ema}
    content: dict[str, Any] = {
        name: {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
        for name, state in parts.items()
        if state is not None
    }
    content |= {name: value for name, value in (("opt", opt), ("config", config)) if value is not None}
    with atomically(path) as partial, partial.open("wb") as file:
        torch.save(content, file)


# -------------------------------------------------------------------------------------------- Adam's moments

# In the official code, the positional embedding is a parameter that is not trained but has a place in the optimizer;
# the rotary tables are buffers.
_UNTRAINED, _BUFFERS = ("pos_embed",), ("feat_rope.",)


@dataclass(frozen=True)
class AdamMoments:
    """AdamW's moving averages of the gradients and of their squares, by parameter, after `steps` updates."""

    exp_avg: State
    exp_avg_sq: State
    steps: int


def read_moments(file: OfficialCheckpoint, source: str) -> AdamMoments:
    """The moments by parameter name. The optimizer state numbers the parameters in the order of the model.

    Raises:
        ValueError: if the file lacks optimizer or model, or the optimizer is of another model.
    """
    if file.opt is None or file.model is None:
        lacking = " and ".join(name for name in ("model", "opt") if getattr(file, name) is None)
        raise ValueError(
            f"{source} holds no {lacking}, which a resumed run needs; to start a new run from the weights, import them "
            "with --out and train with init_from.path"
        )
    if not isinstance(file.opt, dict) or not {"state", "param_groups"} <= file.opt.keys():
        raise ValueError(f"{source}: opt is not the state of a torch optimizer (state and param_groups)")
    numbers = [number for group in file.opt["param_groups"] for number in group["params"]]
    counted = [name for name in file.model if not name.startswith(_BUFFERS)]
    trained = [name for name in counted if name not in _UNTRAINED]
    names = next((names for names in (counted, trained) if len(names) == len(numbers)), None)
    if names is None:
        raise ValueError(f"{source}: its optimizer has {len(numbers)} parameters, its model {len(counted)}")
    states = {name: file.opt["state"].get(number) for name, number in zip(names, numbers, strict=True)}
    missing = [name for name in trained if states[name] is None or "exp_avg_sq" not in states[name]]
    if missing:
        raise ValueError(f"{source}: its optimizer has no moments of {_listed(missing)}")
    first, second = ({name: states[name][key].float() for name in trained} for key in ("exp_avg", "exp_avg_sq"))
    other = [n for n in trained if not first[n].shape == second[n].shape == file.model[n].shape]
    if other:
        raise ValueError(f"{source}: its optimizer's moments have other shapes than {_listed(other)}")
    counts = {int(states[name]["step"]) for name in trained}
    if len(counts) != 1:
        raise ValueError(f"{source}: its optimizer has updated some parameters {min(counts)} times, some {max(counts)}")
    return AdamMoments(first, second, counts.pop())


def optimizer_state(names: Iterable[str], moments: AdamMoments, config: AdamWConfig) -> dict[str, Any]:
    """The state_dict of the official code's AdamW; the inverse of `read_moments`.

    Args:
        names: the keys of the model's state_dict, in order.
    """
    counted = [name for name in names if not name.startswith(_BUFFERS)]
    # An optimizer of this torch release, so that the group has all keys that the release knows, with its defaults.
    optimizer = torch.optim.AdamW(
        [torch.empty(0) for _ in counted], lr=config.lr, betas=config.betas, eps=config.eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    (group,) = optimizer.state_dict()["param_groups"]
    state = {
        number: {
            "step": torch.tensor(float(moments.steps)),
            "exp_avg": moments.exp_avg[name],
            "exp_avg_sq": moments.exp_avg_sq[name],
        }
        for number, name in enumerate(counted)
        if name not in _UNTRAINED and moments.steps
    }
    return {"state": state, "param_groups": [group]}


# ---------------------------------------------------------------------------------------- LightningDiT


class Architecture(NamedTuple):
    """The arguments of a LightningDiT."""

    config: LightningDiTConfig
    in_channels: int
    input_size: int
    two_clocks: bool

    def build(self) -> LightningDiT:
        return LightningDiT(
            self.config, in_channels=self.in_channels, input_size=self.input_size, two_clocks=self.two_clocks
        )


def infer_architecture(state: Mapping[str, Tensor], alignment_depth: int = 2, heads: int | None = None) -> Architecture:
    """Infer the settings of a LightningDiT or DiT from the shapes of its weights.

    Args:
        alignment_depth: the block that the alignment head reads. It leaves no trace in the shapes.
        heads: needed if neither query norms, rotary tables nor a known size tell the number of heads.

    Raises:
        ValueError: if keys are missing that every LightningDiT has, or the number of heads cannot be told.
    """
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    missing = [name for name in (*needed, "blocks.0.adaLN_modulation.1.weight") if name not in state]
    if not {"blocks.0.mlp.w3.weight", "blocks.0.mlp.fc2.weight"} & state.keys():
        missing.append("blocks.0.mlp.w3.weight")
    if missing:
        raise ValueError(f"these are not weights of a LightningDiT: {', '.join(missing)} missing")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    blocks = {int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d{1,9}\.", name)}
    depth = len(blocks)
    if max(blocks) != depth - 1:
        raise ValueError(f"these weights lack blocks: they have {depth}, with numbers up to {max(blocks)}")
    dimensions = Size(depth, width, _heads(state, depth, width) if heads is None else heads)
    size = next((name for name, known in SIZES.items() if known == dimensions), None)
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = state["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    config = LightningDiTConfig(
        size=cast(Literal["S", "B", "L", "XL", "XXL", "1p6B"] | None, size),
        **({} if size else dimensions._asdict()),
        patch_size=patch,
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        alignment=_infer_alignment(state, alignment_depth),
        norm="rmsnorm" if "blocks.0.norm1.weight" in state else "layernorm",
        mlp="swiglu" if swiglu else "gelu",
        mlp_ratio=_mlp_ratio(hidden, width, swiglu),
        rope="feat_rope.freqs_cos" in state,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        shift=state["blocks.0.adaLN_modulation.1.weight"].shape[0] == 6 * width,
        learn_sigma=state["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels,
    )
    side = round(state["pos_embed"].shape[1] ** 0.5)
    return Architecture(config, channels, side * patch, "t_embedder_sem.mlp.0.weight" in state)


def _heads(state: Mapping[str, Tensor], depth: int, width: int) -> int:
    for name in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if name in state:
            return width // state[name].shape[-1]
    known = [size.heads for size in SIZES.values() if (size.depth, size.width) == (depth, width)]
    if not known:
        raise ValueError("the number of heads cannot be told from these weights: no q_norm and no rotary table")
    return known[0]


def _mlp_ratio(hidden: int, width: int, swiglu: bool) -> float:
    """The inverse of `layers.mlp_hidden`: a ratio that gives this number of hidden features, 4 if 4 does."""
    kind: MlpKind = "swiglu" if swiglu else "gelu"
    if mlp_hidden(kind, width) == hidden:
        return 4.0
    # mlp_hidden rounds down: half a feature more makes the result exact.
    return (hidden + 0.5) * (1.5 if swiglu else 1.0) / width


def _infer_alignment(state: Mapping[str, Tensor], depth: int) -> AlignmentConfig | None:
    if "repa_projector.0.weight" not in state or "repa_projector.4.weight" not in state:
        return None
    hidden, dim = state["repa_projector.0.weight"].shape[0], state["repa_projector.4.weight"].shape[0]
    return AlignmentConfig(depth=depth, hidden=hidden, dim=dim)


def check_weights(architecture: Architecture, state: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes with those of the model, and the fixed tables of positions by value.

    Raises:
        ValueError: listing missing, unexpected and misshapen keys, or naming a table that differs.
    """
    with torch.device("meta"):
        expected = {name: value.shape for name, value in architecture.build().state_dict().items()}
    misshapen = [
        f"{name} {tuple(state[name].shape)}, needed {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "misshapen": misshapen,
    }
    found = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
    if found:
        raise ValueError(f"{source} does not fit the model; {found}")
    for name, table in fixed_tables(architecture).items():
        if not state[name].is_meta and not torch.allclose(state[name].float(), table, rtol=0, atol=1e-3):
            raise ValueError(f"{source}: its {name} is not the fixed table of the model's positions")


def fixed_tables(architecture: Architecture) -> State:
    """The fixed tables of positions (buffers of the model), by name."""
    _, width, heads = architecture.config.dimensions
    side = architecture.input_size // architecture.config.patch_size
    tables = {"pos_embed": sincos_position(width, side)}
    if architecture.config.rope:
        rotary = RotaryEmbedding2D(width // heads, side).state_dict()
        tables |= {f"feat_rope.{name}": table for name, table in rotary.items()}
    return tables


def _listed(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def load_lightningdit(path: Path, alignment: bool = True) -> LightningDiT:
    """A LightningDiT with the weights of an official file, or of a safetensors file with the official names.

    Args:
        alignment: keep the alignment head, which sampling does not need.
    """
    state = read_weights(path) if path.suffix == ".safetensors" else read_official(path).weights
    if not alignment:
        state = {name: value for name, value in state.items() if not name.startswith("repa_projector.")}
    try:
        architecture = infer_architecture(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_weights(architecture, state, str(path))
    with torch.device("meta"):
        model = architecture.build()
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model
