"""Replicates of a real small training: folders that resume, groups of them, and what is said of single runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from eval.comparison.compare import Comparison, compare, compare_groups, difference, group_interval, spread_of_training
from eval.comparison.groups import read_group, results_files
from eval.comparison.intervals import Spread, seeds_to_decide, spread, welch
from eval.comparison.replicate import parse_vary, replicate, replicates
from eval.recipe import EvalRecipe
from sfd_scale import config
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runs import RunFolder
from sfd_scale.runtime.seeds import Seeds
from tests.eval.test_watch import prepare
from tests.helpers import small_run
from tests.helpers.ranks import run_alone

ONLINE = ["wandb.mode=disabled"]


def train_groups(folder: Path) -> list[dict[str, int]]:
    """Three seeds of a recipe and of one with another learning rate; three more in the initial weights alone."""
    prepare(folder)
    evaluation = config.load(folder / "eval.yaml", EvalRecipe)
    times = []
    for words, vary in (("a", "init,data,noise"), ("a", "init"), ("b", "init,data,noise"), ("a", "init,data,noise")):
        lr = {"a": "1e-2", "b": "1e-1"}[words]
        overrides = [*ONLINE, f"run={folder}/{words}", f"optimizer.lr={lr}"]
        recipe = config.load(folder / "train.yaml", TrainRecipe, overrides)
        assert replicate(replicates(recipe, 3, parse_vary(vary)), evaluation, "train.yaml")
        times.append({str(file): file.stat().st_mtime_ns for file in folder.glob("a.*/evaluations/*/results.json")})
    return times


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("replicates")
    times = run_alone(train_groups, folder, timeout=500.0)
    assert len(times[0]) == 3 and len(times[1]) == 5  # the first replicate of both is one folder
    assert times[3] == times[1]  # the same command again does nothing
    return folder


def test_replicates_are_normal_runs_that_differ_in_their_seeds(runs: Path) -> None:
    names = sorted(path.name for path in runs.glob("a.*"))
    assert names == ["a.init1-data0-noise0", "a.init2-data0-noise0", "a.seed0", "a.seed1", "a.seed2"]
    found = {name: RunFolder(runs / name).recipe for name in names}
    assert found["a.seed2"].seed == 2 and found["a.init2-data0-noise0"].seeds == Seeds(init=2)
    weights = {name: small_run.weights(runs / name, 2) for name in names}
    assert len({tuple(next(iter(value.values())).flatten().tolist()) for value in weights.values()}) == len(names)
    with pytest.raises(ValueError, match=r"--vary: 'order'; allowed: one or more of init, data, noise"):
        parse_vary("init,order")


def words(runs: Path, *names: str) -> list[str]:
    return [str(runs / name) for name in names]


def test_groups_are_compared_by_their_trainings(runs: Path) -> None:
    a, b = read_group(words(runs, "a.seed*")), read_group(words(runs, "b.seed*"))
    found = compare_groups(a, b)
    assert found.trainings == (3, 3) and found.paired_seeds and found.paired_images
    fid = found.differences[0]
    assert fid.score == "fid" and fid.a == pytest.approx(sum(r.results.scores.fid or 0 for r in a) / 3, rel=1e-6)
    assert fid.low < fid.difference < fid.high
    # With other seeds, its standard error is Welch's, and that of the sampling that they share.
    fid = compare_groups(a, b[:2]).differences[0]
    own, _, shared = group_interval("fid", a, b[:2], False)
    alone = welch(*([r.influences["fid"].value for r in side] for side in (a, b[:2])))
    assert own.error**2 == pytest.approx(alone.error**2 + shared) and own.freedom >= alone.freedom
    assert (fid.low, fid.high) == (own.low, own.high)
    # One training varies as those of the other group do.
    _, pair, _ = group_interval("fid", a, b[:1], False)
    assert pair.variance == pytest.approx(2 * spread([r.influences["fid"].value for r in a]).variance)
    assert fid.deviations[0] == pytest.approx(spread([r.influences["fid"].value for r in a]).variance ** 0.5)


def test_variance_by_source_where_the_seeds_allow_it(runs: Path) -> None:
    whole = compare(words(runs, "a.*"), words(runs, "b.*"), out=runs / "out.json")
    assert [part.source for part in whole.sources[0]["fid"]] == ["init", "data + noise", "all of them", "sampling"]
    assert [part.source for part in whole.sources[1]["fid"]] == ["init + data + noise", "sampling"]
    data = json.loads((runs / "out.json").read_text())
    assert data["trainings"] == [5, 3] and data["scores"][0]["score"] == "fid"


def fid_of(found: Comparison) -> tuple[str, int | None]:
    return found.differences[0].verdict, found.differences[0].seeds


def test_one_training_each_is_judged_by_the_floor_that_is_named(runs: Path) -> None:
    alone = compare(words(runs, "a.seed0"), words(runs, "a.seed1"), rounds=50)
    assert "arXiv 2606.20536" in alone.basis and "3.6%" in alone.basis
    assert {row.verdict for row in alone.differences if row.score != "fid"} == {"undecided"}
    fid = alone.differences[0]
    margin = 1.959964 * 2**0.5 * 0.013 * (fid.a + fid.b) / 2
    assert fid.high >= fid.difference + margin * (1 - 1e-6) and fid.low <= fid.difference - margin * (1 - 1e-6)
    a, b = (read_group(words(runs, name))[0].influences["fid"] for name in ("a.seed0", "a.seed1"))
    sampled = difference("fid", a, b, paired=True, rounds=50)
    assert fid.low <= sampled.low <= sampled.high <= fid.high
    own = compare(words(runs, "a.seed0"), words(runs, "a.seed1"), rounds=50, replicates=words(runs, "a.seed*"))
    assert "3 replicates" in own.basis and fid_of(own)[0] == "undecided"
    # The same model twice is no question of training.
    same = compare(words(runs, "a.seed0"), words(runs, "a.seed0"), rounds=50)
    assert same.basis.startswith("one model") and fid_of(same) == ("no difference shown", None)


def test_only_replicates_of_ones_own_say_that_one_training_each_differs(runs: Path) -> None:
    """A score twice as large is above any floor."""
    a, b = (read_group(words(runs, name))[0] for name in ("a.seed0", "a.seed1"))
    doubled = {key: dataclasses.replace(found, value=2 * found.value) for key, found in b.influences.items()}
    far, own = dataclasses.replace(b, influences=doubled), read_group(words(runs, "a.seed*"))
    by_literature = {row.score: row.verdict for row in compare_groups([a], [far], rounds=50).differences}
    assert by_literature["fid"] == "above the floor"
    assert {verdict for score, verdict in by_literature.items() if score != "fid"} == {"undecided"}
    assert compare_groups([a], [far], rounds=50, replicates=own).differences[0].differs
    # Seeds for a gap of 3 deviations: the difference of two trainings has the variance of both.
    fid = compare_groups([a], [far], rounds=50).differences[0]
    seed_moves = spread_of_training("fid", (fid.a + fid.b) / 2, own)
    assert seed_moves is not None
    gap = 3 * seed_moves.variance**0.5
    wanted = seeds_to_decide(gap, Spread(2 * seed_moves.variance, 2), paired=False)
    found = compare_groups([a], [far], rounds=50, replicates=own, gap=gap / fid.a).differences[0]
    assert found.seeds == wanted != seeds_to_decide(gap, seed_moves, paired=False)


def test_a_gap_asks_for_seeds_and_words_name_results(runs: Path) -> None:
    small = compare(words(runs, "a.seed*"), words(runs, "b.seed*"), gap=0.001).differences[0].seeds
    large = compare(words(runs, "a.seed*"), words(runs, "b.seed*"), gap=10.0).differences[0].seeds
    assert large is not None and (small is None or small > large)
    assert len(results_files(str(runs / "a.*"))) == 5
    folder = runs / "a.seed0" / "evaluations" / "step-00000002"
    assert results_files(str(folder)) == results_files(str(runs / "a.seed0")) == [folder / "results.json"]
    with pytest.raises(ValueError, match=r"c\.\*: no results; allowed: a results\.json"):
        results_files(str(runs / "c.*"))
    with pytest.raises(ValueError, match=r"the same model as .* each training once per group"):
        (runs / "copy").mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.is_file():
                (runs / "copy" / file.name).write_bytes(file.read_bytes())
        read_group([*words(runs, "a.seed0"), str(runs / "copy")])


def test_seeds_do_not_move_what_they_do_not_name(runs: Path) -> None:
    """After real trainings: other initial weights alone leave the loss of the first step near, the data order equal."""
    rows = {n: small_run.lines(runs / n / "metrics.jsonl") for n in ("a.seed0", "a.init1-data0-noise0", "a.seed1")}
    first = {name: torch.tensor(found[0]["loss/velocity"]) for name, found in rows.items()}
    # The output layer starts at zero: the first loss is of data and noise alone.
    assert torch.equal(first["a.seed0"], first["a.init1-data0-noise0"])
    assert not torch.equal(first["a.seed0"], first["a.seed1"])
