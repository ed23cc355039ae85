"""Break training, encoding and generation in every way that is listed, and count what survives.

    python -m tests.faults                        # every fault once, and 100 seeded kills
    python -m tests.faults --kills 8 --only kill
    python -m tests.faults --launchers            # also kills under torchrun and deepspeed
    python -m tests.faults --launchers --kills 0 --only "rank, deepspeed"   # one of these alone

Exit code 1 where anything was lost. The table says: fault, times, survived, lost.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import typer

from tests.faults.cases import Case, cases, kill, kill_before_rename
from tests.faults.jobs import Result
from tests.faults.work import Training, Work

# Imported once, before anything is forked: every rank would do it otherwise.
_LAZY = ("sfd_scale.build", "torch._dynamo", "torch.distributed.checkpoint.state_dict_saver")


RENAME = "before a rename"
# One turn of the kills: a training run costs five times as much as the others.
_TURN = (
    ("encode", "rank"), ("generate", "all"), ("train", "rank"), ("encode", RENAME), ("generate", "rank"),
    ("encode", "all"), ("generate", RENAME), ("train", "all"), ("encode", RENAME), ("train", RENAME),
    ("generate", "rank"),
)  # fmt: skip


def kills(work: list[Work], turn: Sequence[tuple[str, str]], count: int, seed: int) -> dict[str, Result]:
    """`count` kills that landed, in turn over commands and victims."""
    by_name = {w.name: w for w in work}
    found = {f"kill {victim}, {name}": Result(0, 0) for name, victim in sorted(set(turn))}
    attempt = landed = 0
    while landed < count and attempt < 3 * count:
        name, victim = turn[attempt % len(turn)]
        case = f"kill {victim}, {name}"
        work_ = by_name[name]
        one = kill_before_rename if victim == RENAME else partial(kill, victim=victim)
        result = _safely(partial(one, work_), seed, str(attempt))
        attempt, landed = attempt + 1, landed + result.times
        found[case] = _sum(found[case], result)
        _say(f"{landed} of {count}, {case}", result)
    return found


def _sum(a: Result, b: Result) -> Result:
    return Result(a.times + b.times, a.survived + b.survived, (*a.problems, *b.problems))


def _safely(case: Case, seed: int, name: str) -> Result:
    try:
        return case(random.Random(f"{seed}/{name}"))
    except Exception as error:  # noqa: BLE001  a case that cannot be finished is a loss, and the others go on
        return Result.of(f"{type(error).__name__}: {str(error)[-1500:]}")


def _landed(work: Work, victim: str, seed: int, name: str) -> Result:
    """One kill; drawn anew where the moment came before the ranks were there, or after they had ended."""
    for attempt in range(5):
        result = _safely(lambda draw: kill(work, draw, victim), seed, f"{name}/{attempt}")
        if result.times:
            break
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="cases whose name contains this text")
    parser.add_argument("--launchers", action="store_true", help="kills under torchrun and deepspeed, once each")
    parser.add_argument("--place", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    # Of what is launched, and of this process: a fork would wait for the threads that it does not have.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    begun = time.monotonic()
    for name in _LAZY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        results = run(options, options.place or Path(temporary))
    typer.echo(f"\n{'fault':<28} {'times':>6} {'survived':>9} {'lost':>5}")
    for name, result in results.items():
        typer.echo(f"{name:<28} {result.times:>6} {result.survived:>9} {result.times - result.survived:>5}")
    total = sum(result.times for result in results.values())
    lost = total - sum(result.survived for result in results.values())
    seconds = time.monotonic() - begun
    typer.echo(f"{'all':<28} {total:>6} {total - lost:>9} {lost:>5}   seed {options.seed}, {seconds:.0f} s")
    if not total:
        typer.echo(f"--only: {', '.join(options.only)}: nothing was done")
    return 1 if lost or not total else 0


def run(options: argparse.Namespace, place: Path) -> dict[str, Result]:
    def asked(name: str) -> bool:
        return not options.only or any(text in name for text in options.only)

    work, singles = cases(place)
    wanted = [name for name in singles if asked(name)]
    turn = [(name, victim) for name, victim in _TURN if asked(f"kill {victim}, {name}")]
    kill_many = bool(options.kills and turn)
    for w in work if wanted or kill_many else ():
        w.undisturbed()
        typer.echo(f"undisturbed {w.name}: {w.seconds:.1f} s")
    results: dict[str, Result] = {}
    for name in wanted:
        results[name] = _safely(singles[name], options.seed, name)
        _say(name, results[name])
    if options.launchers:
        for launcher in ("torchrun", "deepspeed"):
            victims = {f"kill {victim}, {launcher}": victim for victim in ("rank", "all", "launcher")}
            victims = {name: victim for name, victim in victims.items() if asked(name)}
            if victims:
                launched = Training(place, launcher)
                launched.undisturbed()
            for name, victim in victims.items():
                results[name] = _landed(launched, victim, options.seed, name)
                _say(name, results[name])
    if kill_many:
        results |= kills(work, turn, options.kills, options.seed)
    return results


def _say(name: str, result: Result) -> None:
    typer.echo(f"{name}: {'nothing was done' if not result.times else 'survived' if result.survived else 'LOST'}")
    for problem in result.problems:
        typer.echo(f"  {problem}")


if __name__ == "__main__":
    sys.exit(main())
