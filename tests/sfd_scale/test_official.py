"""Official checkpoints become files to sample from and runs to resume, and runs become official files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from eval import generate
from eval.images.outputs import OutputsConfig
from eval.recipe import EvalRecipe
from sfd_scale import build, checkpoint, config, official, train
from sfd_scale.checkpoint.official_checkpoint import (
    AdamMoments,
    OfficialCheckpoint,
    optimizer_state,
    read_moments,
    read_official,
)
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.models.lightningdit import SIZES, LightningDiT
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.batch_split import split_batch
from sfd_scale.sample import load_for_sampling
from tests.helpers.encoded import encode_digits, tokenizer
from tests.helpers.eval_tiny import lazy
from tests.helpers.ranks import run_ranks

SAVED, STEPS, LR, DECAY, CPU = 3, 6, 1e-3, 0.9, torch.device("cpu")
ENGINES = {
    "fsdp": {"kind": "fsdp", "precision": "fp32"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1, "precision": "fp32"},
    "zero2": {"kind": "deepspeed", "zero_stage": 2, "precision": "fp32"},
    "zero3": {"kind": "deepspeed", "zero_stage": 3, "precision": "fp32"},
}


def recipe_of(folder: Path, engine: str = "fsdp", **changes: Any) -> TrainRecipe:
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "kind": "lightningdit", "depth": 3, "width": 32, "heads": 2, "num_classes": 10,
            "alignment": {"depth": 2, "hidden": 16, "dim": 6},
        },
        "objective": {"kind": "semantic_first"},
        "data": {"path": str(folder / "data")},
        "train": {"steps": STEPS, "global_batch": 4, "log_every": 1},
        "latents": {"texture_channels": 6, "semantic_channels": 3, "size": 8},
        "tokenizer": {"texture": {"kind": "patch_pca", "weights": str(folder / "texture.safetensors")}},
        "optimizer": {"lr": LR},
        "ema": {"decay": DECAY},
        "engine": ENGINES[engine],
        "checkpoint": {"every": STEPS, "background": False},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    return config.from_dict(TrainRecipe, settings | changes)


class TheirTraining:
    """A run with torch alone, as the authors': the positional embedding is a parameter of theirs that is not trained,
    the first that their optimizer counts."""

    def __init__(self, recipe: TrainRecipe) -> None:
        model: LightningDiT = build.make_model(recipe)  # type: ignore[assignment]
        for parameter in model.parameters():  # blocks and output start at zero: give the gradients somewhere to go
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        self.model, self.recipe = model, recipe
        frozen = nn.Parameter(model.pos_embed.clone(), requires_grad=False)
        self.optimizer = torch.optim.AdamW([frozen, *model.parameters()], lr=LR, weight_decay=0)
        self.average = {name: value.clone() for name, value in model.state_dict().items()}
        self.losses: list[float] = []

    def steps(self, start: int, stop: int) -> None:
        recipe = self.recipe
        reader = recipe.task.make_loader(split_batch(recipe.train.global_batch, None, 1))
        objective, batches = recipe.task.make_objective(reader, CPU), reader.batches(start)
        for _ in range(start, stop):
            loss = objective(self.model, next(batches)).total
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
            for name, value in self.model.state_dict().items():
                self.average[name].mul_(DECAY).add_(value, alpha=1 - DECAY)

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def save(self, path: Path, **parts: Any) -> Path:
        whole = {
            "model": {f"module.{name}": value for name, value in self.state().items()},
            "ema": dict(self.average),
            "opt": self.optimizer.state_dict(),
            "config": OmegaConf.create({"model": {"semfirst_delta_t": 0.3, "semantic_chans": 3}}),
        }
        torch.save(whole | parts, path)
        return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authors")
    encode_digits(folder / "data", features="shards")
    tokenizer().texture.save(folder / "texture.safetensors")  # type: ignore[attr-defined]
    stats = LatentStats.load(folder / "data" / "stats.safetensors")
    for name, values in (("latents_stats", slice(0, 6)), ("latents_sv_stats", slice(6, 9))):
        shaped = {key: getattr(stats, key)[values].float().view(1, -1, 1, 1) for key in ("mean", "std")}
        torch.save(shaped, folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TheirTraining:
    """After all steps; what they were at the save is in its file."""
    run = TheirTraining(recipe_of(folder))
    run.steps(0, SAVED)
    run.save(folder / "0000003.pt")
    run.steps(SAVED, STEPS)
    return run


def distance(ours: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((value - other[name]).abs().max().item() for name, value in ours.items())


def equal(ours: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, but for the fixed tables, which their average rounds and ours leaves alone."""
    fixed = ("pos_embed", "feat_rope")
    exact = all(torch.equal(value, other[name]) for name, value in ours.items() if not name.startswith(fixed))
    return exact and all(torch.allclose(value, other[name], atol=1e-6) for name, value in ours.items())


