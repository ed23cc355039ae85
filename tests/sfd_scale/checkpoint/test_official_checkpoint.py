"""Official checkpoint files: read without executing their pickle, settings from shapes, and written back."""

from __future__ import annotations

import builtins
import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from sfd_scale.checkpoint.official_checkpoint import (
    Architecture,
    _mlp_ratio,
    check_weights,
    infer_architecture,
    load_lightningdit,
    read_official,
    write_official,
)
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.layers import MlpKind, mlp_hidden
from sfd_scale.models.lightningdit import SIZES, LightningDiT, LightningDiTConfig
from sfd_scale.runtime.torch_file import Inert, LazyTensor, TorchFile
from sfd_scale.runtime.weight_files import read_weights, strip_prefixes
from tests.helpers.golden_arrays import arrays, golden_model, relative_error, settings

MAIN = arrays("weights_main")
CONFIG = {
    "model": {"model_type": "LightningDiT-XL/1", "use_repa": True},
    "betas": [0.9, 0.999],
    "lr": 1e-4,
    "none": None,
}


def golden_optimizer() -> dict[str, Any]:
    """AdamW's state after one step of the golden model."""
    model = golden_model("main").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = arrays("inputs")
    velocity, _ = model(inputs["fwd_x"], inputs["fwd_t_tex"], inputs["fwd_t_sem"], inputs["fwd_y"])
    velocity.square().mean().backward()
    optimizer.step()
    return optimizer.state_dict()


def authors_file(path: Path, **parts: Any) -> Path:
    """What their training writes: a DDP state, an EMA state, the optimizer, and the settings as OmegaConf object."""
    whole = {
        "model": {f"module.{name}": value for name, value in MAIN.items()},
        "ema": {name: value * 0.5 for name, value in MAIN.items()},
        "opt": golden_optimizer(),
        "config": OmegaConf.create(CONFIG),
    }
    torch.save(whole | parts, path)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    path = authors_file(tmp_path / "0080000.pt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        torch.load(path, weights_only=True)  # the OmegaConf object in it, which is why there is a reader of our own
    found = read_official(path, optimizer=True)
    assert found.model is not None and found.ema is not None and found.opt is not None
    assert found.model.keys() == found.ema.keys() == MAIN.keys()
    for name, value in MAIN.items():
        assert torch.equal(found.model[name], value), name
        assert torch.equal(found.ema[name], value * 0.5), name
    assert found.config == CONFIG
    expected = golden_optimizer()
    assert found.opt["param_groups"] == expected["param_groups"]
    for index, moments in expected["state"].items():
        assert all(torch.equal(found.opt["state"][index][name], value) for name, value in moments.items()), index
    assert read_official(path).opt is None
    assert found.weights is found.ema


def test_tensors_of_all_kinds(tmp_path: Path) -> None:
    """Shared storages, views, transposed, empty, 0-d, parameters, and each dtype, as torch.load reads them."""
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "base": base, "row": base[1], "turned": base.T, "step": base[::2, 1::2], "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5), "parameter": torch.nn.Parameter(base.clone()),
        "bool": torch.tensor([True, False]), "wide": base.double(), "half": base.half(), "brain": base.bfloat16(),
        "long": base.long(), "int": base.int(), "short": base.short(), "char": base.char(), "byte": base.byte(),
    }  # fmt: skip
    torch.save(saved, tmp_path / "kinds.pt")
    ours, theirs = TorchFile(tmp_path / "kinds.pt"), torch.load(tmp_path / "kinds.pt", weights_only=True)
    assert isinstance(ours.content["base"], LazyTensor)
    loaded = ours.load(ours.content)
    for name, value in theirs.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
    assert loaded["row"].data_ptr() == loaded["base"][1].data_ptr()


class Attack:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """Each of these creates a file or raises when torch.load trusts the pickle; one is tried, to show that it bites."""
    victim = tmp_path / "victim"
    code = f"open({str(victim)!r}, 'w').close()"
    attacks = {
        "system": Attack(os.system, f"touch {victim}"),
        "exec": Attack(builtins.exec, code),
        "eval": Attack(builtins.eval, code),
        "nested": Attack(getattr, Attack(__import__, "os"), "system"),
        "attribute": Attack(builtins.setattr, torch.nn.Linear, "taken", True),
    }
    for name, attack in attacks.items():
        path = tmp_path / f"{name}.pt"
        torch.save({"ema": dict(MAIN), "config": attack}, path)
        assert read_official(path).ema is not None
        torch.save({"ema": {"weight": attack, **MAIN}}, path)
        with pytest.raises(ValueError, match="weight is no tensor"):
            read_official(path)
    assert not victim.exists() and not hasattr(torch.nn.Linear, "taken")
    torch.load(tmp_path / "exec.pt", weights_only=False)  # a file made above, by this test
    assert victim.exists()


