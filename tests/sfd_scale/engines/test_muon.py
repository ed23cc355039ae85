"""Muon: every engine against a plain loop in one process; the maths; the plan of who computes which matrix."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfd_scale.checkpoint import CheckpointConfig, CheckpointManager
from sfd_scale.config import load
from sfd_scale.engines import muon
from sfd_scale.engines.fsdp import FSDPEngine
from sfd_scale.engines.matrix_exchange import Matrix, Range, assign_owners, plan_rounds, plan_transfers
from sfd_scale.engines.muon import MuonConfig, matrices_of, orthogonalize, update_scale
from sfd_scale.engines.optim import AdamWConfig, param_groups
from sfd_scale.models.alignment import AlignmentConfig
from sfd_scale.models.lightningdit import LightningDiT, LightningDiTConfig
from sfd_scale.models.semantic_vae import SemanticVAE, SemanticVAEConfig
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime import distributed
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import CLIP, Spec, TinyModel, batch, distance, make_ema, make_engine, params, relative, train

STEPS, SAVED = 50, 20
MUON = MuonConfig(lr=2e-3, weight_decay=0.02, adamw=AdamWConfig(lr=5e-3, betas=(0.9, 0.99), weight_decay=0.01))
SPECS = {
    "ZeRO-0": Spec("deepspeed", {"zero_stage": 0}),
    "ZeRO-1": Spec("deepspeed", {"zero_stage": 1}),
    "ZeRO-2 accumulated": Spec("deepspeed", {"zero_stage": 2}, 2),
    "ZeRO-3": Spec("deepspeed", {"zero_stage": 3, "persistent_elements": 100}),
    "FSDP2": Spec("fsdp"),
    "HSDP": Spec("fsdp", {"sharding": "hybrid", "shard_size": 2}),
    "replicate": Spec("fsdp", {"sharding": "replicate"}),
}


def newton_schulz(x: Tensor) -> Tensor:
    """The published loop for one matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


def plain(steps: int) -> dict[str, Any]:
    """Training in one process: every third of `up` and every `down` by Muon, written out, the others by AdamW."""
    model = TinyModel()
    matrices = {name: p for name, p in model.named_parameters() if name.endswith(("up.weight", "down.weight"))}
    groups = param_groups(model, MUON.adamw, lambda name: name not in matrices)
    adamw = torch.optim.AdamW(groups, lr=MUON.adamw.lr, betas=MUON.adamw.betas, eps=MUON.adamw.eps)
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    losses, norms = [], []
    for step in range(steps):
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        # The engine's learning rate is OPTIMIZER.lr of the helper, which equals MUON.lr.
        adamw.step()
        with torch.no_grad():
            for name, p in matrices.items():
                assert p.grad is not None
                momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
                update = 0.05 * p.grad + 0.95 * momenta[name]
                rows = 37
                parts = [newton_schulz(part) * 0.2 * math.sqrt(max(part.shape)) for part in update.split(rows)]
                p.mul_(1 - MUON.lr * MUON.weight_decay).sub_(MUON.lr * torch.cat(parts))
        model.zero_grad()
    return {"loss": losses, "norm": norms, "params": {n: p.detach().clone() for n, p in model.named_parameters()}}


def run(spec: Spec) -> dict[str, Any]:
    counted, original = [0], muon.orthogonalize

    def counting(x: Tensor, config: MuonConfig) -> Tensor:
        counted[0] += len(x)
        return original(x, config)

    muon.orthogonalize = counting
    try:
        engine = make_engine(spec, optimizer=MUON)
        out = train(engine, make_ema(engine), range(STEPS), spec.grad_accum_steps)
    finally:
        muon.orthogonalize = original
    computed = distributed.all_gather_object(counted[0])
    state = sum(t.numel() for f in engine.fragments() for t in (f.param, f.exp_avg, f.exp_avg_sq) if t is not None)
    result = {
        **out,
        "params": params(engine),
        "computed": computed,
        "elements": sum(distributed.all_gather_object(state)),
    }
    engine.close()
    return result


