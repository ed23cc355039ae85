"""Averages with power-function profiles, and the average of any length made from them after training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sfd_scale.checkpoint import CheckpointConfig, CheckpointManager, power_averages, reconstruct
from sfd_scale.checkpoint.posthoc import coefficients, profile_product
from sfd_scale.engines.ema import EMA, EMAConfig, length_of, part_name, power_exponent, power_weight
from sfd_scale.engines.engine import Fragment
from sfd_scale.runtime.run_paths import RunPaths
from tests.helpers.whole_engine import WholeEngine, advance, manager

LENGTHS = (0.05, 0.10)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 6.94, 16.97, 400.0])
def test_exponent_and_length_belong_together(gamma: float) -> None:
    length = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert power_exponent(length) == pytest.approx(gamma, rel=1e-9)
    # The standard deviation of that profile, by numerical integration: what the length is defined as.
    tau = (np.arange(200_000) + 0.5) / 200_000
    weights = tau**gamma / np.sum(tau**gamma)
    deviation = math.sqrt(np.sum(weights * tau**2) - np.sum(weights * tau) ** 2)
    assert deviation == pytest.approx(length, rel=1e-4)


def test_edm2_exponents_of_its_two_lengths() -> None:
    # sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94 (the paper's).
    assert [round(power_exponent(length), 2) for length in LENGTHS] == [16.97, 6.94]


def test_products_of_profiles_are_their_integrals() -> None:
    tau = (np.arange(400_000) + 0.5) / 400_000 * 3
    for t_a, gamma_a, t_b, gamma_b in ((1.0, 2.0, 3.0, 7.0), (3.0, 2.0, 1.0, 7.0), (2.0, 0.5, 2.0, 6.9)):
        p_a, p_b = (
            np.where(tau < t, (g + 1) * tau**g / t ** (g + 1), 0.0) for t, g in ((t_a, gamma_a), (t_b, gamma_b))
        )
        integral = np.sum(p_a * p_b) * 3 / 400_000
        closed = profile_product(*(np.array(v) for v in (t_a, gamma_a, t_b, gamma_b)))
        assert closed == pytest.approx(integral, rel=1e-4)


def followed(length: float, path: Callable[[int], torch.Tensor], steps: int) -> torch.Tensor:
    """The average of a trajectory, by its definition: weights (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1)."""
    gamma = power_exponent(length)
    s = np.arange(1, steps + 1, dtype=np.float64) / steps
    weights = s ** (gamma + 1) - (s - 1 / steps) ** (gamma + 1)
    return torch.stack([w * path(i).double() for i, w in enumerate(weights.tolist())]).sum(0)


def walk(step: int) -> torch.Tensor:
    return torch.sin(torch.arange(16.0) * 0.3 + step / 90) + step / 400


def test_the_update_has_the_profile_it_is_named_after() -> None:
    flat = walk(0).clone()
    moments = torch.zeros_like(flat)
    config = EMAConfig(decay=0.9, lengths=LENGTHS, snapshot_every=10)
    ema = EMA([Fragment("w", (16,), 0, flat, moments, moments, True)], config)
    for step in range(300):
        flat.copy_(walk(step))
        ema.update(step)
    assert list(ema.averages) == ["ema", "ema_0.050", "ema_0.100"]
    for length in LENGTHS:
        average = ema.powers[part_name(length)][0].double()
        assert (average - followed(length, walk, 300)).abs().max() < 1e-5
        assert (average - ema.tensors[0].double()).abs().max() > 1e-2, "each average has its own profile"
    assert power_weight(6.94, 0) == 1.0, "the initial weights do not count"
    assert [length_of(part) for part in ema.averages] == [None, 0.05, 0.10]


def test_coefficients_reproduce_what_was_saved_and_what_stands_still() -> None:
    times = [100.0, 100.0, 200.0, 200.0]
    x, error = coefficients(times, [*LENGTHS, *LENGTHS], 200, 0.10)
    assert np.allclose(x, [0, 0, 0, 1], atol=1e-6) and error < 1e-6
    x, error = coefficients(times, [*LENGTHS, *LENGTHS], 200, 0.07)
    assert x.sum() == pytest.approx(1.0) and error < 0.1
    # More snapshots, a better fit; a length far outside of the saved ones, a worse one.
    many = np.repeat(np.arange(10, 201, 10), 2).tolist()
    lengths = [*LENGTHS] * 20
    assert coefficients(many, lengths, 200, 0.07)[1] < error
    assert coefficients(many, lengths, 200, 0.01)[1] > 0.3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A run folder with snapshots every 10 of 80 steps and checkpoints, and the weights after every step."""
    root = tmp_path_factory.mktemp("run")
    engine = WholeEngine()
    ema = EMA(engine.fragments(), EMAConfig(lengths=LENGTHS, snapshot_every=10))
    every = CheckpointConfig(every=10, keep_last=None, background=False)
    snapshots = CheckpointManager(root / "snapshots", every, parts=power_averages, replace=True)
    weights = []
    for step in range(80):
        advance(engine, ema, step)
        weights.append(dict(engine.model.named_parameters())["blocks.0.up.weight"].detach().clone())
        if snapshots.due(step + 1):
            snapshots.save(step + 1, engine, ema, {})
    manager(root / "checkpoints", keep_last=1).save(80, engine, ema, {})
    return root, weights


