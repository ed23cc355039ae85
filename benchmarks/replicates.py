"""How sure a comparison is: A/A pairs of real replicates, a planted gap, and the coverage of intervals.

    python -m benchmarks.replicates                     # tables of benchmarks/results/replicates.json
    python -m benchmarks.replicates --collect 'runs/replicates/sfd.*'   # write that file anew
    python -m benchmarks.replicates --coverage          # Welch's interval beside a hierarchical bootstrap, simulated

Two groups of replicates of one recipe do not differ. Each interval that says so is wrong.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.comparison import groups, intervals
from eval.comparison.compare import difference
from eval.comparison.groups import Replicate
from eval.comparison.intervals import PAPER_VARIATION, Spread, single, spread, welch
from eval.comparison.variance import components, residual_sampling, shared_sampling
from eval.work.chunks import made_on
from sfd_scale import config
from sfd_scale.runtime.files import read_json, write_json
from sfd_scale.runtime.run_paths import RECIPE
from sfd_scale.runtime.seeds import Seeds

FILE = Path(__file__).parent / "results" / "replicates.json"
SCORE = "fid"
SIZES = (2, 3, 5, 8)
DRAWS = 2000
GAP, PILOT = 0.03, 4


@dataclass(frozen=True)
class Replicates:
    """The scores (K,) of trainings that differ in all parts of the seed, and the covariance of their sampling errors.

    differing: pairs whose interval of sampling alone excludes zero.
    """

    scores: list[float]
    gram: Tensor
    differing: set[tuple[int, int]]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


# ------------------------------------------------------------------------------------------------- the file


def collect(pattern: str) -> dict[str, Any]:
    """What the tables need of evaluated replicates."""
    found = groups.read_group([pattern])
    recipe = config.tree(found[0].path.parents[2] / RECIPE)
    rows = [
        {"seeds": config.to_dict(_seeds(one)), "scores": {key: found_.value for key, found_ in one.influences.items()}}
        for one in found
    ]
    return {
        "machine": made_on(), "recipe": {key: recipe[key] for key in ("name", "train", "lr", "optimizer", "model")},
        "samples": found[0].results.samples | {"checkpoint": None}, "replicates": rows,
        "gram": groups.gram(found, SCORE).tolist(),
        "differing": [list(pair) for pair in _pairs(len(found)) if _differ_by_sampling(found, pair)],
    }  # fmt: skip


def _seeds(replicate: Replicate) -> Seeds:
    assert replicate.seeds is not None
    return replicate.seeds


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    return ((one, other) for one in range(count) for other in range(one + 1, count))


def _differ_by_sampling(found: Sequence[Replicate], pair: tuple[int, int]) -> bool:
    a, b = (found[number].influences[SCORE] for number in pair)
    return difference(SCORE, a, b, paired=found[pair[0]].same_images(found[pair[1]]), rounds=1000).differs


def read(data: dict[str, Any]) -> Replicates:
    """The replicates that differ in all parts of the seed."""
    rows = data["replicates"]
    kept = [number for number, row in enumerate(rows) if len(set(row["seeds"].values())) == 1]
    place = {number: index for index, number in enumerate(kept)}
    differing = {(place[i], place[j]) for i, j in data["differing"] if i in place and j in place}
    gram = torch.tensor(data["gram"], dtype=torch.float64)[kept][:, kept]
    return Replicates([rows[number]["scores"][SCORE] for number in kept], gram, differing)


# ------------------------------------------------------------------------------------------------- A/A


def one_each(found: Replicates) -> dict[str, float]:
    """Share of all pairs of single trainings that each rule calls different."""
    pairs = list(_pairs(len(found.scores)))
    paper = own = 0
    for i, j in pairs:
        a, b = found.scores[i], found.scores[j]
        others = spread([score for number, score in enumerate(found.scores) if number not in (i, j)])
        known = Spread((PAPER_VARIATION * (a + b) / 2) ** 2, math.inf)
        by_sampling = (i, j) in found.differing
        paper += by_sampling and single(b - a, known, (1, 1)).differs
        own += by_sampling and single(b - a, others, (1, 1)).differs
    count = len(pairs)
    return {
        "interval of sampling alone": len(found.differing) / count,
        "above the floor of the literature": paper / count,
        "and the spread of the other replicates (`--replicates`)": own / count,
    }


def of_groups(found: Replicates, size: int, draw: torch.Generator) -> float:
    """Share of pairs of groups without a common training that are called different."""
    wrong = 0
    for _ in range(DRAWS):
        rows = torch.randperm(len(found.scores), generator=draw)[: 2 * size]
        scores = [found.scores[row] for row in rows.tolist()]
        shared = shared_sampling(found.gram[rows][:, rows], size)
        wrong += welch(scores[:size], scores[size:], shared).differs
    return wrong / DRAWS


# ------------------------------------------------------------------------------------------------- a planted gap


def planted(found: Replicates, draw: torch.Generator) -> tuple[float, float]:
    """Plant a gap of 3% into B: how often the seeds that pilots of 4 and 4 ask for find it, and their median number.

    Trainings are drawn from all replicates with replacement, and spread to their unbiased variance.
    """
    scores, mean = torch.tensor(found.scores, dtype=torch.float64), found.mean
    scores = mean + (scores - mean) * math.sqrt(len(scores) / (len(scores) - 1))
    hits, asked = 0, []

    def sides(rows: Tensor, count: int) -> tuple[list[float], list[float]]:
        return scores[rows[:count]].tolist(), ((1 + GAP) * scores[rows[count:]]).tolist()

    for _ in range(DRAWS // 2):
        pilot = [spread(side) for side in sides(torch.randperm(len(scores), generator=draw)[: 2 * PILOT], PILOT)]
        pair = Spread(sum(one.variance for one in pilot), 2 * (PILOT - 1))
        count = intervals.seeds_to_decide(GAP * mean, pair, paired=False)
        assert count is not None
        asked.append(count)
        hits += welch(*sides(torch.randint(len(scores), (2 * count,), generator=draw), count)).differs
    return hits / (DRAWS // 2), float(torch.tensor(asked).double().median())


# ------------------------------------------------------------------------------------------------- coverage


def coverage(size: int, draw: torch.Generator, rounds: int = 400, images: int = 100) -> dict[str, float]:
    """How often intervals of two equal groups hold zero. Training moves a score 3.2 times as much as sampling does."""
    held = {"Welch": 0, "hierarchical bootstrap": 0}
    for _ in range(rounds):
        common = torch.randn(images, generator=draw).double()
        moves = (common + 0.7 * torch.randn(2 * size, images, generator=draw)) / 1.22
        scores = 3.2 / images**0.5 * torch.randn(2 * size, generator=draw).double() + moves.mean(1)
        centred = moves - moves.mean(1, keepdim=True)
        shared = shared_sampling(centred @ centred.T / images**2, size)
        held["Welch"] += not welch(scores[:size].tolist(), scores[size:].tolist(), shared).differs
        held["hierarchical bootstrap"] += _bootstrap_holds(scores, centred, size, draw)
    return {name: count / rounds for name, count in held.items()}


def _bootstrap_holds(scores: Tensor, moves: Tensor, size: int, draw: torch.Generator, rounds: int = 500) -> bool:
    """The percentile interval over resampled trainings, and over images that both groups share."""
    count = moves.shape[1]
    drawn = torch.multinomial(torch.ones(rounds, count), count, True, generator=draw)
    weights = torch.zeros(rounds, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(rounds, count).double())
    moved = scores + weights @ moves.T / count
    picks = [torch.randint(size, (rounds, size), generator=draw) + shift for shift in (0, size)]
    a, b = (moved.gather(1, pick).mean(1) for pick in picks)
    low, high = torch.quantile(b - a, torch.tensor([0.025, 0.975]).double()).tolist()
    return bool(low <= 0 <= high)


# ------------------------------------------------------------------------------------------------- tables


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def tables(data: dict[str, Any]) -> Iterator[str]:
    """Markdown: the spread by source, A/A, the planted gap."""
    found, draw = read(data), torch.Generator().manual_seed(0)
    own = spread(found.scores)
    yield (
        f"FID of {len(found.scores)} replicates: {found.mean:.3f} ± {own.variance**0.5:.3f}, coefficient of variation "
        f"{own.variance**0.5 / found.mean:.1%}."
    )
    seeds = [Seeds(**row["seeds"]) for row in data["replicates"]]
    gram = torch.tensor(data["gram"], dtype=torch.float64)
    parts = components([row["scores"][SCORE] for row in data["replicates"]], seeds, residual_sampling(gram))
    rows = [
        [part.source, "–" if part.freedom is None else str(part.freedom), f"{part.deviation / found.mean:.2%}"]
        for part in parts
    ]
    yield table(["source", "degrees of freedom", "standard deviation, share of FID"], rows)
    aa = [["one and one", rule, f"{share:.1%}"] for rule, share in one_each(found).items()]
    aa += [
        [f"{size} and {size}", "interval over trainings", f"{of_groups(found, size, draw):.1%}"]
        for size in SIZES
        if 2 * size <= len(found.scores)
    ]
    yield table(["trainings", "rule", "called different"], aa)
    power, asked = planted(found, draw)
    yield f"A planted gap of {GAP:.0%}: found in {power:.0%} of cases with the seeds asked for (median {asked:.0f})."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", metavar="PATTERN", help="evaluated run folders of `sfd replicate`")
    parser.add_argument("--coverage", action="store_true")
    arguments = parser.parse_args()
    if arguments.coverage:
        draw = torch.Generator().manual_seed(0)
        rows = [[str(size), *(f"{share:.1%}" for share in coverage(size, draw).values())] for size in (2, 3, 5, 10)]
        print(table(["trainings in each group", "Welch", "hierarchical bootstrap"], rows))
        return
    if arguments.collect is not None:
        write_json(FILE, collect(arguments.collect))
    data = read_json(FILE)
    print("\n\n".join(tables(data)))


if __name__ == "__main__":
    main()
