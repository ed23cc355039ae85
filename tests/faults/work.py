"""What is broken: a training run, an encode and a generation, each with its undisturbed result to compare with."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from eval import generate
from sfd_scale.__main__ import app
from sfd_scale.checkpoint import Checkpoint
from sfd_scale.launch.command_line import run_command
from sfd_scale.runs import RunFolder
from sfd_scale.runtime.leftovers import is_temporary
from tests.faults.jobs import ROOT, Forked, Job, Launched
from tests.helpers import eval_tiny, small_run
from tests.helpers.encoded import files

STEPS, EVERY = 16, 3
LEFT = (".tmp", ".deleted", ".part")  # of folders and files that are not valid yet, or no longer


def command(*arguments: str) -> Callable[[], None]:
    """The command line `sfd …` in this process."""

    def work() -> None:
        sys.argv = ["sfd", *arguments]
        run_command(app)

    return work


def before_renames(counter: Path, act: Callable[[int], None]) -> None:
    """From now on this process calls `act` between the write of a file and the rename that makes it valid.

    Args:
        counter: of the renames of all ranks; `act` gets the number of this one.
    """
    file = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def renamed(*args: Any, real: Callable[..., None] = real, **options: Any) -> None:
            os.write(file, b".")
            act(os.lseek(file, 0, os.SEEK_CUR))
            real(*args, **options)

        setattr(os, name, renamed)


def leftovers(out: Path) -> str | None:
    """What killed writers left, and the last start did not remove."""
    found = sorted(str(p.relative_to(out)) for p in out.rglob("*") if is_temporary(p.name) or p.suffix in LEFT)
    return f"left: {', '.join(found)}" if found else None


class Work:
    """A command that writes to a folder; `start` again continues."""

    name, launched = "", False

    def __init__(self, place: Path) -> None:
        self.place, self.log = place, place / f"{self.name}.log"
        place.mkdir(parents=True, exist_ok=True)
        self.seconds = 0.0

    def start(self, out: Path, **options: Any) -> Job:
        raise AssertionError("of the subclasses")

    def difference(self, out: Path) -> str | None:
        """What differs from the undisturbed result."""
        raise AssertionError("of the subclasses")

    @property
    def reference(self) -> Path:
        return self.place / f"{self.name}-undisturbed"

    @property
    def counter(self) -> Path:
        return self.place / f"{self.name}.renames"

    @property
    def renames(self) -> int:
        """The number of renames by all ranks of the undisturbed command."""
        return self.counter.stat().st_size

    def undisturbed(self) -> None:
        begun = time.monotonic()

        def count(rank: int) -> None:
            before_renames(self.counter, lambda number: None)

        code = self.start(self.reference, **({} if self.launched else {"hook": count})).wait(600)
        self.seconds = time.monotonic() - begun
        if code:
            raise RuntimeError(f"the undisturbed {self.name} ended with {code}: {self.log.read_text()[-3000:]}")

    def finished(self, out: Path, starts: int = 3, **options: Any) -> str | None:
        """Start until the end; what is wrong with the result."""
        for _ in range(starts):
            job = self.start(out, **options)
            if job.wait(600) == 0:
                return self.difference(out) or leftovers(out)
        return f"{self.name} did not end after {starts} starts: {job.output()[-1500:]}"

    def fresh(self, name: str) -> Path:
        out = self.place / f"{self.name}-{name}"
        shutil.rmtree(out, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        return out


class Training(Work):
    """The smallest LightningDiT on encoded digits, two ranks; checkpoints every 3 of 16 steps."""

    name = "train"

    def __init__(self, place: Path, launcher: str | None = None) -> None:
        self.launcher, self.launched = launcher, launcher is not None
        if launcher:
            self.name = f"train-{launcher}"
        super().__init__(place)
        data = place / "data"
        if not data.exists():
            small_run.encode(data)
        engine = small_run.ZERO1 if launcher == "deepspeed" else small_run.FSDP
        self.settings: dict[str, Any] = {"steps": STEPS, "every": EVERY, "engine": engine}
        self.recipe = small_run.write_recipe(place / f"{self.name}.yaml", data, **self.settings)

    def start(self, out: Path, **options: Any) -> Job:
        arguments = ["train", str(options.pop("recipe", self.recipe)), "--run", str(out), *options.pop("overrides", ())]
        if self.launcher is None:
            return Forked(command(*arguments), self.log, **options)
        return Launched([str(ROOT / f"launchers/{self.launcher}.sh"), *arguments], self.log, **options)

    def difference(self, out: Path) -> str | None:
        if not small_run.same(small_run.weights(out, STEPS), small_run.weights(self.reference, STEPS)):
            return "the final weights differ"
        rows, expected = (small_run.lines(f / "metrics.jsonl") for f in (out, self.reference))
        if [(row["step"], row["loss"]) for row in rows] != [(row["step"], row["loss"]) for row in expected]:
            return f"metrics.jsonl differs: steps {[row['step'] for row in rows]}"
        return None

    @staticmethod
    def intact(out: Path) -> list[Checkpoint]:
        """Checkpoints without damage, oldest first."""
        return [checkpoint for checkpoint in RunFolder(out).checkpoints if checkpoint.damage() is None]


class Encoding(Work):
    """Digits to image shards, on two ranks in chunks of 8."""

    name = "encode"

    def start(self, out: Path, **options: Any) -> Job:
        recipe = self.place / f"{out.name}.yaml"
        settings = {
            "kind": "encode", "name": "digits", "source": {"kind": "digits", "num_images": 160, "seed": 3},
            "store": {"image": True, "latents": "none", "features": "none", "chunk": 8, "batch": 4}, "out": str(out),
        }  # fmt: skip
        recipe.write_text(yaml.safe_dump(settings))
        return Forked(command("encode", str(recipe)), self.log, **options)

    def difference(self, out: Path) -> str | None:
        ours, expected = files(out), files(self.reference)
        own, theirs = (json.loads(found.pop("manifest.json")) for found in (ours, expected))
        for manifest in (own, theirs):
            manifest["recipe"].pop("out", None)
        different = {name for name in ours.keys() | expected.keys() if ours.get(name) != expected.get(name)}
        return f"{sorted(different)} differ" if different or own != theirs else None


class Generation(Work):
    """Images of a tiny model and their features, in chunks of 8, on two ranks."""

    name = "generate"

    def start(self, out: Path, **options: Any) -> Job:
        settings = eval_tiny.recipe(self.place, num_samples=120)

        def work() -> None:
            from sfd_scale.runtime import distributed

            distributed.init(120.0)
            try:
                generate.generate(settings, out, eval_tiny.job(settings))
            except (ValueError, OSError) as error:
                sys.stderr.write(f"error: {error}\n")
                sys.exit(2)
            finally:
                distributed.shutdown()

        return Forked(work, self.log, **options)

    def difference(self, out: Path) -> str | None:
        ours, expected = (
            {name: data for name, data in files(f).items() if name.startswith("chunks")} for f in (out, self.reference)
        )
        different = {name for name in ours.keys() | expected.keys() if ours.get(name) != expected.get(name)}
        return f"{sorted(different)} differ" if different or not ours else None