def test_unknown_objects_stay_inert(tmp_path: Path) -> None:
    thing = dataclasses.make_dataclass("Thing", ["x"])
    thing.__module__ = __name__
    globals()["Thing"] = thing
    torch.save({"a": thing(3), "path": Path("x"), "device": torch.device("cpu"), "set": {1, 2}}, tmp_path / "x.pt")
    content = TorchFile(tmp_path / "x.pt").content
    assert isinstance(content["a"], Inert) and content["a"].name == f"{__name__}.Thing"
    assert content["a"].state == {"x": 3}
    assert isinstance(content["path"], Inert) and content["path"].arguments == ("x",)


def test_ema_alone(tmp_path: Path) -> None:
    path = tmp_path / "inference.pt"
    torch.save({"ema": {f"module.{name}": value for name, value in MAIN.items()}}, path)
    found = read_official(path)
    assert (found.model, found.opt, found.config) == (None, None, None)
    inputs = arrays("inputs")
    velocity, projected = load_lightningdit(path)(
        inputs["fwd_x"], inputs["fwd_t_tex"], inputs["fwd_t_sem"], inputs["fwd_y"]
    )
    assert relative_error(velocity, arrays("out_forward")["eval"]) < 1e-5
    assert projected is not None
    bare = load_lightningdit(path, alignment=False)
    assert bare.repa_projector is None and bare.config.alignment is None


def test_the_way_back(tmp_path: Path) -> None:
    first = read_official(authors_file(tmp_path / "a.pt"), optimizer=True)
    assert first.ema is not None
    write_official(tmp_path / "b" / "b.pt", ema=first.ema, model=first.model, opt=first.opt, config=first.config)
    second = read_official(tmp_path / "b" / "b.pt", optimizer=True)
    theirs = torch.load(tmp_path / "b" / "b.pt", weights_only=True)
    for part in ("model", "ema"):
        ours: dict[str, Tensor] = getattr(second, part)
        assert list(ours) == list(getattr(first, part)) == list(theirs[part])
        for name, value in getattr(first, part).items():
            assert torch.equal(ours[name], value) and torch.equal(theirs[part][name], value), name
    assert second.config == CONFIG and theirs["opt"]["param_groups"] == first.opt["param_groups"]  # type: ignore[index]
    with pytest.raises(ValueError, match="ema and model: none"):
        write_official(tmp_path / "c.pt", config=CONFIG)


def test_written_weights_are_float32_and_own_their_storage(tmp_path: Path) -> None:
    whole = torch.arange(1000.0).reshape(10, 100)
    write_official(tmp_path / "w.pt", ema={"part": whole[:, 3].bfloat16()})
    (value,) = torch.load(tmp_path / "w.pt", weights_only=True)["ema"].values()
    assert value.dtype == torch.float32 and value.untyped_storage().nbytes() == 40


# ----------------------------------------------------------------------------------------------- messages