# ---------------------------------------------------------------------------------------------- training


def go_on(folder: str, engines: list[str]) -> dict[str, Any]:
    """Import a run for each engine, and train it to the end by what `sfd train` calls; last, one without moments."""
    logging.disable(logging.INFO)
    out = {}
    for engine in (*engines, "forgetful"):
        recipe = recipe_of(Path(folder), engine if engine in ENGINES else "fsdp")
        run, file = Path(folder, f"run-{engine}-{engines[0]}"), Path(folder, "0000003.pt")
        saved = official.import_run(file, run, recipe)
        assert saved.path.name == "step-00000003"
        if engine == "forgetful":
            params, average = (saved.weights(name) for name in ("params", "ema"))
            zeros = {name: torch.zeros_like(value) for name, value in params.items()}
            parts = {"model": params, "ema": average, "optim.exp_avg": zeros, "optim.exp_avg_sq": zeros}
            manager = checkpoint.CheckpointManager(run / "checkpoints", recipe.checkpoint)
            manager.save_whole(SAVED, parts, SAVED, saved.state)
        assert train.train(recipe, run)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        end = run / "checkpoints" / f"step-{STEPS:08d}"
        out[engine] = {"losses": [row["loss"] for row in rows], "steps": [row["step"] for row in rows]}
        for part in ("params", "ema", "exp_avg", "exp_avg_sq"):
            out[engine][part] = checkpoint.load_weights(end, part)  # type: ignore[arg-type]
    return out


def compare(theirs: TheirTraining, results: dict[str, Any], moments: AdamMoments) -> None:
    """A run that has lost the moments on the way would be noticed."""
    assert distance(results.pop("forgetful")["params"], theirs.state()) > 1e-4
    for engine, result in results.items():
        assert result["steps"] == [4, 5, 6], engine
        assert result["losses"] == pytest.approx(theirs.losses[SAVED:], rel=1e-6), engine
        assert distance(result["params"], theirs.state()) < 1e-6, engine
        assert distance(result["ema"], theirs.average) < 1e-6, engine
        for part in ("exp_avg", "exp_avg_sq"):
            assert distance(result[part], getattr(moments, part)) < 1e-7, (engine, part)


def test_their_training_goes_on_here_as_it_would_there(folder: Path, theirs: TheirTraining) -> None:
    moments = read_moments(read_official(theirs.save(folder / "end.pt"), optimizer=True), "end.pt")
    assert moments.steps == STEPS
    compare(theirs, run_ranks(go_on, 1, str(folder), ["fsdp", "zero1"], timeout=400)[0], moments)


@pytest.mark.full
def test_it_goes_on_under_each_engine(folder: Path, theirs: TheirTraining) -> None:
    moments = read_moments(read_official(theirs.save(folder / "end.pt"), optimizer=True), "end.pt")
    compare(theirs, run_ranks(go_on, 1, str(folder), ["zero2", "zero3"], timeout=400)[0], moments)


def test_the_way_back_is_the_file_that_came(folder: Path, theirs: TheirTraining, tmp_path: Path) -> None:
    file, recipe = folder / "0000003.pt", recipe_of(folder)
    official.import_run(file, tmp_path / "run", recipe)
    official.export_official(tmp_path / "run", tmp_path / "back.pt")
    first, second = read_official(file, optimizer=True), torch.load(tmp_path / "back.pt", weights_only=True)
    for part in ("model", "ema"):
        assert list(second[part]) == list(getattr(first, part))
        assert equal(second[part], getattr(first, part)), part
    assert second["config"]["model"]["semfirst_delta_t"] == 0.3
    # Their optimizer takes its own state back, and it is the one that it gave.
    again = TheirTraining(recipe)
    again.optimizer.load_state_dict(second["opt"])
    assert first.opt is not None
    for number, state in first.opt["state"].items():
        assert all(torch.equal(second["opt"]["state"][number][key], value) for key, value in state.items()), number
    assert second["opt"]["state"].keys() == first.opt["state"].keys()
    assert second["opt"]["param_groups"][0]["params"] == first.opt["param_groups"][0]["params"]
    # And a file of weights alone.
    official.import_weights(file, tmp_path / "x.safetensors", recipe)
    official.export_official(tmp_path / "x.safetensors", tmp_path / "ema.pt")
    alone = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert "opt" not in alone and "model" not in alone
    assert first.ema is not None and equal(alone["ema"], first.ema)