@pytest.mark.parametrize("length", [0.06, 0.08, 0.12])
@pytest.mark.parametrize("step", [80, 60])
def test_the_average_of_another_length_is_that_which_training_would_have_kept(
    run: tuple[Path, list[torch.Tensor]], length: float, step: int
) -> None:
    root, weights = run
    tensors, at, error = reconstruct(RunPaths(root), length, None if step == 80 else step)
    assert at == step and error < 0.03
    expected = followed(length, lambda i: weights[i], step)
    scale = (weights[step - 1].double() - expected).norm()
    found = tensors["blocks.0.up.weight"].double()
    assert (found - expected).norm() < 0.03 * scale
    # The saved average nearest in length is not good enough: the fit does something.
    nearest = followed(min(LENGTHS, key=lambda saved: abs(saved - length)), lambda i: weights[i], step)
    assert (nearest - expected).norm() > 0.1 * scale


def test_averages_of_checkpoints_count_and_later_ones_do_not(
    run: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(run[0], tmp_path / "run"))
    shutil.rmtree(root / "snapshots" / "step-00000080")
    assert reconstruct(RunPaths(root), 0.08)[1] == 80  # of the checkpoint
    early, _, error = reconstruct(RunPaths(root), 0.08, 60)
    for later in (root / "snapshots" / "step-00000070", root / "checkpoints" / "step-00000080"):
        shutil.rmtree(later)
    again, at, error_again = reconstruct(RunPaths(root), 0.08)
    assert (at, error_again) == (60, error)
    assert all(torch.equal(tensor, again[name]) for name, tensor in early.items())


def test_a_snapshot_holds_the_power_averages_alone_and_is_made_anew(run: tuple[Path, list[torch.Tensor]]) -> None:
    root, _ = run
    names = sorted(path.name for path in (root / "snapshots").iterdir())
    assert names == [f"step-000000{n}" for n in range(10, 81, 10)]
    engine = WholeEngine()
    ema = EMA(engine.fragments(), EMAConfig(lengths=LENGTHS, snapshot_every=10))
    every = CheckpointConfig(every=10, keep_last=None, background=False)
    CheckpointManager(root / "snapshots", every, parts=power_averages, replace=True).save(80, engine, ema, {})
    assert sorted(path.name for path in (root / "snapshots").iterdir()) == names, "a resumed run replaces its own"


def test_what_was_not_kept_is_refused(run: tuple[Path, list[torch.Tensor]], tmp_path: Path) -> None:
    root, _ = run
    with pytest.raises(ValueError, match=r"--step: 55; averages in .* are of the steps \[10, 20"):
        reconstruct(RunPaths(root), 0.1, 55)
    with pytest.raises(ValueError, match=r"--ema-length: 0.5; allowed"):
        reconstruct(RunPaths(root), 0.5)
    with pytest.raises(ValueError, match="no power-function averages; train with ema.lengths"):
        reconstruct(RunPaths(tmp_path), 0.1)


@pytest.mark.parametrize(
    "options,field",
    [
        ({"lengths": (0.4,), "snapshot_every": 1}, "lengths: 0.4"),
        ({"lengths": (0.05, 0.0501), "snapshot_every": 1}, "lengths: "),
        ({"lengths": (0.05, 0.1)}, "snapshot_every: None"),
        ({"snapshot_every": 5}, "snapshot_every: 5"),
    ],
)
def test_impossible_averages_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        EMAConfig(**options)  # type: ignore[arg-type]