def test_files_that_are_something_else(tmp_path: Path) -> None:
    whole = authors_file(tmp_path / "whole.pt").read_bytes()
    cases = {
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git-LFS pointer"),
        "cut.pt": (whole[: len(whole) // 2], "is truncated: the list of its contents"),
        "empty.pt": (b"", "is empty"),
        "page.pt": (b"<html>404</html>" * 10, "is an HTML page .*404.*, not a torch checkpoint"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            read_official(tmp_path / name)
    with pytest.raises(ValueError, match="none.pt: no such file"):
        read_official(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="zip.pt is a zip file, but not of torch.save"):
        read_official(tmp_path / "zip.pt")
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/data.pkl", b"\x80\x02garbage")
    with pytest.raises(ValueError, match="bad.pt cannot be read as a checkpoint"):
        read_official(tmp_path / "bad.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt holds neither model nor ema, but: epoch"):
        read_official(tmp_path / "other.pt")
    torch.save({"ema": {}, "model": None}, tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="nothing.pt holds no weights"):
        read_official(tmp_path / "nothing.pt")


def test_a_file_with_a_damaged_tensor(tmp_path: Path) -> None:
    torch.save({"ema": {"a": torch.arange(100.0)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "short.pt", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:-4] if name.endswith("data/0") else data)
    with pytest.raises(
        ValueError, match="short.pt is truncated or damaged at tensor 0: it has 396 bytes, expected 400"
    ):
        read_official(tmp_path / "short.pt")
    raw = bytearray((tmp_path / "a.pt").read_bytes())
    raw[raw.find(torch.arange(100.0).numpy().tobytes()) + 40] ^= 1
    (tmp_path / "flipped.pt").write_bytes(raw)
    with pytest.raises(ValueError, match="flipped.pt is truncated or damaged at tensor 0: Bad CRC"):
        read_official(tmp_path / "flipped.pt")


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = dict(MAIN)
    del state["blocks.1.norm1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["final_layer.linear.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        check_weights(infer_architecture(MAIN), state, "x.pt")
    assert str(error.value) == (
        "x.pt does not fit the model; missing: blocks.1.norm1.weight; unexpected: extra.weight; "
        "misshapen: final_layer.linear.bias (5,), needed (12,)"
    )
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors does not fit the model; missing: blocks.1.norm1"):
        load_lightningdit(tmp_path / "x.safetensors")
    torch.save({"ema": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: these are not weights of a LightningDiT: pos_embed"):
        load_lightningdit(tmp_path / "other.pt")
    many = {f"x{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(ValueError, match="x0, x1, x2, x3, x4, x5, x6, x7 and 12 more"):
        check_weights(infer_architecture(MAIN), MAIN | many, "x.pt")


def test_prefixes() -> None:
    assert list(strip_prefixes({"module._orig_mod.a": 1, "b.module.c": 2})) == ["a", "b.module.c"]
    with pytest.raises(ValueError, match="a occurs twice"):
        strip_prefixes({"module.a": 1, "a": 2})


def test_weights_alone(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b.c": torch.zeros(1)}
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "lightning.ckpt")
    torch.save({"model": state, "ema": {"a": torch.zeros(2)}}, tmp_path / "both.pt")
    for name in ("x.safetensors", "bare.pt", "lightning.ckpt"):
        assert read_weights(tmp_path / name).keys() == state.keys()
        assert list(read_weights(tmp_path / name, ("b.",))) == ["b.c"]
    assert not read_weights(tmp_path / "both.pt")["a"].any()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds no state dict"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="none.safetensors: no such file"):
        read_weights(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense, not tensors")
    with pytest.raises(ValueError, match="bad.safetensors is a text file"):
        read_weights(tmp_path / "bad.safetensors")


# ---------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [1, 2])
def test_settings_follow_from_shapes(size: str, patch: int) -> None:
    config = LightningDiTConfig(size=size, patch_size=patch, alignment=AlignmentConfig())  # type: ignore[arg-type]
    wanted = Architecture(config, in_channels=48, input_size=16, two_clocks=patch == 1)
    with torch.device("meta"):
        state = wanted.build().state_dict()
    assert infer_architecture(state) == wanted
    check_weights(wanted, state, "itself")


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_any_number_of_hidden_features_has_a_ratio(kind: MlpKind) -> None:
    """Ratios are rounded down to features: one that gives a feature less would not load the file."""
    for width in (48, 384, 1152):
        for hidden in range(1, 400):
            assert mlp_hidden(kind, width, _mlp_ratio(hidden, width, kind == "swiglu")) == hidden


def test_settings_of_the_golden_models_follow_from_shapes() -> None:
    main = golden_model("main")
    found = infer_architecture(MAIN)
    assert found == Architecture(main.config, in_channels=12, input_size=8, two_clocks=True)
    assert infer_architecture(golden_model("sync/main").state_dict()).two_clocks is False
    assert infer_architecture(MAIN, alignment_depth=1).config.alignment == AlignmentConfig(depth=1, hidden=96, dim=384)
    weights = arrays("weights_variants")
    for name, authors in settings["variants"].items():
        state = {k.removeprefix(f"{name}/"): v for k, v in weights.items() if k.startswith(f"{name}/")}
        if not authors["use_qknorm"] and not authors["use_rope"]:
            with pytest.raises(ValueError, match="number of heads cannot be told"):
                infer_architecture(state)
            continue
        config = infer_architecture(state).config
        assert config.norm == ("rmsnorm" if authors["use_rmsnorm"] else "layernorm")
        assert config.learn_sigma == authors.get("learn_sigma", False)
        check_weights(infer_architecture(state), state, name)


def test_loaded_models_are_ready_to_train(tmp_path: Path) -> None:
    write_official(tmp_path / "x.pt", ema={name: value.half() for name, value in MAIN.items()})
    model = load_lightningdit(tmp_path / "x.pt")
    assert isinstance(model, LightningDiT)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