def test_a_file_of_weights_alone_is_where_a_run_starts(folder: Path, theirs: TheirTraining, tmp_path: Path) -> None:
    recipe = recipe_of(folder)
    torch.save({"ema": theirs.average}, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match="ema.pt holds no model and opt, .* train with init_from.path"):
        official.import_run(tmp_path / "ema.pt", tmp_path / "run", recipe)
    out = official.import_weights(tmp_path / "ema.pt", tmp_path / "x.safetensors", recipe)
    start = checkpoint.start_weights(out, "ema", build.make_model(recipe))
    assert distance(start, theirs.average) == 0
    official.import_run(folder / "0000003.pt", tmp_path / "run", recipe)
    with pytest.raises(ValueError, match="has a run already"):
        official.import_run(folder / "0000003.pt", tmp_path / "run", recipe)


# ------------------------------------------------------------------------------------------- evaluation


def test_an_imported_file_is_evaluated(folder: Path, theirs: TheirTraining, tmp_path: Path) -> None:
    """Statistics from the two official files; the model is the file's EMA; images are those of its velocity."""
    out = tmp_path / "x.safetensors"
    stats = (folder / "latents_stats.pt", folder / "latents_sv_stats.pt")
    recipe = recipe_of(folder, data={"path": str(folder / "nowhere")})
    official.import_weights(theirs.save(tmp_path / "end.pt"), out, recipe, stats=stats)
    loaded = load_for_sampling(out, CPU)
    assert distance(dict(loaded.model.named_parameters()), theirs.average) == 0
    own = LatentStats.load(folder / "data" / "stats.safetensors")
    assert torch.allclose(loaded.stats.mean, own.mean, rtol=1e-6) and torch.allclose(
        loaded.stats.std, own.std, rtol=1e-6
    )
    settings = EvalRecipe(
        checkpoint=out, num_samples=4, batch=2, precision="fp32", outputs=OutputsConfig(grid=0), cache=tmp_path / "c"
    )
    job = generate.prepare(settings, CPU, extractor=lazy())
    generate.generate(settings, tmp_path / "samples", job)
    drawn = job.sampler.images([0, 1], job.labels[:2])
    assert drawn.images.shape == (2, 3, 32, 32) and len(drawn.images.unique()) > 10