def run_all(names: list[str]) -> dict[str, Any]:
    logging.disable(logging.INFO)
    return {name: run(SPECS[name]) for name in names}


def saved_and_resumed(root: str, by: list[str], to: list[str]) -> dict[str, float]:
    """Each engine of `by` saves at SAVED and trains 5 steps on; each of `to` loads that and trains 5 steps."""
    logging.disable(logging.INFO)
    steps, found = range(SAVED, SAVED + 5), {}
    for saver in by:
        engine = make_engine(SPECS[saver], optimizer=MUON)
        ema = make_ema(engine)
        train(engine, ema, range(SAVED))
        checkpoints = CheckpointManager(Path(root, saver), CheckpointConfig(background=False))
        checkpoints.save(SAVED, engine, ema, {})
        train(engine, ema, steps)
        expected = params(engine)
        engine.close()
        for loader in to:
            engine = make_engine(SPECS[loader], TinyModel(seed=9), MUON)
            ema = make_ema(engine)
            latest = checkpoints.latest()
            assert latest is not None
            checkpoints.load(latest, engine, ema)
            train(engine, ema, steps)
            found[f"{saver} → {loader}"] = distance(params(engine), expected)
            engine.close()
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return plain(STEPS)


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(run_all, 2, list(SPECS), timeout=240)[0]


def agrees(result: dict[str, Any], reference: dict[str, Any]) -> None:
    assert relative(result["loss"], reference["loss"]) < 1e-6
    assert relative(result["norm"], reference["norm"]) < 1e-5
    assert distance(result["params"], reference["params"]) < 1e-4
    # Three thirds of `up` and `down`, in each of three blocks: each computed once, on one rank.
    assert sum(result["computed"]) == STEPS * 3 * 4
    assert min(result["computed"]) > 0, "every rank owns some"


@pytest.mark.parametrize("name", SPECS)
def test_two_ranks_train_as_a_plain_loop(name: str, two: dict[str, Any], reference: dict[str, Any]) -> None:
    assert min(reference["norm"]) > CLIP, "clipping must be active"
    agrees(two[name], reference)


def test_a_matrix_has_eight_bytes_a_weight_of_state(two: dict[str, Any]) -> None:
    model = TinyModel()
    matrices = sum(3 * 37 * 37 for _ in range(6))
    others = sum(p.numel() for p in model.parameters()) - matrices
    for name in ("ZeRO-1", "ZeRO-3", "FSDP2"):
        assert two[name]["elements"] == 2 * matrices + 3 * others, name


def test_a_checkpoint_moves_between_engines(tmp_path: Path) -> None:
    names = ["ZeRO-1", "ZeRO-3", "FSDP2", "replicate"]
    found = run_ranks(saved_and_resumed, 2, str(tmp_path), ["ZeRO-1", "FSDP2"], names, timeout=240)[0]
    assert len(found) == 8 and max(found.values()) < 1e-5
    assert found["ZeRO-1 → ZeRO-1"] == found["FSDP2 → FSDP2"] == 0


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 4])
def test_other_world_sizes_train_as_a_plain_loop(ranks: int, reference: dict[str, Any]) -> None:
    names = [name for name in SPECS if ranks > 1 or name != "HSDP"]
    result = run_ranks(run_all, ranks, names, timeout=600)[0]
    for name in names:
        agrees(result[name], reference)


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    spectrum = torch.logspace(-2, 0, min(shape))
    x = (u * spectrum) @ v
    for name, iterations, low, high in (("newton_schulz", 5, 0.67, 1.21), ("polar_express", 6, 0.95, 1.02)):
        config = MuonConfig(orthogonalization=name, iterations=iterations)  # type: ignore[arg-type]
        found = orthogonalize(x[None], config)[0]
        values = torch.linalg.svdvals(found)
        assert low < values.min() and values.max() < high, (name, values.min(), values.max())
        # The singular vectors stay: the result is the polar factor, up to its singular values.
        inner = u.T @ found @ v.T
        assert (inner - inner.diag().diag()).abs().max() < 2e-3


