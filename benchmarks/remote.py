"""Reading from an object store: our loader beside StreamingDataset, on the same S3 server on this machine.

    python -m benchmarks.remote                 # writes benchmarks/results/remote.json and docs/images/remote-wait.png
    python -m benchmarks.remote --part nodes    # or `readers`: one part, into the same file
    python -m benchmarks.remote --quick         # small, to test the benchmark

The server (moto) stands behind a proxy that adds 40 ms to a request and limits the bandwidth of a connection and of
all connections together. Each reader starts with an empty cache. A step of computation follows each batch, so what is
read during the step costs nothing. The wait of a step is the time until its batch is there.

Then several nodes read an epoch, one process each, with a cache of its own. The proxy counts the bytes of each node.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.object_store import Traffic, object_store, variables
from sfd_scale.runtime import environment

RESULTS = Path(__file__).parent / "results" / "remote.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "remote-wait.png"
SHAPE = (48, 16, 16)
BATCH, STEP_S = 32, 0.64
ANSWER_S = 240.0  # for all steps of a reader; also for an epoch of all nodes
GLOBAL_BATCH = 256  # of several nodes
PARTS = ("nodes", "readers")
OURS = "sfd-scale, 0 workers"


@dataclass(frozen=True)
class Size:
    """Shards of `per_shard` samples; steps of a reader; bytes per second of a connection, and of all together."""

    shards: int = 250
    per_shard: int = 40
    steps: int = 50
    connection_rate: float = 5e6
    total_rate: float = 15e6


def write_shards(folder: Path, size: Size) -> None:
    """Random samples, which is fine because nothing is compressed."""
    from sfd_scale.data.import_mds import import_data
    from sfd_scale.data.mosaic import streaming

    form = f"ndarray:float16:{','.join(map(str, SHAPE))}"
    columns = {"label": "int", "latents": form, "latents_flip": form}
    draw, stride = np.random.default_rng(0), 8 + 4 * int(np.prod(SHAPE))
    limit = 8 + size.per_shard * (stride + 4) + 600  # the head of a shard describes its columns
    with streaming().MDSWriter(out=str(folder), columns=columns, size_limit=limit, hashes=["sha256"]) as writer:
        for number in range(size.shards * size.per_shard):
            latents = draw.standard_normal(SHAPE, dtype=np.float32).astype(np.float16)
            writer.write({"label": number % 1000, "latents": latents, "latents_flip": latents[:, :, ::-1].copy()})
    import_data(folder, image_size=256)


def serve(pipe: Any, folder: Path, size: Size) -> None:
    """The process of the server: answers each message with the traffic since the last one."""
    with object_store(latency_s=0.04, connection_rate=size.connection_rate, total_rate=size.total_rate) as store:
        remote = store.upload(folder, "shards")
        pipe.send((store.address, remote))
        while pipe.recv():
            pipe.send((store.traffic.requests, store.traffic.bytes, store.traffic.by_client))
            store.traffic = Traffic()


def ours(remote: str, cache: Path, window: int) -> Iterator[Any]:
    """As the trainer reads: a thread reads four micro-batches ahead."""
    from sfd_scale.data.dataloader import DataConfig, LatentLoader
    from sfd_scale.data.waiting import PatientBatches
    from sfd_scale.runtime.batch_split import BatchSplit

    config = DataConfig(path=cache, remote=remote, shuffle_block=window)
    loader = LatentLoader(config, seed=0, split=BatchSplit(BATCH, 1, 1), rank=0)
    return PatientBatches(loader.batches(0), limit_s=600, advice="see the server", ahead=4)


def theirs(remote: str, cache: Path, window: int, workers: int) -> Iterator[Any]:
    """StreamingDataset with its algorithm py1e and one canonical node."""
    from torch.utils.data import DataLoader

    from sfd_scale.data.mosaic import streaming

    data = streaming().StreamingDataset(
        remote=remote, local=str(cache), shuffle=True, shuffle_algo="py1e", shuffle_block_size=window,
        num_canonical_nodes=1, batch_size=BATCH, shuffle_seed=0, validate_hash="sha256",
    )  # fmt: skip
    return iter(DataLoader(data, batch_size=BATCH, num_workers=workers))


def consume(pipe: Any, address: str, remote: str, cache: Path, workers: int | None, size: Size) -> None:
    """The process of a reader: sends the wait of each step at once. The first wait includes opening the data."""
    environment.set_variables(variables(address))
    if workers is None:  # imports are no part of the wait
        import sfd_scale.data.dataloader  # noqa: F401
    else:
        from sfd_scale.data.mosaic import streaming

        streaming()
    if workers is not None:  # otherwise its workers wait for ever for an index that forked connections share
        import boto3

        cache.mkdir(parents=True)
        bucket, prefix = remote.removeprefix("s3://").split("/")
        boto3.client("s3", endpoint_url=address).download_file(
            bucket, f"{prefix}/index.json", str(cache / "index.json")
        )
    window, started = size.shards * size.per_shard, time.monotonic()
    batches = ours(remote, cache, window) if workers is None else theirs(remote, cache, window, workers)
    for _ in range(size.steps):
        next(batches)
        pipe.send(time.monotonic() - started)
        time.sleep(STEP_S)
        started = time.monotonic()


class Server:
    """The process of the server, with the shards of a folder."""

    def __init__(self, folder: Path, size: Size) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, folder, size), daemon=True)
        self.process.start()
        self.address, self.remote = self._pipe.recv()

    def traffic(self) -> tuple[dict[str, int], int, dict[str, int]]:
        """Requests by object, bytes, and bytes by client, since the last call."""
        self._pipe.send(True)
        answer: tuple[dict[str, int], int, dict[str, int]] = self._pipe.recv()
        return answer


def measure(server: Server, root: Path, size: Size, workers: tuple[int, ...]) -> dict[str, Any]:
    """The waits of each reader, and what it read."""
    context = multiprocessing.get_context("spawn")
    readers = {OURS: None, **{f"StreamingDataset py1e, {count} workers": count for count in workers}}
    results = {}
    for number, (name, count) in enumerate(readers.items()):
        server.traffic()
        answer, end = context.Pipe()
        reader = context.Process(
            target=consume, args=(end, server.address, server.remote, root / f"cache{number}", count, size)
        )
        reader.start()
        end.close()
        waits = received(answer, size.steps, ANSWER_S)
        reader.join(20)
        reader.kill()
        requests, sent, _ = server.traffic()
        shards = sum(n for file, n in requests.items() if file.endswith(".mds"))
        results[name] = {"waits": waits, "steps": size.steps, "gets": shards, "bytes": sent}
        print(name, summary(waits, size.steps), f"{shards} GETs", flush=True)
    return results


def received(answer: Connection, count: int, limit_s: float) -> list[float]:
    """Up to `count` waits that a reader sends within `limit_s`. A reader that dies sends no more."""
    waits: list[float] = []
    deadline = time.monotonic() + limit_s
    while len(waits) < count and answer.poll(max(0.0, deadline - time.monotonic())):
        try:
            waits.append(answer.recv())
        except EOFError:
            break
    return waits


def read_epoch(address: str, remote: str, cache: Path, node: int, nodes: int, global_batch: int) -> None:
    """The process of a node: reads its samples of one epoch. One rank stands for the ranks of the node."""
    environment.set_variables(variables(address, f"node{node}"))
    from sfd_scale.data.dataloader import DataConfig, LatentLoader
    from sfd_scale.runtime.batch_split import BatchSplit

    config = DataConfig(path=cache, remote=remote)
    loader = LatentLoader(config, seed=0, split=BatchSplit(global_batch // nodes, 1, nodes), rank=node)
    batches = loader.batches(0)
    for _ in range(loader.steps_per_epoch):
        next(batches)
    loader.close()


def nodes_read(server: Server, root: Path, nodes: int, global_batch: int) -> dict[str, Any]:
    """Bytes that each of several nodes reads in an epoch, and the largest times nodes / bytes of the data."""
    context = multiprocessing.get_context("spawn")
    server.traffic()
    readers = [
        context.Process(
            target=read_epoch,
            args=(server.address, server.remote, root / f"node{node}of{nodes}", node, nodes, global_batch),
        )
        for node in range(nodes)
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + ANSWER_S
    for reader in readers:
        reader.join(max(0.0, deadline - time.monotonic()))
    codes = [reader.exitcode for reader in readers]
    for reader in readers:
        reader.kill()
    _, _, read = server.traffic()
    if codes != [0] * nodes:
        raise RuntimeError(f"{nodes} nodes: exit codes {codes}; None: not done after {ANSWER_S:.0f} s; read {read}")
    whole = sum(file.stat().st_size for file in (root / "shards").glob("*.mds"))
    found = [read[f"node{node}"] for node in range(nodes)]
    return {"bytes": found, "largest_times_nodes": max(found) * nodes / whole}


def summary(waits: list[float], steps: int) -> str:
    if not waits:
        return f"no batch in {ANSWER_S:.0f} s"
    done = "" if len(waits) == steps else f"{len(waits)} of {steps} batches in {ANSWER_S:.0f} s: "
    return f"{done}first batch {waits[0]:.1f} s, wait {sum(waits):.1f} s, after the first {sum(waits[1:]):.1f} s"


def node_share(shards: int = 2503, per_shard: int = 512, nodes: int = 8, global_batch: int = 256) -> dict[str, float]:
    """Bytes that a node of a full-size run reads in two epochs, as a part of the data; computed from the order."""
    import torch

    from sfd_scale.data.dataloader import DataConfig, epoch_order
    from sfd_scale.data.order import SampleOrder
    from sfd_scale.data.prefetch import ranks_part
    from sfd_scale.runtime.batch_split import BatchSplit

    sizes, split = (per_shard,) * shards, BatchSplit(global_batch // (8 * nodes), 1, 8 * nodes)
    shares = {}
    for order in ("window", "blocks"):
        config = DataConfig(path=Path(), order=order)  # type: ignore[arg-type]
        samples = SampleOrder(
            functools.partial(epoch_order, config, 0, sizes, global_batch), global_batch, sizes
        )  # fmt: skip
        read = [
            len(np.unique(samples.shards(torch.cat([ranks_part(samples.epoch(e), split, 8 * n, 8) for e in (0, 1)]))))
            for n in range(nodes)
        ]
        shares[order] = max(read) / shards
    return shares


def picture(results: dict[str, Any], path: Path) -> None:
    """The sum of the waits over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for name, result in results.items():
        axes.plot(np.cumsum(result["waits"]), label=name)
    axes.set(xlabel="step", ylabel="seconds waited so far", title="Wait for data from an object store, empty cache")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def measure_all(size: Size, parts: Sequence[str], quick: bool) -> dict[str, Any]:
    """The results of some of PARTS."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_shards(root / "shards", size)
        server = Server(root / "shards", size)
        if "nodes" in parts:
            counts, batch = ((2,), 32) if quick else ((4, 8), GLOBAL_BATCH)
            found["nodes"] = {count: nodes_read(server, root, count, batch) for count in counts}
            for count, read in found["nodes"].items():
                print(f"{count} nodes: a node reads at most {read['largest_times_nodes']:.3f}/{count} of the data")
        if "readers" in parts:
            found["readers"] = measure(server, root, size, (2,) if quick else (2, 4))
        server.process.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to test the benchmark; writes nothing")
    parser.add_argument("--part", choices=PARTS, action="append", help="measure this part; the file keeps the others")
    chosen = parser.parse_args()
    size = Size(shards=12, per_shard=8, steps=3) if chosen.quick else Size()
    shares = node_share(nodes=2, shards=64, global_batch=64) if chosen.quick else node_share()
    print(
        "part of the data that a node reads in two epochs:", {name: round(share, 3) for name, share in shares.items()}
    )
    found = measure_all(size, chosen.part or PARTS, chosen.quick)
    if chosen.quick:
        return
    note = json.loads(RESULTS.read_text(encoding="utf-8"))
    machine = f"{platform.machine()}, {multiprocessing.cpu_count()} cores"
    note |= {"date": time.strftime("%Y-%m-%d"), "machine": machine, "node_share": shares, **found}
    RESULTS.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    picture(note["readers"], PICTURE)


if __name__ == "__main__":
    main()
