"""Seconds from the command to the first step of `launchers/deepspeed.sh train quickstart/sfd` on two ranks, in parts.

The peer is a minimal start: torchrun with two ranks and a script that imports torch, wraps one block of the official
arithmetic in DDP, and does one step. Both run on the CPU, with DeepSpeed's extensions already compiled. The page cache
may be cold at the first start.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import harness
from benchmarks.harness import Figure, Options
from benchmarks.peer import SEMANTIC, TEXTURE
from sfd_scale.data.convert import ConvertConfig, convert
from sfd_scale.diffusion.latents import LatentLayout
from sfd_scale.runtime import environment

ROOT = Path(__file__).parents[1]
LIMIT_S, RANKS = 20, 2
# The sizes of the quickstart's latents.
SIDE, FEATURES, CLASSES, SAMPLES = 4, 96, 10, 64
# Time stamps of benchmarks/startup_rank.py and startup_peer.py in order, and the part that ends with each.
OURS = {
    "rank": "launcher", "imports": "imports", "group": "process group", "data": "data", "engine": "model and engine",
    "metrics": "W&B", "step": "first step",
}  # fmt: skip
PEER = {
    "rank": "launcher", "imports": "imports", "group": "process group", "engine": "model and DDP", "step": "first step",
}  # fmt: skip
Stamps = dict[str, float]
STAMPS = "stamps.json"


def prepare(folder: Path) -> Path:
    """Random samples with the shapes of the quickstart's latents."""
    source, out = folder / "features", folder / "latents"
    source.mkdir()
    draw = torch.Generator().manual_seed(0)
    save_file(
        {
            "labels": torch.randint(0, CLASSES, (SAMPLES,), generator=draw),
            "latents": torch.randn(SAMPLES, TEXTURE, SIDE, SIDE, generator=draw),
            "latents_sv": torch.randn(SAMPLES, SEMANTIC, SIDE, SIDE, generator=draw),
            "feats_dino": torch.randn(SAMPLES, FEATURES, SIDE, SIDE, generator=draw).half(),
        },
        source / "latents_rank00_shard000.safetensors",
    )
    layout = LatentLayout(texture_channels=TEXTURE, semantic_channels=SEMANTIC, size=SIDE)
    settings = ConvertConfig(
        source=source, flip=False, feature_dim=FEATURES, num_classes=CLASSES, image_size=8 * SIDE, layout=layout
    )
    convert(settings, out)
    return out


def ours(data: Path, run: Path) -> Stamps:
    """Seconds from the command to the end of each part, on rank 0."""
    command = [str(ROOT / "launchers" / "deepspeed.sh"), "--module", "benchmarks.startup_rank", "train"]
    command += [
        "quickstart/sfd",
        f"data.path={data}",
        f"latents.texture_channels={TEXTURE}",
        "train.steps=1",
        "--run",
        str(run),
    ]
    return run_with_stamps(command, run, OURS, {"DS_ACCELERATOR": "cpu", "RANKS": str(RANKS)})


def peer(folder: Path) -> Stamps:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "benchmarks.startup_peer", str(folder / STAMPS)]
    return run_with_stamps(command, folder, PEER, {})


def run_with_stamps(command: list[str], folder: Path, parts: Mapping[str, str], more: Mapping[str, str]) -> Stamps:
    folder.mkdir()
    file, log = folder / STAMPS, folder / "start.log"
    own = environment.snapshot()
    paths = [str(ROOT), own.get("PYTHONPATH", "")]
    variables = {
        **own, **more, "SFD_STAMPS": str(file), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    started = time.time()
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, env=variables, stdout=output, stderr=output, check=False).returncode
    if code or not file.is_file():
        raise RuntimeError(
            f"{' '.join(command)} ended with {code}:\n{log.read_text(encoding='utf-8', errors='replace')[-4000:]}"
        )
    stamps = {name: when - started for name, when in json.loads(file.read_text(encoding="utf-8")).items()}
    missing = [name for name in parts if name not in stamps]
    if missing:
        raise RuntimeError(f"{' '.join(command)} never reached: {', '.join(missing)}; has a function been renamed?")
    return stamps


def describe_parts(runs: list[Stamps], parts: Mapping[str, str]) -> str:
    """Each part with its median seconds."""
    names, words = list(parts), []
    for before, name in zip([None, *names], names, strict=False):
        spent = statistics.median(run[name] - (run[before] if before else 0.0) for run in runs)
        words.append(f"{parts[name]} {spent:.1f}")
    return ", ".join(words)


def run(options: Options) -> list[Figure]:
    """Command to first step of the quickstart on two ranks, vs. torchrun and DDP; the parts in seconds."""
    repeats = options.repeats or (1 if options.quick else 3)
    runs: dict[str, list[Stamps]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(folder)
        for number in range(repeats):
            runs["ours"].append(ours(data, folder / f"ours{number}"))
            runs["peer"].append(peer(folder / f"peer{number}"))
    seconds = {side: [stamps["step"] for stamps in own] for side, own in runs.items()}
    what = f"command to first step, {describe_parts(runs['ours'], OURS)}"
    against = f"torchrun and DDP, {describe_parts(runs['peer'], PEER)}"
    return [
        harness.measured(
            "command to first step", ours=statistics.median(seconds["ours"]), peer=LIMIT_S, against="limit",
            unit="s", target=1.0,
        ),
        harness.compare(what, seconds, against=against, work=None, unit="s"),
    ]  # fmt: skip


if __name__ == "__main__":
    harness.main("startup", run)