def test_update_scales_are_the_published_rules() -> None:
    assert update_scale(MuonConfig(), 100, 400) == pytest.approx(0.2 * 20)
    assert update_scale(MuonConfig(scale="original"), 100, 400) == 1.0
    assert update_scale(MuonConfig(scale="original"), 400, 100) == 2.0
    # match_rms_adamw: the RMS of a scaled orthogonal matrix is 0.2.
    u = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(1)))[0]
    assert (u * update_scale(MuonConfig(), 300, 300)).square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize(
    "split,counts", [("none", (1, 1, 1, 1, 1)), ("matrices", (3, 1, 2, 1, 6)), ("heads", (12, 1, 2, 1, 6))]
)
def test_a_model_says_what_its_matrices_are(split: Any, counts: tuple[int, ...]) -> None:
    config = LightningDiTConfig(depth=2, width=32, heads=4, alignment=AlignmentConfig(depth=1, hidden=24, dim=10))
    model = LightningDiT(config, in_channels=4, input_size=4, two_clocks=True)
    found = matrices_of(model, MuonConfig(split=split))
    names = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
    expected = {f"blocks.{i}.{name}.weight": count for i in range(2) for name, count in zip(names, counts, strict=True)}
    expected["repa_projector.2.weight"] = 1
    assert {name: sum(matrix.name == name for matrix in found) for name in {m.name for m in found}} == expected
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, count in expected.items():
        parts = [matrix for matrix in found if matrix.name == name]
        assert [m.offset for m in parts] == [i * shapes[name].numel() // count for i in range(count)]
        assert all((m.rows, m.columns) == (shapes[name][0] // count, shapes[name][1]) for m in parts)


@pytest.mark.parametrize("spec", [Spec("fsdp", {"precision": "bf16"}), Spec("deepspeed", {"zero_stage": 2})])
def test_a_diffusion_transformer_trains_by_it_under_both_engines(spec: Spec) -> None:
    config = LightningDiTConfig(depth=2, width=32, heads=4, num_classes=3)
    model = LightningDiT(config, in_channels=4, input_size=4, two_clocks=True)
    model.init_weights(0)
    wanted = len(matrices_of(model, MUON))
    assert wanted == 2 * (3 + 1 + 2 + 1 + 6)
    engine = make_engine(spec, model, MUON)
    before = params(engine)
    optimizer = engine.optimizer if isinstance(engine, FSDPEngine) else engine._client  # type: ignore[attr-defined]
    assert len(optimizer.matrices) == wanted
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 4, 4, 4, generator=generator), torch.rand(4, generator=generator)
    y = torch.arange(4) % 4
    for _ in range(3):  # output layer and gates start at zero: these weights have no gradient before the third step
        engine.backward((engine.model(x, t, t, y)[0] - x).square().mean(), last=True)
        engine.step(1e-3)
    after = params(engine)
    engine.close()
    # The scaled update of a matrix has an RMS of 0.2, and less where the gradient of a few samples lacks directions.
    for name in ("blocks.1.attn.proj.weight", "blocks.0.mlp.w3.weight"):
        moved = (after[name] - before[name]).square().mean().sqrt().item() / 1e-3
        assert 0.05 < moved < 0.3, (name, moved)


def test_a_semantic_vae_names_the_matrices_of_its_blocks() -> None:
    model = SemanticVAE(SemanticVAEConfig(input_dim=24, bottleneck_dim=4, hidden_dim=16, heads=2, blocks=2))
    found = matrices_of(model, MuonConfig(split="heads"))
    # q, k and v of two heads each; the projection; both layers of the MLP: in two blocks of encoder and decoder.
    assert len(found) == 2 * 2 * (3 * 2 + 1 + 2)
    others = {name for name, _ in model.named_parameters()} - {matrix.name for matrix in found}
    ends = {f"{side}.{layer}.weight" for side in ("encoder", "decoder") for layer in (0, 4)}
    assert {name for name in others if name.endswith("weight") and "norm" not in name and ".3." not in name} == ends


def test_a_model_without_named_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.kind: muon; Linear does not say .* adamw"):
        matrices_of(nn.Linear(2, 2), MuonConfig())


@pytest.mark.parametrize(
    "spec",
    [Spec("fsdp", {"cpu_offload": True}), Spec("deepspeed", {"zero_stage": 2, "offload_optimizer": True})],
    ids=["fsdp", "deepspeed"],
)
def test_offload_is_refused_by_its_key(spec: Spec) -> None:
    refused = r"engine\.\w+: true; allowed with optimizer\.kind adamw"
    with pytest.raises(ValueError, match=refused):
        make_engine(spec, optimizer=MUON)
    with pytest.raises(ValueError, match=refused):  # before any data is read
        load(
            "train/sfd_xl_muon",
            TrainRecipe,
            [f"engine.{key}={value}" for key, value in {"kind": spec.kind, **spec.options}.items()],
        )


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(st.lists(sizes, min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 3), st.data())
def test_transfers_bring_every_element_to_its_owner_and_back_to_every_holder(
    shapes: list[tuple[int, int]], ranks: int, replicas: int, data: st.DataObject
) -> None:
    matrices = [Matrix(f"w{i}", 0, rows, columns) for i, (rows, columns) in enumerate(shapes)]
    held: list[list[Range]] = []
    for _ in range(replicas):
        group: list[list[Range]] = [[] for _ in range(ranks)]
        for matrix in matrices:
            inner = st.integers(0, matrix.elements)
            cuts = sorted(data.draw(st.lists(inner, min_size=ranks - 1, max_size=ranks - 1))) if not held else []
            bounds = [0, *cuts, matrix.elements]
            for rank in range(ranks):
                if held:
                    group[rank] += [r for r in held[rank] if r.name == matrix.name]
                elif bounds[rank] < bounds[rank + 1]:
                    group[rank].append(Range(matrix.name, bounds[rank], bounds[rank + 1]))
        held += group
    transfers = plan_transfers(matrices, held)
    owners = assign_owners(matrices, len(held))
    for index, matrix in enumerate(matrices):
        own = [t for t in transfers if t.matrix == index]
        assert {t.owner for t in own} == {owners[index]}
        sent = sorted((t.start, t.stop) for t in own if t.sends)
        assert [start for start, _ in sent] == [0, *[stop for _, stop in sent][:-1]] and sent[-1][1] == matrix.elements
        wanted = sorted((rank, r.start, r.stop) for rank, rs in enumerate(held) for r in rs if r.name == matrix.name)
        assert sorted((t.holder, t.start, t.stop) for t in own) == wanted


@given(st.lists(sizes, min_size=1, max_size=30), st.integers(1, 6))
def test_owners_are_balanced_and_rounds_bounded(shapes: list[tuple[int, int]], ranks: int) -> None:
    matrices = [Matrix(f"w{i}", 0, rows, columns) for i, (rows, columns) in enumerate(shapes)]
    owners = assign_owners(matrices, ranks)
    loads = [sum(m.cost for m, owner in zip(matrices, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) <= sum(loads) / ranks + max(m.cost for m in matrices)
    rounds = plan_rounds(matrices, owners, largest=100)
    for rank in range(ranks):
        for number in set(rounds):
            mine = [m for m, o, r in zip(matrices, owners, rounds, strict=True) if o == rank and r == number]
            assert sum(m.elements for m in mine) <= 100


def test_several_rounds_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Tensor]:
        engine = make_engine(Spec("fsdp"), optimizer=MUON)
        train(engine, make_ema(engine), range(3))
        return params(engine)

    one = trained()
    monkeypatch.setattr(plan_rounds, "__defaults__", (1500,))  # a matrix of 37 by 37 each
    assert distance(trained(), one) < 1e-6
