"""Changed files for every parser of ours: `python -m tests.faults.fuzz --seconds 60`.

Each target writes a good file; it is changed at random, by bytes and by the words of its format, and read. A parser may
read it or refuse it with an error of the user's kind; anything else, a file made elsewhere, or memory beyond a limit is
a finding, which is printed with the seed that makes it again. With atheris installed, `--atheris TARGET` lets coverage
steer the changes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from eval.images import npz
from eval.recipes import load_any
from sfd_scale import config, export
from sfd_scale.checkpoint import Checkpoint, load_weights
from sfd_scale.checkpoint.folder import fingerprint
from sfd_scale.checkpoint.metadata import read_metadata, shapes
from sfd_scale.data import manifest as schema
from sfd_scale.data.shards import check_sizes, open_shards
from sfd_scale.diffusion.latents import LatentStats
from sfd_scale.runtime.files import sha256
from sfd_scale.runtime.torch_file import TorchFile, plain
from sfd_scale.sample import load_for_sampling

Allowed = (ValueError, OSError)  # what the command line turns into one sentence
_MEMORY = 6 << 30  # address space above what the process has at its start


@dataclass(frozen=True)
class Target:
    """A parser, and a file that it reads: `write` makes the folder, `file` is what is changed in it."""

    file: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    tokens: tuple[bytes, ...] = ()


def mutated(data: bytes, seed: int, tokens: tuple[bytes, ...] = ()) -> bytes:
    """`data` with one to six changes: bits, bytes, cuts, repeats, large numbers, words of the format."""
    draw = random.Random(seed)
    out = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(out) + 1)
        match draw.randrange(7):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                out[at : at + draw.randint(1, 8)] = draw.randbytes(draw.randint(0, 8))
            case 2:
                del out[at : at + draw.choice((1, 4, 64, len(out)))]
            case 3:
                piece = out[at : at + draw.randint(1, 64)]
                out[at:at] = piece * draw.choice((1, 2, 50))
            case 4:
                size = draw.choice((1, 2, 4, 8))
                out[at : at + size] = (1 << (8 * size - draw.randint(0, 1))).__sub__(1).to_bytes(size, "little")
            case 5 if tokens:
                token = draw.choice(tokens)
                out[at : at + draw.choice((0, len(token)))] = token
            case _:
                number = str(draw.choice((-1, 0, 2**31, 2**63, 10**30))).encode()
                out[at : at + draw.randint(0, 4)] = number
    return bytes(out)


# ----------------------------------------------------------------------------------------------- targets

JSON = (b"null", b"true", b"[]", b"{}", b'""', b"1e999", b"NaN", b'"..', b"\\u0000", b"[" * 2000)
YAML = (
    b"!!python/name:os.system ", b"&a ", b"*a", b"${", b"}", b"oc.env:", b"extends: ", b": ", b"- ", b"<<: ", b"? ",
    b"0x", b"1e400", b".nan", b"2001-01-01", b"!!binary ", b"kind: ", b"\n  ",
)  # fmt: skip
PICKLE = (
    b"c__builtin__\neval\n",
    b"cos\nsystem\n",
    b"R",
    b"b",
    b"\x81",
    b"Q",
    b"2",
    b"\x8a\xff",
    b"\x8d" + b"\xff" * 8,
)


def _recipe(folder: Path) -> None:
    (folder / "x.yaml").write_text(config.to_yaml(load_any("quickstart/sfd")))


def _index(folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"id": "int", "label": "int", "latents": "ndarray:float16:2,2,2", "latents_flip": "ndarray:float16:2,2,2"}
    with MDSWriter(out=str(folder), columns=columns, hashes=["sha256"]) as writer:
        for index in range(3):
            row = np.full((2, 2, 2), index, np.float16)
            writer.write({"id": index, "label": index, "latents": row, "latents_flip": row})
    schema.Manifest(
        num_samples=3, num_classes=3, image_size=8, columns=columns, dtype="float16", stats_hash=None,
        index_sha256=schema.index_sha256(folder), tokenizers={"texture": "x"}, recipe={"a": [1]},
    ).write(folder)  # fmt: skip


def _rows(folder: Path) -> None:
    rows = open_shards(folder)
    for index in range(rows.num_samples):
        _ = rows[index]


def _index_and_sizes(folder: Path) -> None:
    schema.read_index(folder)
    check_sizes(folder)


def _torch(folder: Path) -> None:
    torch.save({"ema": {"a.b": torch.ones(3, 4), "c": torch.zeros(2)}, "opt": {"state": {0: 1.5}}}, folder / "x.pt")


def _read_torch(folder: Path) -> None:
    file = TorchFile(folder / "x.pt")
    plain(file.load(file.content))


def _npz(folder: Path) -> None:
    np.savez(
        folder / "x.npz", mu=np.ones(3), sigma=np.eye(3), arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.arange(2)
    )


def _read_npz(folder: Path) -> None:
    npz.read_statistics(folder / "x.npz")
    npz.NpzImages(folder / "x.npz").rows(range(2))


def _checkpoint(folder: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model.w": torch.ones(3, 5)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": 3, "optimizer_steps": 3, "recipe": {"a": 1}}))
    (folder / "checksums.json").write_text(json.dumps({file.name: fingerprint(file) for file in folder.iterdir()}))
    (folder / "COMMIT").write_text(f"{sha256(folder / 'checksums.json')}\n")


def _read_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.state
    checkpoint.damage()
    wanted = {name: torch.empty(shape) for name, shape in shapes(read_metadata(folder)).items()}
    assert sum(tensor.numel() for tensor in wanted.values()) < 1 << 20


def _export(folder: Path) -> None:
    recipe = load_any("quickstart/sfd")
    channels = recipe.latents.channels
    note = {
        "recipe": config.to_dict(recipe), "step": 1, "recipe_digest": "d", "tokenizers": {}, "stats_hash": "h",
        "stats": {"mean": [0.0] * channels, "std": [1.0] * channels},
    }  # fmt: skip
    save_file({"w": torch.ones(3)}, folder / "x.safetensors", metadata={export.EXPORT_KEY: json.dumps(note)})


def _read_export(folder: Path) -> None:
    load_for_sampling(folder / "x.safetensors", torch.device("cpu"))


def _read_whole_export(folder: Path) -> None:
    load_weights(folder / "x.safetensors")
    try:
        _read_export(folder)
    except ValueError as error:  # it has no weights of a LightningDiT
        if "missing" not in str(error):
            raise


def _stats(folder: Path) -> None:
    LatentStats(torch.ones(4), torch.ones(4)).save(folder / "stats.safetensors")


TARGETS = {
    "recipe": Target("x.yaml", _recipe, lambda folder: load_any(str(folder / "x.yaml")), YAML),
    "index": Target("index.json", _index, _index_and_sizes, JSON),
    "manifest": Target("manifest.json", _index, schema.Manifest.read, JSON),
    "shard": Target("shard.00000.mds", _index, _rows),
    "torch file": Target("x.pt", _torch, _read_torch, PICKLE),
    "npz": Target("x.npz", _npz, _read_npz, (b"|O", b"'descr'", b"True", b"(2, 4, 4, 3)")),
    "state": Target("state.json", _checkpoint, _read_checkpoint, JSON),
    "checksums": Target("checksums.json", _checkpoint, _read_checkpoint, JSON),
    "metadata": Target(".metadata", _checkpoint, _read_checkpoint, PICKLE),
    "export": Target("x.safetensors", _export, _read_whole_export, JSON),
    "stats": Target("stats.safetensors", _stats, lambda folder: LatentStats.load(folder / "stats.safetensors"), JSON),
}


# --------------------------------------------------------------------------------------------- long run


def attempt(target: Target, folder: Path, data: bytes) -> str:
    """ "read", "refused", or the traceback of a finding."""
    (folder / target.file).write_bytes(data)
    try:
        target.read(folder)
    except Allowed as error:
        return "refused" if str(error) else "an error without a message"
    except Exception:  # noqa: BLE001  whatever else it is, is what is looked for
        return traceback.format_exc()
    return "read"


def run(name: str, seconds: float, seed: int) -> tuple[Counter[str], dict[str, int]]:
    """Outcomes, and the seed of each finding by its last lines."""
    target, counts, findings = TARGETS[name], Counter[str](), dict[str, int]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        target.write(folder)
        good = (folder / target.file).read_bytes()
        before = sorted(path.name for path in folder.iterdir())
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            outcome = attempt(target, folder, mutated(good, seed, target.tokens))
            if sorted(path.name for path in folder.iterdir()) != before:
                outcome = f"files appeared: {sorted(path.name for path in folder.iterdir())}"
            counts[outcome if outcome in ("read", "refused") else "finding"] += 1
            if outcome not in ("read", "refused"):
                findings.setdefault("\n".join(outcome.splitlines()[-5:]), seed)
            seed += 1
    return counts, findings


def with_coverage(name: str, arguments: list[str]) -> None:
    """Coverage of our own code steers the changes; ends at the first finding. Needs `pip install atheris`."""
    import atheris

    # Imported again, with the counters in.
    for module in [m for m in sys.modules if m.split(".")[0] in ("sfd_scale", "eval", "faults")]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["sfd_scale", "eval"], enable_loader_override=False):
        counted = importlib.import_module("faults.fuzz")
    target, folder, corpus = counted.TARGETS[name], Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    target.write(folder)
    (corpus / "good").write_bytes((folder / target.file).read_bytes())

    def one(data: bytes) -> None:
        outcome = attempt(target, folder, data)
        if outcome not in ("read", "refused"):
            raise RuntimeError(outcome)

    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of every target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--atheris", choices=TARGETS)
    options, rest = parser.parse_known_args()
    limit = _MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if options.atheris:
        with_coverage(options.atheris, rest)
        return 0
    found = 0
    typer.echo(f"{'parser':<12} {'inputs':>8} {'read':>8} {'refused':>8} {'findings':>8}")
    for name in options.target or TARGETS:
        counts, findings = run(name, options.seconds, options.seed)
        typer.echo(f"{name:<12} {counts.total():>8} {counts['read']:>8} {counts['refused']:>8} {counts['finding']:>8}")
        for text, seed in findings.items():
            typer.echo(f"  seed {seed}:\n    " + text.replace("\n", "\n    "))
        found += len(findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