def test_without_statistics_a_file_holds_weights_alone(
    folder: Path, theirs: TheirTraining, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = recipe_of(folder, data={"path": str(folder / "nowhere")}), tmp_path / "x.safetensors"
    official.import_weights(folder / "0000003.pt", out, recipe, weights="params")
    assert "no latent statistics" in caplog.text
    assert distance(checkpoint.load_weights(out), read_official(folder / "0000003.pt").model or {}) == 0
    with pytest.raises(ValueError, match="it has no latent statistics; import it again with --stats"):
        load_for_sampling(out, CPU)


def test_a_file_without_a_head_is_sampled_from_but_not_trained_on(
    folder: Path, theirs: TheirTraining, tmp_path: Path
) -> None:
    bare = {name: value for name, value in theirs.average.items() if not name.startswith("repa_projector")}
    torch.save({"ema": bare}, tmp_path / "bare.pt")
    official.import_weights(tmp_path / "bare.pt", tmp_path / "x.safetensors", recipe_of(folder))
    assert load_for_sampling(tmp_path / "x.safetensors", CPU).model.repa_projector is None
    file = theirs.save(tmp_path / "headless.pt", ema=bare)
    with pytest.raises(ValueError, match="missing: repa_projector.0.weight"):
        official.import_run(file, tmp_path / "run", recipe_of(folder))


@pytest.mark.parametrize("size", SIZES)
def test_a_file_names_its_size(size: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All six sizes, by the shapes alone: such a file would take gigabytes."""
    with torch.device("meta"):
        made = config.load("train/sfd_xl", TrainRecipe, [f"model.size={size}"])
        state = made.task.make_model().state_dict()
    monkeypatch.setattr(official, "read_official", lambda file: OfficialCheckpoint(None, state, None, None))
    recipe = official.recipe_for(tmp_path / "x.pt", None, ["seed=3"])
    assert recipe.model.size == size and recipe.seed == 3  # type: ignore[union-attr]
    other = config.load("train/sfd_xl", TrainRecipe, [f"model.size={'S' if size != 'S' else 'L'}"])
    with pytest.raises(ValueError, match=f"The file's model is {size}, the recipe's {'S' if size != 'S' else 'L'}"):
        official.import_weights(tmp_path / "x.pt", tmp_path / "o.safetensors", other)


# --------------------------------------------------------------------------------------------- messages


def test_what_does_not_fit_is_named(folder: Path, theirs: TheirTraining, tmp_path: Path) -> None:
    recipe, out = recipe_of(folder), tmp_path / "x.safetensors"
    state = theirs.state()
    wrong = {**state, "extra": torch.zeros(1), "final_layer.linear.bias": torch.zeros(2)}
    del wrong["blocks.0.norm1.weight"]
    moved = {**state, "pos_embed": state["pos_embed"].flip(1)}
    cases = [
        (
            recipe,
            {"ema": wrong},
            "missing: blocks.0.norm1.weight; unexpected: extra; misshapen: final_layer.linear.bias",
        ),
        (recipe, {"ema": moved}, "its pos_embed is not the fixed table"),
        (recipe_of(folder, schedule={"delta_t": 0.5}), {}, "schedule.delta_t: 0.5, but .* semfirst_delta_t 0.3"),
        (recipe_of(folder, schedule={"delta_t": 0.0}), {"config": {}}, "missing: t_embedder.mlp.0.weight"),
        (recipe, {"ema": None}, "--weights: ema, but .* holds none; allowed: params"),
    ]
    for settings, parts, message in cases:
        with pytest.raises(ValueError, match=message):
            official.import_weights(theirs.save(tmp_path / "a.pt", **parts), out, settings)
    pair = (folder / "latents_stats.pt", folder / "latents_sv_stats.pt")
    for stats, message in (
        (pair[:1], "alone; allowed: both official files"),
        (pair[:1] * 2, r"latents_stats\.pt: 6 channels; allowed here: 3 \(give texture first\)"),
        (pair[::-1], r"latents_sv_stats\.pt: 3 channels; allowed here: 6 \(give texture first\)"),
        (pair * 2, "--stats: 4 files"),
        ((tmp_path / "no.safetensors",), "no.safetensors; allowed: an existing file"),
    ):
        with pytest.raises(ValueError, match=message):
            official.import_weights(folder / "0000003.pt", out, recipe, stats=stats)
    assert not out.exists()


def test_an_optimizer_that_is_not_of_the_model_is_refused(folder: Path, theirs: TheirTraining, tmp_path: Path) -> None:
    whole = theirs.optimizer.state_dict()
    (group,), states = whole["param_groups"], whole["state"]
    fewer = {"state": states, "param_groups": [{**group, "params": group["params"][:-3]}]}
    lost = {"state": {n: s for n, s in states.items() if n != 4}, "param_groups": [group]}
    shifted = {"state": {n: states[n % len(states) + 1] for n in states}, "param_groups": [group]}
    late = {"state": {**states, 2: {**states[2], "step": torch.tensor(2.0)}}, "param_groups": [group]}
    for opt, message in (
        (fewer, "its optimizer has .* parameters, its model"),
        (lost, "no moments of t_embedder_sem.mlp.0.bias"),
        (shifted, "moments have other shapes than"),
        (late, "updated some parameters 2 times, some 6"),
        ([1], "opt is not the state of a torch optimizer"),
    ):
        file = theirs.save(tmp_path / "a.pt", opt=opt)
        with pytest.raises(ValueError, match=message):
            official.import_run(file, tmp_path / "run", recipe_of(folder))
    del whole
    with pytest.raises(ValueError, match="holds no opt, which a resumed run needs"):
        read_moments(read_official(file), "a.pt")
    assert not (tmp_path / "run").exists()


def test_optimizers_of_trained_parameters_alone_are_read_too(theirs: TheirTraining, tmp_path: Path) -> None:
    names = [name for name in theirs.state() if not name.startswith(("pos_embed", "feat_rope"))]
    plain = torch.optim.AdamW(theirs.model.parameters(), lr=LR)
    plain.load_state_dict(
        {
            "state": {n - 1: s for n, s in theirs.optimizer.state_dict()["state"].items()},
            "param_groups": plain.state_dict()["param_groups"],
        }
    )
    files = [theirs.save(tmp_path / f"{n}.pt", opt=o.state_dict()) for n, o in enumerate((theirs.optimizer, plain))]
    first, second = (read_moments(read_official(file, optimizer=True), "x") for file in files)
    assert list(first.exp_avg) == list(second.exp_avg) == names
    assert all(torch.equal(first.exp_avg[name], second.exp_avg[name]) for name in names)
    back = optimizer_state(theirs.state(), first, AdamWConfig(lr=LR))
    assert back["state"].keys() == theirs.optimizer.state_dict()["state"].keys()
